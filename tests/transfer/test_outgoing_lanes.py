"""The sending side of a rank that writes to several ranks of a peer, over scripted message orders. Without NIXL."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from disaggd.ids import AgentId, BlockId, GrantToken, HandleId, Incarnation, NodeName
from disaggd.transfer import messages as m
from disaggd.transfer.endpoint import Endpoint
from disaggd.transfer.layout import KVSpec, PoolPlace
from disaggd.transfer.notification import Connect, FirstToken, Piece, WireQuiesced
from disaggd.transfer.outgoing import PUSH_TIMEOUT_S, Outgoing
from disaggd.transfer.share import Share
from disaggd.transfer.source import InPlace, Sources, Staged
from tests.support.copies import LateCopies
from tests.support.endpoints import PORT, plain_kv, span
from tests.support.scripted_agent import ScriptedAgent

D0 = NodeName("d0")
FAR, FARTHER = AgentId("far"), AgentId("farther")
TOKEN = GrantToken(bytes(16))
FIRST = FirstToken(7)
LAYERS, NUM_BLOCKS, BLOCK_BYTES, KV_HEADS = 2, 4, 64, 4
KV = plain_kv(LAYERS, BLOCK_BYTES, KV_HEADS)
BLOCKS = (BlockId(0), BlockId(3))
WRITE = m.PushBlocks(TOKEN, range(LAYERS), span(BLOCKS), BLOCKS)
PART_BYTES = LAYERS * len(BLOCKS) * BLOCK_BYTES // 2
PLACE = PoolPlace(4096, NUM_BLOCKS)
LEGS = (m.Leg(0, 0, range(2), "direct"), m.Leg(0, 1, range(2, 4), "direct"))
ENDPOINTS = (Endpoint(FAR, b"", PLACE, PORT), Endpoint(FARTHER, b"", PLACE, PORT))


@dataclass
class Bench:
    """The only rank of its node, connected to two of d0 that share its heads."""

    sources: Sources = field(default_factory=lambda: InPlace(Share(KV), PLACE))
    events: list[m.TransferEvent] = field(default_factory=list)
    agents: list[ScriptedAgent] = field(default_factory=list)
    now: float = 0.0

    def __post_init__(self) -> None:
        self.outgoing = Outgoing(self.sources, self._make, self.events.append, lambda: self.now)  # type: ignore[arg-type, return-value]
        self.connect()
        assert self.turn() == [m.PairConnected(D0, FAR)]

    def _make(self) -> ScriptedAgent:
        self.agents.append(ScriptedAgent(AgentId(f"near{len(self.agents)}")))
        return self.agents[-1]

    def connect(self, endpoints: tuple[Endpoint, ...] = ENDPOINTS, kv: KVSpec = KV) -> None:
        self.outgoing.connect(m.ConnectPair(D0, Incarnation("one"), endpoints, kv))

    def begin(self) -> None:
        self.outgoing.begin(m.BeginPush(TOKEN, D0, FAR, lease_s=5.0))

    def sent(self) -> list[tuple[AgentId, object]]:
        return list(zip(self.agents[-1].sent_to, self.agents[-1].sent, strict=True))

    def turn(self) -> list[m.TransferEvent]:
        self.outgoing.poll()
        events, self.events[:] = list(self.events), []
        return events


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_each_rank_is_probed_with_its_own_id(bench: Bench) -> None:
    assert bench.sent() == [(FAR, Connect(FAR, 0)), (FARTHER, Connect(FARTHER, 0))]


def test_pieces_are_numbered_for_each_rank_and_each_has_a_last_one(bench: Bench) -> None:
    bench.begin()
    bench.outgoing.push_blocks(WRITE)
    bench.outgoing.push_blocks(WRITE)
    bench.outgoing.finish(m.FinishPush(TOKEN, FIRST))
    assert bench.sent()[2:] == [
        (FAR, Piece(TOKEN, 0, 0, PART_BYTES)),
        (FARTHER, Piece(TOKEN, 0, 0, PART_BYTES)),
        (FAR, Piece(TOKEN, 0, 1, PART_BYTES)),
        (FARTHER, Piece(TOKEN, 0, 1, PART_BYTES)),
        (FAR, Piece(TOKEN, 0, 2, 0, total=3, first=FIRST)),
        (FARTHER, Piece(TOKEN, 0, 2, 0, total=3, first=FIRST)),
    ]


def test_references_come_back_when_the_last_rank_has_its_part(bench: Bench) -> None:
    bench.begin()
    bench.outgoing.push_blocks(WRITE)
    bench.outgoing.finish(m.FinishPush(TOKEN, FIRST))
    bench.agents[0].done.add(HandleId(3))
    assert bench.turn() == []
    bench.agents[0].done.add(HandleId(2))
    sent = tuple(m.Sent(leg, PART_BYTES, 0.0, 0.0) for leg in LEGS)
    assert bench.turn() == [m.HandleDone(TOKEN, BLOCKS, 2 * PART_BYTES), m.PushEnded(TOKEN, True, True, 2 * PART_BYTES, 0.0, 0.0, sent)]


def test_a_pair_that_is_lost_by_one_ranks_part_ends_them_all(bench: Bench) -> None:
    bench.begin()
    bench.outgoing.push_blocks(WRITE)
    bench.agents[0].done.add(HandleId(2))
    bench.turn()
    bench.agents[0].is_lost = True
    assert bench.turn() == [
        m.HandleDone(TOKEN, BLOCKS, PART_BYTES),
        m.PushEnded(TOKEN, False, False, PART_BYTES, 0.0, 0.0, (m.Sent(LEGS[0], PART_BYTES, 0.0, 0.0),)),
        m.PairFailed(D0, FAR, "gone"),
    ]


def test_one_rank_that_takes_nothing_loses_the_pair_though_the_other_takes_all(bench: Bench) -> None:
    bench.begin()
    bench.outgoing.push_blocks(WRITE)
    events: list[m.TransferEvent] = []
    handle = 2
    while not any(isinstance(event, m.PairFailed) for event in events) and bench.now < 2 * PUSH_TIMEOUT_S:
        bench.now += 0.5
        bench.outgoing.renew(TOKEN)
        bench.agents[0].done.add(HandleId(handle))
        events += bench.turn()
        if not bench.agents[0].is_destroyed:
            handle = len(bench.agents[0].sent)
            bench.outgoing.push_blocks(WRITE)
    assert m.PairFailed(D0, FAR, "no write to it has ended for 30 s") in events
    assert bench.now == PUSH_TIMEOUT_S


def test_a_block_that_one_rank_does_not_have_is_written_to_none(bench: Bench) -> None:
    bench.connect((Endpoint(AgentId("new"), b"", PLACE, PORT), Endpoint(AgentId("smaller"), b"", PoolPlace(4096, NUM_BLOCKS - 1), PORT)))
    bench.outgoing.begin(m.BeginPush(TOKEN, D0, AgentId("new"), lease_s=5.0))
    bench.turn()
    bench.outgoing.push_blocks(WRITE)
    assert bench.turn() == [m.HandleDone(TOKEN, BLOCKS, 0), m.PushEnded(TOKEN, True, False, 0, None, None)]


def test_one_rank_hears_for_all_that_nothing_more_is_written(bench: Bench) -> None:
    bench.outgoing.quiesce_by_wire(m.QuiesceByWire(TOKEN, D0, clean=True))
    assert bench.sent()[2:] == [(FAR, WireQuiesced(TOKEN, True))]


def test_ranks_with_one_agent_between_them_are_out_of_reach(bench: Bench) -> None:
    bench.connect((Endpoint(AgentId("new"), b"", PLACE, PORT),) * 2)
    assert bench.turn() == [m.PairFailed(D0, AgentId("new"), "two of its ranks have one agent")]


@pytest.mark.parametrize(
    ("kv", "what"),
    [
        (plain_kv(LAYERS + 1, BLOCK_BYTES, KV_HEADS), "num_layers differs: 2 and 3"),
        (plain_kv(LAYERS, BLOCK_BYTES, KV_HEADS // 2), "kv_heads differ"),
        (KVSpec(dtype="float32", block_size=1, head_dim=1, groups=()), "differ"),
    ],
)
def test_a_peer_whose_kv_can_never_be_ours_is_out_of_reach_and_the_field_is_named(bench: Bench, kv: KVSpec, what: str) -> None:
    bench.connect((Endpoint(AgentId("new"), b"", PLACE, PORT), ENDPOINTS[1]), kv)
    (failed,) = bench.turn()
    assert isinstance(failed, m.PairFailed) and what in failed.reason and failed.for_good


def test_a_rank_whose_heads_others_write_writes_nothing_and_says_so() -> None:
    """Two KV heads on four ranks: of the two that have a head, the first writes it to the only rank of the peer."""
    kv = plain_kv(LAYERS, BLOCK_BYTES, 2)
    bench = Bench.__new__(Bench)
    bench.events, bench.agents, bench.now = [], [], 0.0
    sources = InPlace(Share(kv, rank=1, num_ranks=4), PLACE)
    bench.outgoing = Outgoing(sources, bench._make, bench.events.append, lambda: 0.0)  # type: ignore[arg-type, return-value]
    bench.connect(ENDPOINTS[:1], kv)
    assert bench.turn() == [m.PairConnected(D0, FAR)]
    bench.begin()
    bench.outgoing.push_blocks(WRITE)
    assert bench.turn() == [m.HandleDone(TOKEN, BLOCKS, 0)]
    bench.outgoing.finish(m.FinishPush(TOKEN, FIRST))
    assert bench.turn() == [m.PushEnded(TOKEN, True, True, 0, None, None)]
    assert bench.sent() == []


def test_staged_blocks_are_brought_for_each_rank_as_there_is_room() -> None:
    """Room for the blocks of one rank's part at a time."""
    pool, staged = np.arange(LAYERS * NUM_BLOCKS), np.full(LAYERS * len(BLOCKS), -1)
    copies = LateCopies(pool, staged, KV, patience=0)
    sources = Staged(Share(KV), PLACE, copies)
    bench = Bench(sources)
    bench.begin()
    bench.outgoing.push_blocks(WRITE)
    bench.turn()
    assert [to for to, _ in bench.sent()[2:]] == [FAR]
    bench.agents[0].done.add(HandleId(2))
    bench.turn()
    bench.turn()
    assert [to for to, _ in bench.sent()[2:]] == [FAR, FARTHER]
    bench.agents[0].done.add(HandleId(3))
    assert bench.turn() == [m.HandleDone(TOKEN, BLOCKS, 2 * PART_BYTES)]
    assert sorted(sources._free) == list(range(LAYERS * len(BLOCKS)))
