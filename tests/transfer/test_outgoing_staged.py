"""Pushes through staging memory, in any order of copies, writes and losses: what leaves is what was computed, and no memory stays taken.

The machine plays the GPU, which computes and copies late; NIXL, which reads what it was told to write at any moment until it says
DONE; and the compute thread, which uses a block for something else as soon as no push holds it.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from disaggd.ids import AgentId, BlockId, GrantToken, HandleId, Incarnation, NodeName
from disaggd.transfer import messages as m
from disaggd.transfer.layout import KVGroup, KVSpec, PoolPlace
from disaggd.transfer.notification import FirstToken, Piece
from disaggd.transfer.outgoing import Outgoing
from disaggd.transfer.pool import Indices, Pool
from disaggd.transfer.share import Share
from disaggd.transfer.source import Staged
from tests.support.copies import LateCopies
from tests.support.endpoints import endpoint, span
from tests.support.scripted_agent import ScriptedAgent

LAYERS, BLOCKS, STAGED = 2, 8, 3
KV = KVSpec(dtype="float32", block_size=1, head_dim=1, groups=(KVGroup(layers=LAYERS, kv_heads=1, head_bytes=8),))
POOL = Pool(PoolPlace(4096, BLOCKS), KV)
PEERS = [NodeName("d0"), NodeName("d1")]
FIRST = FirstToken(7)
LEASE_S = 5.0


@dataclass
class ReadingAgent(ScriptedAgent):
    """Sees what its writes read."""

    memory: np.ndarray = field(default_factory=lambda: np.zeros(0))
    prepared: Indices = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    written: dict[HandleId, tuple[Indices, np.ndarray]] = field(default_factory=dict)
    """Of each write that is in flight, where it reads, and what was there when it was posted."""

    def prepare(self, agent_id: AgentId, sources: Indices, targets: Indices, message: bytes) -> HandleId:
        handle = super().prepare(agent_id, sources, targets, message)
        self.prepared = sources
        return handle

    def post(self, handle: HandleId) -> None:
        super().post(handle)
        self.written[handle] = (self.prepared, self.memory[self.prepared].copy())

    def poll(self, handle: HandleId) -> bool:
        if not super().poll(handle):
            return False
        del self.written[handle]
        return True


class Computing:
    def __init__(self) -> None:
        self.is_done = False

    def __call__(self) -> bool:
        return self.is_done


@dataclass
class Pushing:
    """One push as the compute thread sees it."""

    token: GrantToken
    peer: NodeName
    is_over: bool = False
    is_finished: bool = False
    held: Counter[tuple[BlockId, ...]] = field(default_factory=Counter)


class StagedPushes(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.now = 0.0
        self.pool = np.zeros(LAYERS * BLOCKS, dtype=np.int64)
        self.staged = np.full(LAYERS * STAGED, -1, dtype=np.int64)
        self.copies = LateCopies(self.pool, self.staged, KV)
        self.source = Staged(Share(POOL.kv), POOL.place, self.copies)
        self.agents: list[ReadingAgent] = []
        self.events: list[m.TransferEvent] = []
        self.outgoing = Outgoing(self.source, self._make, self.events.append, lambda: self.now)  # type: ignore[arg-type, return-value]
        self.pushes: list[Pushing] = []
        self.computing: list[tuple[Computing, Callable[[], None]]] = []
        self.references: Counter[BlockId] = Counter()
        self.connected: dict[NodeName, AgentId] = {}
        self.num_values = 0
        for peer in PEERS:
            self.connect(peer)

    def _make(self) -> ReadingAgent:
        self.agents.append(ReadingAgent(AgentId(f"near{len(self.agents)}"), memory=self.staged))
        return self.agents[-1]

    def connect(self, peer: NodeName) -> None:
        self.connected[peer] = AgentId(f"{peer}-{len(self.agents)}")
        self.outgoing.connect(m.ConnectPair(peer, Incarnation("one"), endpoint(self.connected[peer], b"", PoolPlace(0, 99)), POOL.kv))

    def heed(self) -> None:
        """What the compute thread makes of the events."""
        for event in self.events:
            match event:
                case m.HandleDone(token, source, _):
                    push = self.push_of(token)
                    assert push.held[source] > 0, "references come back once"
                    push.held[source] -= 1
                    self.references.subtract(source)
                case m.PushEnded(token=token, finished=finished):
                    push = self.push_of(token)
                    assert not push.is_over and not +push.held, "the end comes after every handle's"
                    assert not finished or push.is_finished
                    push.is_over = True
                case m.PairFailed(peer):
                    self.connected.pop(peer, None)
        self.events.clear()

    def push_of(self, token: GrantToken) -> Pushing:
        return next(push for push in self.pushes if push.token == token)

    def live(self) -> list[Pushing]:
        return [push for push in self.pushes if not push.is_over]

    # ── the compute thread ──

    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        peer = data.draw(st.sampled_from(PEERS))
        push = Pushing(GrantToken(len(self.pushes).to_bytes(16, "big")), peer)
        self.pushes.append(push)
        self.outgoing.begin(m.BeginPush(push.token, peer, self.connected.get(peer, AgentId("none")), LEASE_S))
        self.heed()

    @precondition(lambda self: self.live())
    @rule(data=st.data(), layer=st.integers(0, LAYERS - 1), count=st.integers(1, LAYERS), is_computed=st.booleans())
    def push_blocks(self, data: st.DataObject, layer: int, count: int, is_computed: bool) -> None:
        """Into blocks that nobody holds values come late; those that somebody holds have them."""
        push = data.draw(st.sampled_from(self.live()))
        if push.is_finished:
            return
        layers = range(layer, min(LAYERS, layer + count))
        wanted = data.draw(st.lists(st.integers(0, BLOCKS - 1), min_size=1, max_size=LAYERS * STAGED // len(layers), unique=True))
        free = [block for block in map(BlockId, wanted) if not self.references[block]]
        if not free:
            return
        source = tuple(free)
        indices = POOL.indices(layers, source)
        self.pool[indices] = -2  # what somebody left there
        values = np.arange(len(indices)) + self.num_values + 1
        self.num_values += len(indices)
        computing = Computing()

        def compute() -> None:
            self.pool[indices] = values
            computing.is_done = True

        self.computing.append((computing, compute))
        if is_computed:
            self.compute()
        push.held[source] += 1
        self.references.update(source)
        self.outgoing.push_blocks(m.PushBlocks(push.token, layers, span(source), source, computing))
        self.heed()

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        push = data.draw(st.sampled_from(self.live()))
        if not push.is_finished:
            push.is_finished = True
            self.outgoing.finish(m.FinishPush(push.token, FIRST))
            self.heed()

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.outgoing.cancel(data.draw(st.sampled_from(self.live())).token)
        self.heed()

    @rule(seconds=st.sampled_from([1.0, LEASE_S]), renews=st.booleans())
    def time_passes(self, seconds: float, renews: bool) -> None:
        self.now += seconds
        if renews:
            self.renew()

    def renew(self) -> None:
        for push in self.live():
            self.outgoing.renew(push.token)

    # ── the GPU and NIXL ──

    @precondition(lambda self: self.computing)
    @rule()
    def compute(self) -> None:
        """In order, as on a stream."""
        while self.computing:
            _, make = self.computing.pop(0)
            make()

    @rule()
    def copy(self) -> None:
        self.copies.make()

    @precondition(lambda self: any(agent.written for agent in self.agents))
    @rule(data=st.data())
    def end_a_write(self, data: st.DataObject) -> None:
        in_flight = [(agent, handle) for agent in self.agents if not agent.is_destroyed for handle in agent.written]
        if in_flight:
            agent, handle = data.draw(st.sampled_from(in_flight))
            agent.done.add(handle)

    @rule()
    def poll(self) -> None:
        self.outgoing.poll()
        self.heed()

    @rule(data=st.data())
    def lose_a_peer(self, data: st.DataObject) -> None:
        for agent in self.agents:
            if not agent.is_destroyed and data.draw(st.booleans()):
                agent.is_lost = True
        self.poll()

    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        self.connect(data.draw(st.sampled_from(PEERS)))
        self.heed()

    # ── what must hold ──

    @invariant()
    def what_is_in_flight_is_what_was_computed(self) -> None:
        taken: list[int] = []
        for agent in self.agents:
            for indices, posted in agent.written.values() if not agent.is_destroyed else ():
                assert (posted > 0).all(), "written before it was computed or copied"
                assert (self.staged[indices] == posted).all(), "overwritten while NIXL reads it"
                taken += indices.tolist()
        assert len(taken) == len(set(taken))
        if hasattr(self, "source"):
            assert not set(taken) & set(self.source._free)

    def teardown(self) -> None:
        """Everything that is late comes: pushes that were finished have their first token out, the others are cancelled."""
        if not hasattr(self, "source"):
            return
        for push in self.live():
            if not push.is_finished:
                self.outgoing.cancel(push.token)
        for _ in range(20 * len(self.pushes) + 20):
            self.renew()
            self.compute()
            self.copies.make(99)
            self.poll()
            for agent in self.agents:
                agent.done.update(agent.written)
        assert not self.live()
        assert not +self.references
        assert sorted(self.source._free) == list(range(LAYERS * STAGED))
        assert not self.outgoing.is_waiting and not self.outgoing.is_in_flight


StagedPushes.TestCase.settings = settings(max_examples=150, stateful_step_count=50)
TestStagedPushes = StagedPushes.TestCase


# ── one order at a time ──


class Bench:
    """Two pushes to one peer, through staging memory of four descriptors of two layers."""

    def __init__(self) -> None:
        pool, staged = np.arange(LAYERS * BLOCKS), np.full(4, -1)
        self.copies = LateCopies(pool, staged, KV)
        self.source = Staged(Share(POOL.kv), POOL.place, self.copies)
        self.agent = ReadingAgent(AgentId("near"), memory=staged)
        self.events: list[m.TransferEvent] = []
        self.now = 0.0
        self.outgoing = Outgoing(self.source, lambda: self.agent, self.events.append, lambda: self.now)  # type: ignore[arg-type, return-value]
        self.outgoing.connect(m.ConnectPair(PEERS[0], Incarnation("one"), endpoint(AgentId("far"), b"", PoolPlace(0, 99)), POOL.kv))
        self.tokens = [GrantToken(bytes(15) + bytes([i])) for i in range(3)]
        for token in self.tokens:
            self.outgoing.begin(m.BeginPush(token, PEERS[0], AgentId("far"), LEASE_S))
        self.turn()

    def push(self, which: int, *blocks: int, is_ready: m.IsReady = m.at_once) -> None:
        ids = tuple(BlockId(block) for block in blocks)
        self.outgoing.push_blocks(m.PushBlocks(self.tokens[which], range(0, 1), span(ids), ids, is_ready))

    def turn(self) -> list[m.TransferEvent]:
        self.outgoing.poll()
        events, self.events[:] = list(self.events), []
        return events

    def pieces(self) -> list[tuple[int, int]]:
        """(push, number) of what was posted."""
        return [(self.tokens.index(piece.token), piece.seq) for piece in self.agent.sent if isinstance(piece, Piece)]

    def end_writes(self) -> None:
        self.agent.done.update(self.agent.written)


def test_a_write_is_posted_when_its_copy_is_made_and_the_first_token_follows_the_last_of_them() -> None:
    bench = Bench()
    bench.push(0, 0)
    bench.push(0, 1)
    bench.outgoing.finish(m.FinishPush(bench.tokens[0], FIRST))
    bench.turn()
    assert bench.pieces() == [] and bench.copies.num_waiting == 2, "both are copied at once"
    assert bench.outgoing.is_waiting
    bench.copies.make()
    bench.turn()
    assert bench.pieces() == [(0, 0)]
    bench.copies.make()
    bench.turn()
    assert bench.pieces() == [(0, 0), (0, 1), (0, 2)]
    bench.end_writes()
    assert [type(event) for event in bench.turn()] == [m.HandleDone, m.HandleDone, m.PushEnded]


def test_nobody_overtakes_a_push_that_wants_for_room() -> None:
    bench = Bench()
    bench.push(0, 0, 1, 2)
    bench.copies.make()
    bench.turn()
    bench.push(1, 3, 4)
    bench.push(2, 5)
    bench.turn()
    assert bench.copies.num_waiting == 0, "there is room for the one of the last, but the second was first"
    bench.end_writes()
    bench.turn()
    assert bench.copies.num_waiting == 2
    bench.copies.make(2)
    bench.turn()
    assert bench.pieces() == [(0, 0), (1, 0), (2, 0)]


def test_a_push_that_waits_for_its_data_takes_no_room_and_holds_nobody_up() -> None:
    bench = Bench()
    bench.push(0, 0, 1, 2, 3, is_ready=Computing())
    bench.push(1, 4, 5, 6, 7)
    bench.copies.make()
    bench.turn()
    assert bench.pieces() == [(1, 0)]


def test_a_lease_that_runs_out_over_want_of_room_ends_the_push() -> None:
    bench = Bench()
    bench.push(0, 0, 1, 2, 3)
    bench.copies.make()
    bench.turn()
    bench.push(1, 4)
    bench.now = LEASE_S - 1
    bench.outgoing.renew(bench.tokens[0])
    bench.now = LEASE_S
    assert m.HandleDone(bench.tokens[1], (BlockId(4),), 0) in bench.turn()
    bench.end_writes()
    assert [type(event) for event in bench.turn()] == [m.HandleDone], "the first is not finished"


def test_what_is_cancelled_while_it_is_copied_gives_its_room_back_at_once() -> None:
    bench = Bench()
    bench.push(0, 0, 1, 2, 3)
    bench.outgoing.cancel(bench.tokens[0])
    ended = bench.turn()
    assert [type(event) for event in ended] == [m.HandleDone, m.PushEnded]
    bench.push(1, 4, 5, 6, 7)
    bench.copies.make()
    bench.turn()
    assert bench.pieces() == [], "that was the copy of the cancelled one"
    bench.copies.make()
    bench.turn()
    ((_, read),) = bench.agent.written.values()
    assert read.tolist() == [4, 5, 6, 7]
