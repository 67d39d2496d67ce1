"""Notifications that make no sense, at the agents that peers write to: no landing but of what a grant expects, and the thread goes on."""

import ctypes
from collections import Counter
from collections.abc import Sequence

from hypothesis import strategies as st

from disaggd.ids import AgentId, BlockId, GrantToken, Incarnation, NodeName
from disaggd.transfer import messages as m
from disaggd.transfer.incoming import Incoming
from disaggd.transfer.layout import KVGroup, KVSpec, PoolPlace
from disaggd.transfer.notification import AnyNotification, Checksums, FirstToken, Piece, encode
from disaggd.transfer.pool import Pool
from disaggd.transfer.share import Share
from tests.fuzz import wild
from tests.fuzz.surface import Surface
from tests.support.scripted_agent import ScriptedAgent

KV = KVSpec(dtype="float32", block_size=4, head_dim=1, groups=(KVGroup(layers=2, kv_heads=1, head_bytes=32),))
BLOCK_BYTES = KV.bytes_per_block
NUM_BLOCKS = 8
P0, P1 = NodeName("p0"), NodeName("p1")
T0, T1, T2, GOOD = (GrantToken(token) for token in (b"verified", b"plain", b"tokenless", b"good"))
BLOCKS = tuple(BlockId(block) for block in range(2))


def check(arriving: Sequence[tuple[int, bytes]]) -> None:
    """Each grant lands or fails once at most; one that is given afterwards, at an agent made anew, lands."""
    memory = (ctypes.c_uint8 * (NUM_BLOCKS * BLOCK_BYTES))()
    agents: list[ScriptedAgent] = []
    events: list[m.TransferEvent] = []

    def open_agent() -> ScriptedAgent:
        agents.append(ScriptedAgent(AgentId(f"a{len(agents)}")))
        return agents[-1]

    pool = Pool(PoolPlace(ctypes.addressof(memory), NUM_BLOCKS), KV)
    incoming = Incoming(Share(KV), pool, open_agent, events.append, lambda: 0.0)  # type: ignore[arg-type]
    for peer in (P0, P1):
        incoming.open(m.OpenPair(peer, Incarnation("one"), 1))
    incoming.expect(m.Expect(T0, P0, AgentId("a0"), 2, verify=BLOCKS))
    incoming.expect(m.Expect(T1, P0, AgentId("a0"), 2))
    incoming.expect(m.Expect(T2, P1, AgentId("a1"), 1, brings_token=False))
    for number, raw in arriving:
        agents[number].arriving.append(raw)
        incoming.deliver(incoming.poll())
    ends = Counter(event.token for event in events if isinstance(event, m.Landed | m.LandingFailed))
    assert set(ends) <= {T0, T1, T2} and max(ends.values(), default=0) <= 1
    for landed in [event for event in events if isinstance(event, m.Landed)]:
        assert landed.kv_bytes == (BLOCK_BYTES if landed.token == T2 else 2 * BLOCK_BYTES)
        assert (landed.first is not None) or landed.token == T2
    incoming.fence(m.Fence(P0, AgentId("a0")))
    incoming.expect(m.Expect(GOOD, P0, AgentId("a2"), 1))
    agents[2].arrive(Piece(GOOD, 0, 0, BLOCK_BYTES), Piece(GOOD, 0, 1, 0, total=2, first=FirstToken(7)))
    incoming.deliver(incoming.poll())
    assert events[-1] == m.Landed(GOOD, FirstToken(7), BLOCK_BYTES)


tokens = st.sampled_from((T0, T1, T2))
sums = st.none() | st.builds(
    Checksums,
    st.integers(-1, 2),
    st.sampled_from((0, 1, 2, 3, 2**62)),
    st.lists(st.integers(-1, 8).map(BlockId), max_size=3).map(tuple),
    st.lists(st.sampled_from((0, 420107461, 2**32, -1)), max_size=3).map(tuple),
)
pieces = st.builds(
    Piece,
    tokens,
    st.sampled_from((0, 0, 0, 1, -1)),
    st.integers(-1, 3),
    st.sampled_from((0, 1, BLOCK_BYTES // 2, BLOCK_BYTES, 2 * BLOCK_BYTES, -BLOCK_BYTES, 2**63)),
    total=st.sampled_from((None, 0, 1, 2, -1, 2**63)),
    first=st.sampled_from((None, FirstToken(5), FirstToken(6))),
    sums=sums,
)
live: wild.Live = {"token": tokens, "agent_id": st.sampled_from([AgentId("a0"), AgentId("a1")])}
arriving = st.one_of(pieces.map(encode), pieces.map(encode), wild.frames(AnyNotification, live).map(encode), st.binary(max_size=30))

NOTIFICATIONS = Surface(
    "notifications to agents", st.lists(st.tuples(st.integers(0, 1), arriving), max_size=10), check, quick=150, share=0.1
)
