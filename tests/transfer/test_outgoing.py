"""The sending side over scripted message orders: pairs, handles, cancels, leases."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from disaggd.ids import AgentId, BlockId, GrantToken, HandleId, Incarnation, NodeName
from disaggd.pulse import Pulse
from disaggd.roles.watchdog import Watchdog
from disaggd.transfer import messages as m
from disaggd.transfer.agent import NoAgent
from disaggd.transfer.layout import KVGroup, KVSpec, PoolPlace
from disaggd.transfer.notification import Connect, FirstToken, Piece, WireQuiesced
from disaggd.transfer.outgoing import PUSH_TIMEOUT_S, Outgoing
from disaggd.transfer.pool import Pool
from disaggd.transfer.share import Share
from disaggd.transfer.source import InPlace
from disaggd.transfer.thread import TransferThread
from tests.support.endpoints import endpoint, span
from tests.support.scripted_agent import ScriptedAgent

D0 = NodeName("d0")
FAR = AgentId("far")
TOKEN = GrantToken(bytes(16))
FIRST = FirstToken(7)
BLOCK_BYTES = 8
POOL = Pool(
    PoolPlace(4096, 4), KVSpec(dtype="float32", block_size=1, head_dim=1, groups=(KVGroup(layers=2, kv_heads=1, head_bytes=BLOCK_BYTES),))
)
BLOCKS = (BlockId(0), BlockId(3))
WRITE = m.PushBlocks(TOKEN, range(0, 2), span(BLOCKS), BLOCKS)
WRITE_BYTES = 2 * 2 * BLOCK_BYTES


class Computing:
    """The `is_ready` of blocks that are computed when the test says so."""

    def __init__(self) -> None:
        self.is_done = False

    def __call__(self) -> bool:
        return self.is_done

    def write(self) -> m.PushBlocks:
        return m.PushBlocks(TOKEN, range(0, 2), span(BLOCKS), BLOCKS, self)


@dataclass
class Bench:
    """An `Outgoing` with scripted agents, in the order of their making, and a scripted clock."""

    agents: list[ScriptedAgent] = field(default_factory=list)
    events: list[m.TransferEvent] = field(default_factory=list)
    now: float = 0.0
    next_is_lost: bool = False
    is_network_down: bool = False
    on_connect: Callable[[], object] = lambda: None

    def __post_init__(self) -> None:
        self.outgoing = Outgoing(InPlace(Share(POOL.kv), POOL.place), self._make, self.events.append, lambda: self.now)  # type: ignore[arg-type, return-value]

    def _make(self) -> ScriptedAgent:
        if self.is_network_down:
            raise NoAgent("no such device")
        self.agents.append(ScriptedAgent(AgentId(f"near{len(self.agents)}"), is_lost=self.next_is_lost, on_connect=self.on_connect))
        return self.agents[-1]

    def connect(self, agent_id: AgentId = FAR, peer: NodeName = D0) -> None:
        self.outgoing.connect(m.ConnectPair(peer, Incarnation("one"), endpoint(agent_id, b"", PoolPlace(0, 4)), POOL.kv))

    def begin(self, agent_id: AgentId = FAR) -> None:
        self.outgoing.begin(m.BeginPush(TOKEN, D0, agent_id, lease_s=5.0))

    def turn(self) -> list[m.TransferEvent]:
        """Poll; the events since the last turn."""
        self.outgoing.poll()
        events, self.events[:] = list(self.events), []
        return events


@pytest.fixture
def bench() -> Bench:
    """Connected to FAR."""
    bench = Bench()
    bench.connect()
    assert bench.turn() == [m.PairConnected(D0, FAR)]
    return bench


def ended(
    clean: bool, finished: bool, kv_bytes: int = 0, first_post_at: float | None = None, last_done_at: float | None = None
) -> m.PushEnded:
    leg = m.Leg(0, 0, range(POOL.kv.groups[0].kv_heads), "direct")
    sent = () if first_post_at is None or last_done_at is None else (m.Sent(leg, kv_bytes, first_post_at, last_done_at),)
    return m.PushEnded(TOKEN, clean, finished, kv_bytes, first_post_at, last_done_at, sent)


def test_connecting_sends_the_remote_agent_its_own_id(bench: Bench) -> None:
    assert bench.agents[0].sent == [Connect(FAR, 0)]


def test_a_peer_is_out_of_reach_while_no_agent_can_be_made(bench: Bench) -> None:
    bench.is_network_down = True
    bench.connect(AgentId("farther"))
    assert bench.turn() == [m.PairFailed(D0, AgentId("farther"), "no such device")]
    bench.is_network_down = False
    bench.connect(AgentId("farther"))
    assert bench.turn() == [m.PairConnected(D0, AgentId("farther"))]


def test_connecting_again_to_the_same_agent_probes_it_again(bench: Bench) -> None:
    bench.connect()
    assert bench.turn() == [m.PairConnected(D0, FAR)]
    assert bench.agents[0].sent == [Connect(FAR, 0)] * 2
    assert len(bench.agents) == 1


def test_connecting_to_an_unreachable_agent_fails_and_leaves_none_behind() -> None:
    bench = Bench(next_is_lost=True)
    bench.connect()
    assert bench.turn() == [m.PairFailed(D0, FAR, "gone")]
    assert bench.agents[0].is_destroyed and bench.agents[0].port.is_released


class SlowConnection:
    """A peer of which TCP hears nothing until the test says so."""

    def __init__(self, bench: Bench, peer: NodeName = D0) -> None:
        self._answered = threading.Event()
        bench.on_connect = lambda: self._answered.wait(10)
        bench.connect(AgentId("silent"), peer)
        bench.on_connect = lambda: None
        [self._connecting] = bench.outgoing._connections._under_way

    def answer(self) -> None:
        self._answered.set()
        self._connecting.wait()


def test_a_peer_that_nothing_is_heard_of_holds_nobody_up(bench: Bench) -> None:
    slow = SlowConnection(bench)
    other = NodeName("d1")
    bench.connect(FAR, other)
    assert bench.turn() == [m.PairConnected(other, FAR)]
    bench.outgoing.begin(m.BeginPush(TOKEN, other, FAR, lease_s=5.0))
    bench.outgoing.push_blocks(WRITE)
    bench.agents[-1].done.add(HandleId(1))
    assert bench.turn() == [m.HandleDone(TOKEN, BLOCKS, WRITE_BYTES)]
    slow.answer()
    assert bench.turn() == [m.PairConnected(D0, AgentId("silent"))]
    assert bench.agents[1].sent == [Connect(AgentId("silent"), 0)]


def test_a_peer_that_is_out_of_reach_after_a_while_fails_and_leaves_no_agent_behind(bench: Bench) -> None:
    slow = SlowConnection(bench)
    assert bench.turn() == []
    bench.agents[1].is_lost = True
    slow.answer()
    assert bench.turn() == [m.PairFailed(D0, AgentId("silent"), "gone")]
    assert bench.agents[1].is_destroyed and bench.agents[1].port.is_released


def test_who_is_being_connected_to_is_not_connected_to_twice(bench: Bench) -> None:
    slow = SlowConnection(bench)
    bench.connect(AgentId("silent"))
    slow.answer()
    assert bench.turn() == [m.PairConnected(D0, AgentId("silent"))]
    assert len(bench.agents) == 2


def test_an_agent_that_is_being_connected_is_destroyed_when_it_can_be(bench: Bench) -> None:
    """Its peer has another agent by now."""
    slow = SlowConnection(bench)
    bench.connect(FAR)
    assert bench.turn() == [m.PairConnected(D0, FAR)]
    assert not bench.agents[1].is_destroyed and not bench.agents[1].port.is_released
    slow.answer()
    assert bench.turn() == []
    assert bench.agents[1].is_destroyed and bench.agents[1].port.is_released and not bench.agents[2].is_destroyed


def test_at_the_end_no_agent_is_left_that_is_being_connected(bench: Bench) -> None:
    slow = SlowConnection(bench)
    threading.Timer(0.1, slow.answer).start()
    bench.outgoing.close_all()
    assert all(agent.is_destroyed and agent.port.is_released for agent in bench.agents) and bench.outgoing.num_agents == 0


def test_the_end_waits_for_no_peer_that_nothing_is_heard_of_for_long(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disaggd.transfer.connecting.CLOSE_TIMEOUT_S", 0.01)
    slow = SlowConnection(bench, NodeName("d1"))
    bench.outgoing.close_all()
    assert [agent.is_destroyed for agent in bench.agents] == [True, False], "NIXL is in a call of the other"
    slow.answer()


def test_a_connection_that_hangs_ends_its_node(bench: Bench) -> None:
    """While the transfer thread gets on; its agent's peer is gone meanwhile."""
    thread: Any = object.__new__(TransferThread)
    thread.pulse, thread._outgoing = Pulse(), bench.outgoing
    ended: list[str] = []
    dog = Watchdog(thread.pulses, 3.0, lambda name, seconds: None, ended.append)
    slow = SlowConnection(bench)

    def look() -> None:
        thread.pulse.beat()
        assert bench.turn() == []
        dog.look()

    look()
    bench.outgoing.close(D0)
    look()
    look()
    assert not ended
    look()
    assert ended == ["connecting"]
    slow.answer()
    assert bench.turn() == []
    look()
    assert ended == ["connecting"]


@pytest.mark.parametrize(
    "place", [PoolPlace(0, 0), PoolPlace(-8, 4), PoolPlace(0, -4), PoolPlace(2**63 - 1, 4), PoolPlace(0, 2**30), PoolPlace(0, 2**63 - 1)]
)
def test_a_place_where_no_pool_can_lie_is_out_of_reach(bench: Bench, place: PoolPlace) -> None:
    """Whatever numbers came over the wire: reckoning with them must not end the thread."""
    bench.outgoing.connect(m.ConnectPair(D0, Incarnation("one"), endpoint(AgentId("farther"), b"", place), POOL.kv))
    assert bench.turn() == [m.PairFailed(D0, AgentId("farther"), f"no pool lies at {place}")]
    bench.connect()
    assert bench.turn() == [m.PairConnected(D0, FAR)]


def test_pieces_are_numbered_and_the_first_token_does_not_wait_for_the_handles(bench: Bench) -> None:
    bench.begin()
    bench.outgoing.push_blocks(WRITE)
    bench.outgoing.push_blocks(WRITE)
    bench.outgoing.finish(m.FinishPush(TOKEN, FIRST))
    assert bench.agents[0].sent[1:] == [
        Piece(TOKEN, 0, 0, WRITE_BYTES),
        Piece(TOKEN, 0, 1, WRITE_BYTES),
        Piece(TOKEN, 0, 2, 0, total=3, first=FIRST),
    ]
    assert bench.turn() == [], "both handles are in flight"


def test_push_ends_with_its_last_handle(bench: Bench) -> None:
    bench.now = 1.0
    bench.begin()
    bench.outgoing.push_blocks(WRITE)
    bench.outgoing.finish(m.FinishPush(TOKEN, FIRST))
    bench.agents[0].done.add(HandleId(1))
    bench.now = 2.0
    assert bench.turn() == [m.HandleDone(TOKEN, BLOCKS, WRITE_BYTES), ended(True, True, WRITE_BYTES, 1.0, 2.0)]
    assert not bench.outgoing.is_in_flight


def test_cancelled_push_gives_references_back_only_when_handles_end(bench: Bench) -> None:
    bench.begin()
    bench.outgoing.push_blocks(WRITE)
    bench.outgoing.cancel(TOKEN)
    assert bench.turn() == []
    bench.outgoing.push_blocks(WRITE)
    assert bench.turn() == [m.HandleDone(TOKEN, BLOCKS, 0)], "the dropped one's come back at once"
    bench.outgoing.finish(m.FinishPush(TOKEN, FIRST))
    assert len(bench.agents[0].sent) == 2, "nothing more is posted or sent"
    bench.agents[0].done.add(HandleId(1))
    assert bench.turn() == [m.HandleDone(TOKEN, BLOCKS, WRITE_BYTES), ended(True, False, WRITE_BYTES, 0.0, 0.0)]


def test_push_cancelled_before_anything_was_posted_ends_clean_at_once(bench: Bench) -> None:
    bench.begin()
    bench.outgoing.cancel(TOKEN)
    assert bench.events == [ended(True, False)]


def test_cancel_of_an_unknown_push_is_ignored(bench: Bench) -> None:
    bench.outgoing.cancel(TOKEN)
    assert bench.turn() == []


def test_lost_pair_ends_every_handle_of_it_at_once(bench: Bench) -> None:
    bench.begin()
    bench.outgoing.push_blocks(WRITE)
    bench.outgoing.push_blocks(WRITE)
    bench.agents[0].is_lost = True
    assert bench.turn() == [
        m.HandleDone(TOKEN, BLOCKS, 0),
        m.HandleDone(TOKEN, BLOCKS, 0),
        ended(False, False, first_post_at=0.0),
        m.PairFailed(D0, FAR, "gone"),
    ]
    assert bench.agents[0].is_destroyed


def test_write_that_cannot_be_posted_ends_unclean(bench: Bench) -> None:
    bench.begin()
    bench.agents[0].is_lost = True
    bench.outgoing.push_blocks(WRITE)
    assert bench.turn() == [m.HandleDone(TOKEN, BLOCKS, 0), ended(False, False, first_post_at=0.0), m.PairFailed(D0, FAR, "gone")]


def test_push_whose_handles_were_all_done_is_clean_though_its_pair_is_lost(bench: Bench) -> None:
    bench.begin()
    bench.outgoing.push_blocks(WRITE)
    bench.agents[0].done.add(HandleId(1))
    bench.turn()
    bench.agents[0].is_lost = True
    bench.outgoing.finish(m.FinishPush(TOKEN, FIRST))
    (end, failed) = bench.turn()
    assert isinstance(end, m.PushEnded) and end.clean
    assert failed == m.PairFailed(D0, FAR, "gone")


def test_push_to_a_lost_or_other_agent_ends_at_once(bench: Bench) -> None:
    bench.begin(AgentId("not the one connected to"))
    bench.outgoing.push_blocks(WRITE)
    bench.outgoing.finish(m.FinishPush(TOKEN, FIRST))
    assert bench.turn() == [ended(True, False), m.HandleDone(TOKEN, BLOCKS, 0)]


def test_connecting_to_a_new_agent_ends_what_was_pushed_to_the_old_one(bench: Bench) -> None:
    bench.begin()
    bench.outgoing.push_blocks(WRITE)
    bench.connect(AgentId("rebuilt"))
    assert bench.turn() == [
        m.HandleDone(TOKEN, BLOCKS, 0),
        ended(False, False, first_post_at=0.0),
        m.PairConnected(D0, AgentId("rebuilt")),
    ]
    assert [agent.is_destroyed for agent in bench.agents] == [True, False]


def test_no_handle_is_posted_after_the_lease(bench: Bench) -> None:
    bench.begin()
    bench.outgoing.push_blocks(WRITE)
    bench.now = 5.0
    bench.outgoing.push_blocks(WRITE)
    assert len(bench.agents[0].sent) == 2
    assert bench.turn() == [m.HandleDone(TOKEN, BLOCKS, 0)]
    bench.agents[0].done.add(HandleId(1))
    assert bench.turn() == [m.HandleDone(TOKEN, BLOCKS, WRITE_BYTES), ended(True, False, WRITE_BYTES, 0.0, 5.0)]


def test_a_lease_that_runs_out_between_preparing_and_posting_posts_nothing(bench: Bench) -> None:
    """A process that was stopped goes on wherever it was: the last thing before the post is to look at the clock."""
    bench.begin()

    def sleep() -> None:
        bench.now += 5.0

    bench.agents[0].on_prepare = sleep
    bench.outgoing.push_blocks(WRITE)
    assert bench.agents[0].sent == [Connect(FAR, 0)]
    assert bench.turn() == [m.HandleDone(TOKEN, BLOCKS, 0), ended(True, False)]


def test_a_renewal_that_is_read_after_the_lease_does_not_revive_it(bench: Bench) -> None:
    bench.begin()
    bench.now = 5.0
    bench.outgoing.renew(TOKEN)
    bench.outgoing.push_blocks(WRITE)
    assert bench.agents[0].sent == [Connect(FAR, 0)]
    assert bench.turn() == [m.HandleDone(TOKEN, BLOCKS, 0), ended(True, False)]


def test_a_push_is_over_when_what_its_last_piece_is_behind_has_ended(bench: Bench) -> None:
    """Else nobody would renew its lease while others' bytes hold its last piece up."""
    other = GrantToken(b"another".ljust(16))
    bench.begin()
    bench.outgoing.push_blocks(WRITE)
    bench.outgoing.begin(m.BeginPush(other, D0, FAR, lease_s=5.0))
    bench.outgoing.push_blocks(m.PushBlocks(other, range(0, 2), span(BLOCKS), BLOCKS))
    bench.outgoing.finish(m.FinishPush(TOKEN, FIRST))
    bench.outgoing.push_blocks(m.PushBlocks(other, range(0, 1), span(BLOCKS), BLOCKS))
    bench.agents[0].done.add(HandleId(1))
    assert bench.turn() == [m.HandleDone(TOKEN, BLOCKS, WRITE_BYTES)]
    bench.agents[0].done.add(HandleId(2))
    assert bench.turn() == [m.HandleDone(other, BLOCKS, WRITE_BYTES), ended(True, True, WRITE_BYTES, 0.0, 0.0)]


def test_a_last_piece_that_is_behind_others_bytes_is_lost_with_its_pair(bench: Bench) -> None:
    other = GrantToken(b"another".ljust(16))
    bench.outgoing.begin(m.BeginPush(other, D0, FAR, lease_s=5.0))
    bench.outgoing.push_blocks(m.PushBlocks(other, range(0, 2), span(BLOCKS), BLOCKS))
    bench.begin()
    bench.outgoing.finish(m.FinishPush(TOKEN, FIRST))
    assert bench.turn() == []
    bench.outgoing.close(D0)
    assert ended(True, False) in bench.turn(), "what landed of it may be used again, but it has not landed whole"


def test_lease_that_runs_out_while_nothing_is_in_flight_ends_the_push(bench: Bench) -> None:
    bench.begin()
    bench.now = 4.0
    bench.outgoing.renew(TOKEN)
    bench.now = 8.9
    assert bench.turn() == []
    bench.now = 9.0
    assert bench.turn() == [ended(True, False)]


def test_target_outside_the_peers_pool_is_never_written(bench: Bench) -> None:
    bench.begin()
    bench.outgoing.push_blocks(m.PushBlocks(TOKEN, range(0, 2), span(BLOCKS), (BlockId(0), BlockId(4))))
    assert bench.turn() == [m.HandleDone(TOKEN, BLOCKS, 0), ended(True, False)]
    assert bench.agents[0].sent == [Connect(FAR, 0)]


def test_quiesce_by_wire_goes_to_the_pairs_agent_and_survives_its_loss(bench: Bench) -> None:
    bench.outgoing.quiesce_by_wire(m.QuiesceByWire(TOKEN, D0, True))
    assert bench.agents[0].sent[1:] == [WireQuiesced(TOKEN, True)]
    bench.agents[0].is_lost = True
    bench.outgoing.quiesce_by_wire(m.QuiesceByWire(TOKEN, D0, True))
    bench.outgoing.quiesce_by_wire(m.QuiesceByWire(TOKEN, D0, True))
    assert bench.turn() == [m.PairFailed(D0, FAR, "gone")], "once"


def test_closed_pair_ends_its_pushes_without_a_failure(bench: Bench) -> None:
    bench.begin()
    bench.outgoing.push_blocks(WRITE)
    bench.outgoing.close(D0)
    assert bench.turn() == [m.HandleDone(TOKEN, BLOCKS, 0), ended(False, False, first_post_at=0.0)]
    assert bench.outgoing.num_agents == 0


# ── blocks that are not computed yet ─────────────────────────────────────────────────────────────────────────────────


def test_blocks_are_written_once_they_are_computed(bench: Bench) -> None:
    computing = Computing()
    bench.begin()
    bench.outgoing.push_blocks(computing.write())
    assert bench.turn() == []
    assert bench.agents[0].sent == [Connect(FAR, 0)]
    assert bench.outgoing.is_waiting and not bench.outgoing.is_in_flight
    computing.is_done = True
    assert bench.turn() == []
    assert bench.agents[0].sent[1:] == [Piece(TOKEN, 0, 0, WRITE_BYTES)]
    assert bench.outgoing.is_in_flight and not bench.outgoing.is_waiting


def test_what_a_push_is_told_after_uncomputed_blocks_waits_behind_them(bench: Bench) -> None:
    first, second = Computing(), Computing()
    bench.begin()
    bench.outgoing.push_blocks(WRITE)
    bench.outgoing.push_blocks(first.write())
    bench.outgoing.push_blocks(second.write())
    bench.outgoing.push_blocks(WRITE)
    bench.outgoing.finish(m.FinishPush(TOKEN, FIRST))
    second.is_done = True
    assert bench.turn() == []
    assert bench.agents[0].sent[1:] == [Piece(TOKEN, 0, 0, WRITE_BYTES)]
    first.is_done = True
    bench.turn()
    assert bench.agents[0].sent[2:] == [
        Piece(TOKEN, 0, 1, WRITE_BYTES),
        Piece(TOKEN, 0, 2, WRITE_BYTES),
        Piece(TOKEN, 0, 3, WRITE_BYTES),
        Piece(TOKEN, 0, 4, 0, total=5, first=FIRST),
    ]
    bench.agents[0].done.update(HandleId(i) for i in (1, 2, 3, 4))
    assert bench.turn() == [m.HandleDone(TOKEN, BLOCKS, WRITE_BYTES)] * 4 + [ended(True, True, 4 * WRITE_BYTES, 0.0, 0.0)]


def test_pushes_do_not_wait_for_each_other(bench: Bench) -> None:
    other = GrantToken(b"another".ljust(16))
    bench.begin()
    bench.outgoing.begin(m.BeginPush(other, D0, FAR, lease_s=5.0))
    bench.outgoing.push_blocks(Computing().write())
    bench.outgoing.push_blocks(m.PushBlocks(other, range(0, 2), span(BLOCKS), BLOCKS))
    assert bench.agents[0].sent[1:] == [Piece(other, 0, 0, WRITE_BYTES)]


def test_first_token_waits_even_if_it_is_the_last_command_ever(bench: Bench) -> None:
    computing = Computing()
    bench.begin()
    bench.outgoing.push_blocks(computing.write())
    bench.outgoing.finish(m.FinishPush(TOKEN, FIRST))
    assert bench.turn() == []
    computing.is_done = True
    bench.turn()
    assert bench.agents[0].sent[1:] == [Piece(TOKEN, 0, 0, WRITE_BYTES), Piece(TOKEN, 0, 1, 0, total=2, first=FIRST)]


def test_cancelled_push_gives_up_what_is_not_computed_at_once(bench: Bench) -> None:
    """Nothing of it was posted, so nobody reads the blocks."""
    computing = Computing()
    bench.begin()
    bench.outgoing.push_blocks(computing.write())
    bench.outgoing.push_blocks(WRITE)
    bench.outgoing.finish(m.FinishPush(TOKEN, FIRST))
    bench.outgoing.cancel(TOKEN)
    assert bench.turn() == [m.HandleDone(TOKEN, BLOCKS, 0)] * 2 + [ended(True, False)]
    computing.is_done = True
    assert bench.turn() == []
    assert bench.agents[0].sent == [Connect(FAR, 0)]


def test_cancelled_push_polls_out_what_was_posted_and_gives_up_the_rest(bench: Bench) -> None:
    bench.begin()
    bench.outgoing.push_blocks(WRITE)
    bench.outgoing.push_blocks(Computing().write())
    bench.outgoing.cancel(TOKEN)
    assert bench.turn() == [m.HandleDone(TOKEN, BLOCKS, 0)]
    bench.agents[0].done.add(HandleId(1))
    assert bench.turn() == [m.HandleDone(TOKEN, BLOCKS, WRITE_BYTES), ended(True, False, WRITE_BYTES, 0.0, 0.0)]


def test_lease_that_runs_out_before_the_blocks_are_computed_ends_the_push(bench: Bench) -> None:
    """Also when they are computed in that very moment, and though `FinishPush` has come."""
    computing = Computing()
    bench.begin()
    bench.outgoing.push_blocks(computing.write())
    bench.outgoing.finish(m.FinishPush(TOKEN, FIRST))
    bench.now = 5.0
    computing.is_done = True
    assert bench.turn() == [m.HandleDone(TOKEN, BLOCKS, 0), ended(True, False)]
    assert bench.agents[0].sent == [Connect(FAR, 0)]


def test_renewed_lease_lets_blocks_be_computed_for_longer(bench: Bench) -> None:
    computing = Computing()
    bench.begin()
    bench.outgoing.push_blocks(computing.write())
    bench.now = 4.0
    bench.outgoing.renew(TOKEN)
    bench.now = 8.0
    computing.is_done = True
    bench.turn()
    assert bench.agents[0].sent[1:] == [Piece(TOKEN, 0, 0, WRITE_BYTES)]


def test_lost_pair_gives_up_what_is_not_computed(bench: Bench) -> None:
    bench.begin()
    bench.outgoing.push_blocks(WRITE)
    bench.outgoing.push_blocks(Computing().write())
    bench.agents[0].is_lost = True
    assert bench.turn() == [
        m.HandleDone(TOKEN, BLOCKS, 0),
        m.HandleDone(TOKEN, BLOCKS, 0),
        ended(False, False, first_post_at=0.0),
        m.PairFailed(D0, FAR, "gone"),
    ]


def test_pair_that_is_lost_by_the_first_of_two_computed_writes_ends_both(bench: Bench) -> None:
    computing = Computing()
    bench.begin()
    bench.outgoing.push_blocks(computing.write())
    bench.outgoing.push_blocks(WRITE)
    computing.is_done = bench.agents[0].is_lost = True
    assert bench.turn() == [
        m.HandleDone(TOKEN, BLOCKS, 0),
        m.HandleDone(TOKEN, BLOCKS, 0),
        ended(False, False, first_post_at=0.0),
        m.PairFailed(D0, FAR, "gone"),
    ]


def test_closed_pair_gives_up_what_is_not_computed(bench: Bench) -> None:
    bench.begin()
    bench.outgoing.push_blocks(Computing().write())
    bench.outgoing.close(D0)
    assert bench.turn() == [m.HandleDone(TOKEN, BLOCKS, 0), ended(True, False)]


def test_target_outside_the_peers_pool_gives_up_what_waits_before_it(bench: Bench) -> None:
    bench.begin()
    bench.outgoing.push_blocks(Computing().write())
    bench.outgoing.push_blocks(m.PushBlocks(TOKEN, range(0, 2), span(BLOCKS), (BlockId(0), BlockId(4))))
    assert bench.turn() == [m.HandleDone(TOKEN, BLOCKS, 0)] * 2 + [ended(True, False)]


# ── a peer that takes nothing ──


def pass_time(bench: Bench, seconds: float, step_s: float = 0.5) -> list[m.TransferEvent]:
    """Turn after turn, the lease renewed all the while; what was said."""
    events: list[m.TransferEvent] = []
    for _ in range(round(seconds / step_s)):
        bench.now += step_s
        bench.outgoing.renew(TOKEN)
        events += bench.turn()
    return events


def test_a_peer_of_whose_writes_none_ends_is_lost_though_the_lease_is_renewed(bench: Bench) -> None:
    bench.begin()
    bench.outgoing.push_blocks(WRITE)
    assert pass_time(bench, PUSH_TIMEOUT_S - 0.5) == []
    failed = [event for event in pass_time(bench, 1.0) if isinstance(event, m.PairFailed)]
    assert failed == [m.PairFailed(D0, FAR, "no write to it has ended for 30 s")]
    assert bench.agents[0].is_destroyed and not bench.outgoing.is_in_flight


def test_a_peer_is_kept_as_long_as_now_and_then_a_write_ends(bench: Bench) -> None:
    bench.begin()
    for count in range(4):
        bench.outgoing.push_blocks(WRITE)
        bench.outgoing.push_blocks(WRITE)
        pass_time(bench, PUSH_TIMEOUT_S - 1)
        bench.agents[0].done.add(HandleId(1 + 2 * count))
        bench.turn()
        bench.agents[0].done.add(HandleId(2 + 2 * count))
        bench.turn()
    assert not bench.agents[0].is_destroyed
    pass_time(bench, 2 * PUSH_TIMEOUT_S)
    assert not bench.agents[0].is_destroyed, "nothing is in flight: nothing is waited for"


def test_time_in_which_this_process_was_stopped_is_not_the_peers(bench: Bench) -> None:
    bench.begin()
    bench.outgoing.push_blocks(WRITE)
    pass_time(bench, 10 * PUSH_TIMEOUT_S, step_s=10 * PUSH_TIMEOUT_S)
    assert not bench.agents[0].is_destroyed
