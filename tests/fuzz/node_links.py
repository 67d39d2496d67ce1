"""Engine nodes under frames that make no sense: a role with a real engine, and the real transfer logic over scripted agents.

A case is a list of happenings: frames, notifications, steps, time, links that come and go, in any order. Every frame crosses the wire's own
encoding first: what the decoder refuses closes a real node's link, and comes no further here either.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from disaggd.cluster.hello import ConnectPair, OpenPair, PairReady
from disaggd.cluster.link import decode_from_router
from disaggd.cluster.offer import RemoteOffer
from disaggd.cluster.protocol import (
    Frame,
    Generate,
    Grant,
    Granted,
    Landed,
    Prefill,
    Prefilled,
    PrefixSource,
    PushPrefix,
    RequestGrant,
    ToNode,
    pack_tokens,
)
from disaggd.ids import AgentId, BlockId, GrantToken, Incarnation, NodeName, SeqId
from disaggd.roles.compute import LinkId
from disaggd.sampling import SamplingParams
from disaggd.transfer import messages as m
from disaggd.transfer.incoming import Incoming
from disaggd.transfer.layout import PoolPlace
from disaggd.transfer.notification import AnyNotification, Connect, FirstToken, Piece, encode
from disaggd.transfer.outgoing import Outgoing
from disaggd.transfer.pool import Descriptors, Pool
from disaggd.transfer.share import Share
from disaggd.transfer.source import InPlace
from disaggd.wire import Undecodable
from tests.fuzz import wild
from tests.fuzz.surface import Surface
from tests.support.decode_scripts import delivered, is_empty, make_decode_node
from tests.support.endpoints import endpoint
from tests.support.prefill_scripts import is_idle, taking_node
from tests.support.role_nodes import (
    BLOCK,
    BYTES_PER_BLOCK,
    HASHER,
    KV,
    QUIESCE_S,
    VOCAB_SIZE,
    RoleNode,
    expected,
    kv_of,
    next_token,
    prompt,
)
from tests.support.scripted_agent import ScriptedAgent

NUM_BLOCKS = 32
PEER_PLACE = PoolPlace(1 << 20, 256)
STRANGER, FRIEND = LinkId(7), LinkId(1)
"""The link that says what makes no sense, and a good router's."""

LIVE_TOKENS = tuple(b"the live grant %d" % i for i in range(4))
"""Stand for grants that the node has given; these are drawn only when the case runs. As long as a real token."""


class FuzzAgent(ScriptedAgent):
    """Reckons what a real agent reckons of a peer's place."""

    def connect(self, agent_id: AgentId, metadata: bytes, sources: Descriptors, targets: Descriptors) -> None:
        targets.rows()
        super().connect(agent_id, metadata, sources, targets)


class Bench:
    """A node and its transfer thread's logic, in one thread. `peer` is the node of the other role."""

    def __init__(self, node: RoleNode[Any], peer: NodeName) -> None:
        self.node = node
        self.peer = peer
        self.agents: list[FuzzAgent] = []
        self._memory = (ctypes.c_uint8 * (NUM_BLOCKS * KV.bytes_per_block))()
        pool = Pool(PoolPlace(ctypes.addressof(self._memory), NUM_BLOCKS), KV)
        self._events: list[m.TransferEvent] = []
        self.incoming = Incoming(Share(KV), pool, self._open, self._events.append, self._clock)  # type: ignore[arg-type]
        self.outgoing = Outgoing(InPlace(Share(KV), pool.place), self._open, self._events.append, self._clock)  # type: ignore[arg-type]
        node.link_up(STRANGER)
        self.meet("first")

    def meet(self, life: str) -> None:
        """A good router pairs both ways with `peer`, of which a new life begins."""
        incarnation, agent = Incarnation(life), AgentId(f"{self.peer}-{life}")
        self.say(FRIEND, OpenPair(self.peer, incarnation, 1))
        self.intake = len(self.agents) - 1
        self.notify(self.intake, Connect(self.agents[-1].agent_id, 0))
        self.say(FRIEND, ConnectPair(self.peer, incarnation, endpoint(agent, b"", PEER_PLACE), KV))
        self.say(FRIEND, PairReady(self.peer, agent))

    def _open(self) -> FuzzAgent:
        self.agents.append(FuzzAgent(AgentId(f"a{len(self.agents)}")))
        return self.agents[-1]

    def _clock(self) -> float:
        return self.node.now

    # ── what happens ──

    def say(self, link: LinkId, frame: Frame) -> None:
        if (decoded := self._over_the_wire(frame)) is not None:
            self.node.say(decoded, link=link)
        self.settle()

    def _over_the_wire(self, frame: Frame) -> ToNode | None:
        try:
            return decode_from_router(self._alive(msgspec.msgpack.encode(frame)))
        except Undecodable:
            return None

    def notify(self, number: int, message: bytes | AnyNotification) -> None:
        raw = message if isinstance(message, bytes) else encode(message)
        agent = self.agents[number % len(self.agents)]
        if not agent.is_destroyed:
            agent.arriving.append(self._alive(raw))
        self.incoming.deliver(self.incoming.poll())
        self.settle()

    def _alive(self, raw: bytes) -> bytes:
        granted = [grant.grant.token for grant in self.node.frames(Granted)] + [t.token for t in self.node.submitted(m.Expect)]
        for stand_in, token in zip(LIVE_TOKENS, granted[-len(LIVE_TOKENS) :], strict=False):
            raw = raw.replace(stand_in, token)
        return raw

    def step(self) -> None:
        if self.node.engine.has_work:
            assert all(max(sequence.tokens) < VOCAB_SIZE for sequence in self.node.engine.sequences.values()), (
                "a model would be asked for it"
            )
            self.node.step()
        self.settle()

    def after(self, seconds: float) -> None:
        self.node.after(seconds)
        self.settle()

    def relink(self) -> None:
        """The stranger leaves and comes back."""
        self.node.link_down(STRANGER)
        self.settle()
        self.node.link_up(STRANGER)
        self.settle()

    def write(self) -> None:
        """Whatever is being written arrives."""
        for agent in self.agents:
            agent.done.update(range(len(agent.sent)))
        self.outgoing.poll()
        self.settle()

    def settle(self) -> None:
        """The transfer thread obeys, and what it reports is heard, until neither has anything left to say."""
        while self.node.commands[self._num_obeyed :] or self._events:
            while self._num_obeyed < len(self.node.commands):
                self._num_obeyed += 1
                self._obey(self.node.commands[self._num_obeyed - 1])
            while self._events:
                self.node.event(self._events.pop(0))

    _num_obeyed = 0

    def _obey(self, command: m.TransferCommand) -> None:
        match command:
            case m.OpenPair():
                self.incoming.open(command)
            case m.Expect():
                self.incoming.expect(command)
            case m.Forget(token):
                self.incoming.forget(token)
            case m.Fence():
                self.incoming.fence(command)
            case m.ConnectPair():
                self.outgoing.connect(command)
            case m.BeginPush():
                self.outgoing.begin(command)
            case m.PushBlocks():
                self.outgoing.push_blocks(command)
            case m.FinishPush():
                self.outgoing.finish(command)
            case m.RenewLease(token):
                self.outgoing.renew(token)
            case m.CancelPush(token):
                self.outgoing.cancel(token)
            case m.QuiesceByWire():
                self.outgoing.quiesce_by_wire(command)
            case m.ClosePair(peer):
                self.outgoing.close(peer)

    def calm_down(self) -> None:
        """The stranger leaves for good, and all that is due by the clock is done: nothing of his may be left."""
        self.node.link_down(STRANGER)
        self.settle()
        for _ in range(4):
            self.write()
            self.after(QUIESCE_S)
            while self.node.engine.has_work:
                self.step()


Happen = tuple[Callable[..., None], tuple[Any, ...]]


def check(bench: Bench, happenings: Sequence[Happen]) -> None:
    """Block accounting and every invariant of the role are checked by the node itself, after each."""
    for happen, arguments in happenings:
        happen(bench, *arguments)
    bench.calm_down()


# ── what may come ────────────────────────────────────────────────────────────────────────────────────────────────────

seqs = st.sampled_from([SeqId(f"s{i}") for i in range(3)])
attempts = st.integers(0, 2)
names = st.sampled_from([NodeName("p0"), NodeName("d0"), NodeName("d1")])
agent_ids = st.sampled_from([AgentId(name) for name in ("a0", "a1", "a2", "p0-first", "d0-first", "agent-1", "other")])
grant_tokens = st.sampled_from([GrantToken(token) for token in (*LIVE_TOKENS, b"t0", b"t1", b"t2")])
lengths = st.sampled_from((1, 3, 4, 8, 20, 24, 40))
block_ids = st.lists(st.integers(0, 255).map(BlockId), max_size=12).map(tuple)
sampling = st.builds(
    SamplingParams, max_tokens=st.sampled_from((1, 2, 8)), temperature=st.sampled_from((0.0, 1.0)), ignore_eos=st.booleans()
)
places = st.just(PEER_PLACE)

LIVE: dict[str, SearchStrategy[Any]] = {
    "seq": seqs,
    "attempt": attempts,
    "token": grant_tokens,
    "peer": names,
    "target": names,
    "writer": names,
    "prefill": names,
    "node": names,
    "agent_id": agent_ids,
    "peer_incarnation": st.sampled_from([Incarnation("first"), Incarnation("second")]),
    "tokens": lengths.map(lambda length: pack_tokens(prompt(length))),
    "num_prompt_tokens": lengths,
    "sampling": sampling,
    "cache_salt": st.just(""),
    "first_token_index": st.sampled_from((0, BLOCK, 2 * BLOCK)),
    "block_ids": block_ids,
    "lease_s": st.just(5.0),
    "place": places,
    "kv": st.sampled_from([KV, kv_of(2 * BLOCK), kv_of(3)]),
    "num_tokens": lengths,
}
LIVE_PROGRESS = LIVE | {"tokens": st.lists(grant_tokens, max_size=3).map(tuple)}


@st.composite
def generates(draw: st.DrawFn) -> Generate:
    """Such as a good router sends."""
    length = draw(lengths)
    offer = RemoteOffer(NodeName("p0"), 1, draw(st.integers(0, 5)), False, 0.0, 0, None, None, may_grant=draw(st.booleans()))
    policy = draw(st.sampled_from(("auto", "local", "remote")))
    offered = draw(st.sampled_from((None, offer)))
    return Generate(draw(seqs), draw(attempts), pack_tokens(prompt(length)), length, draw(sampling), "", policy, 2.0, offered)


@st.composite
def prefills(draw: st.DrawFn) -> Prefill:
    """Such as a good router sends."""
    length, token = draw(lengths), draw(grant_tokens)
    blocks = tuple(BlockId(100 + i) for i in range(length // BLOCK + 1))
    grant = draw(st.sampled_from((None, Grant(token, NodeName("d0"), NodeName("p0"), AgentId("d0-first"), 0, blocks, 5.0))))
    prefix = draw(st.sampled_from((None, PrefixSource(NodeName("d0"), length // 2))))
    return Prefill(draw(seqs), draw(attempts), pack_tokens(prompt(length)), length, draw(sampling), "", grant, prefix)


@st.composite
def prefix_pushes(draw: st.DrawFn) -> PushPrefix:
    """Such as a good router sends."""
    blocks = tuple(BlockId(100 + i) for i in range(draw(st.integers(0, 3))))
    grant = Grant(draw(grant_tokens), NodeName("p0"), NodeName("d0"), AgentId("p0-first"), draw(st.sampled_from((0, BLOCK))), blocks, 5.0)
    return PushPrefix(draw(seqs), draw(attempts), grant)


sane_frames = generates() | prefills() | prefix_pushes() | st.builds(RequestGrant, seqs, attempts, st.just(NodeName("p0")), st.booleans())
any_frames = wild.frames(ToNode, LIVE) | wild.frames(ToNode, LIVE_PROGRESS)
notifications = (
    st.binary(max_size=40)
    | wild.frames(AnyNotification, LIVE)
    | st.builds(
        Piece,
        grant_tokens,
        st.just(0),
        st.integers(0, 2),
        st.sampled_from([BYTES_PER_BLOCK * count for count in range(1, 6)]),
        total=st.sampled_from((None, 1, 2, 3)),
        first=st.sampled_from((None, FirstToken(5), FirstToken(VOCAB_SIZE))),
    )
)


def happening(name: str, *arguments: SearchStrategy[Any]) -> SearchStrategy[Happen]:
    return st.tuples(st.just(getattr(Bench, name)), st.tuples(*arguments))


happenings = st.lists(
    st.one_of(
        happening("say", st.just(STRANGER), sane_frames),
        happening("say", st.just(STRANGER), any_frames),
        happening("say", st.just(STRANGER), any_frames),
        happening("notify", st.integers(0, 3), notifications),
        happening("step"),
        happening("write"),
        happening("after", st.sampled_from((0.1, 1.0, 4.9, 6.0, 11.0))),
        happening("relink"),
    ),
    max_size=16,
)


# ── a decode node ────────────────────────────────────────────────────────────────────────────────────────────────────


def check_decode(happenings: Sequence[Happen]) -> None:
    """Afterwards it is empty, and serves one prompt by itself and one that is prefilled elsewhere."""
    node = make_decode_node(NUM_BLOCKS, hasher=HASHER)
    bench = Bench(node, NodeName("p0"))
    check(bench, happenings)
    assert is_empty(node)
    node.clear()
    bench._num_obeyed = 0
    bench.meet("afterwards")
    here, there = SeqId("good-0"), SeqId("good-1")
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    bench.say(FRIEND, Generate(here, 0, pack_tokens(prompt(10)), 10, params, "", "local", 2.0, None))
    offer = RemoteOffer(NodeName("p0"), 1, 0, False, 0.0, 0, None, None, may_grant=False)
    bench.say(FRIEND, Generate(there, 0, pack_tokens(prompt(22, seed=9)), 22, params, "fresh", "remote", 2.0, offer))
    bench.say(FRIEND, RequestGrant(there, 0, NodeName("p0")))
    grant = node.last(Granted).grant
    first = FirstToken(next_token(prompt(22, seed=9)))
    bench.notify(bench.intake, Piece(grant.token, 0, 0, 6 * BYTES_PER_BLOCK, total=1, first=first))
    assert node.last(Landed).seq == there
    while node.engine.has_work:
        bench.step()
    assert delivered(node, here) == expected(prompt(10), 4)
    assert delivered(node, there) == expected(prompt(22, seed=9), 4)
    assert is_empty(node)


# ── a prefill node ───────────────────────────────────────────────────────────────────────────────────────────────────


def check_prefill(happenings: Sequence[Happen]) -> None:
    """Afterwards it is idle, and computes a prompt whose KV it pushes."""
    node = taking_node(NUM_BLOCKS)
    bench = Bench(node, NodeName("d0"))
    check(bench, happenings)
    assert is_idle(node)
    node.clear()
    bench._num_obeyed = 0
    bench.meet("afterwards")
    grant = Grant(
        GrantToken(b"good"), NodeName("d0"), NodeName("p0"), AgentId("d0-afterwards"), 0, tuple(BlockId(100 + i) for i in range(6)), 5.0
    )
    good = SeqId("good")
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    bench.say(FRIEND, Prefill(good, 0, pack_tokens(prompt(22, seed=9)), 22, params, "fresh", grant, None))
    while node.engine.has_work:
        bench.step()
    bench.write()
    assert node.last(Prefilled).token == next_token(prompt(22, seed=9))
    pieces = [piece for piece in bench.agents[-1].sent if isinstance(piece, Piece) and piece.token == grant.token]
    assert sum(piece.kv_bytes for piece in pieces) == 6 * BYTES_PER_BLOCK
    assert is_idle(node)


DECODE = Surface("frames and notifications to a decode node", happenings, check_decode, quick=120, share=0.06)
PREFILL = Surface("frames and notifications to a prefill node", happenings, check_prefill, quick=120, share=0.06)
