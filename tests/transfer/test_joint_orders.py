"""What the ranks of a node say, in any order between them: what is made of it is said once, when all have said it. Without NIXL."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggd.ids import AgentId, BlockId, GrantToken, Incarnation, NodeName
from disaggd.transfer import messages as m
from disaggd.transfer.joint import JointTransfers
from disaggd.transfer.notification import FirstToken
from disaggd.transfer.thread import TransferStats
from tests.support.clusters import wait_until
from tests.support.endpoints import endpoint, plain_kv, span
from tests.support.scripted_rank import ScriptedRank

P0, D0 = NodeName("p0"), NodeName("d0")
ONE, TWO = Incarnation("one"), Incarnation("two")
TOKEN = GrantToken(bytes(16))
BLOCKS, OTHERS = (BlockId(1), BlockId(2)), (BlockId(3),)
NUM_RANKS = 3


class Bench:
    def __init__(self) -> None:
        self.ranks = [ScriptedRank() for _ in range(NUM_RANKS)]
        self.events: list[m.TransferEvent] = []
        first, *others = [self._maker(rank) for rank in self.ranks]
        self.joint = JointTransfers(first, others, self.events.append)  # type: ignore[arg-type]

    def _maker(self, rank: ScriptedRank) -> Callable[[object], ScriptedRank]:
        return lambda post: rank

    def say(self, rank: int, *events: m.TransferEvent) -> None:
        for event in events:
            self.joint._join(rank, event)

    def all_say(self, *events: m.TransferEvent) -> None:
        for rank in range(NUM_RANKS):
            self.say(rank, *events)

    def heard(self) -> list[m.TransferEvent]:
        events, self.events[:] = list(self.events), []
        return events

    def told(self) -> list[list[m.TransferCommand]]:
        """Each rank's commands since the last time."""
        commands = [list(rank.commands) for rank in self.ranks]
        for rank in self.ranks:
            rank.commands.clear()
        return commands


def own(rank: int, life: str = "one") -> AgentId:
    return AgentId(f"{life}-{rank}")


def opened(rank: int, life: str = "one") -> m.PairOpened:
    return m.PairOpened(P0, Incarnation(life[:3]), endpoint(own(rank, life)))


def whole(life: str = "one") -> m.PairOpened:
    return m.PairOpened(P0, Incarnation(life[:3]), tuple(endpoint(own(rank, life))[0] for rank in range(NUM_RANKS)))


@pytest.fixture
def bench() -> Bench:
    """An agent is open for p0."""
    bench = Bench()
    bench.joint.submit(m.OpenPair(P0, ONE, 1))
    for rank in (2, 0, 1):
        bench.say(rank, opened(rank))
    assert bench.heard() == [whole()]
    assert bench.told() == [[m.OpenPair(P0, ONE, 1)]] * NUM_RANKS
    return bench


def interleaved(data: st.DataObject, bench: Bench, streams: list[list[m.TransferEvent]]) -> None:
    """Each rank says its own in order; between ranks there is none."""
    left = [list(stream) for stream in streams]
    while ranks := [rank for rank, stream in enumerate(left) if stream]:
        rank = data.draw(st.sampled_from(ranks))
        bench.say(rank, left[rank].pop(0))


# ── receiving ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_agent_that_is_open_is_said_again_without_asking_the_ranks(bench: Bench) -> None:
    bench.joint.submit(m.OpenPair(P0, ONE, 1))
    assert bench.heard() == [whole()]
    assert bench.told() == [[]] * NUM_RANKS


def test_an_agent_is_said_when_the_last_rank_has_one_however_often_it_was_asked_for() -> None:
    bench = Bench()
    for _ in range(2):
        bench.joint.submit(m.OpenPair(P0, ONE, 1))
        bench.say(0, opened(0))
        bench.say(1, opened(1))
    assert bench.heard() == []
    bench.say(2, opened(2))
    assert bench.heard() == [whole()]


def test_ranks_are_told_of_their_own_agents(bench: Bench) -> None:
    bench.joint.submit(m.Expect(TOKEN, P0, own(0), 3))
    bench.joint.submit(m.Fence(P0, own(0)))
    assert bench.told() == [[m.Expect(TOKEN, P0, own(rank), 3), m.Fence(P0, own(rank))] for rank in range(NUM_RANKS)]


@given(st.data())
def test_a_fence_and_the_next_agent_are_said_once_and_in_order(data: st.DataObject) -> None:
    bench = Bench()
    bench.joint.submit(m.OpenPair(P0, ONE, 1))
    lives = ("one", "one again")
    streams: list[list[m.TransferEvent]] = [
        [opened(rank, lives[0]), m.Fenced(P0, own(rank, lives[0])), opened(rank, lives[1])] for rank in range(NUM_RANKS)
    ]
    interleaved(data, bench, [stream[:1] for stream in streams])
    bench.joint.submit(m.Fence(P0, own(0)))
    interleaved(data, bench, [stream[1:] for stream in streams])
    assert bench.heard() == [whole(lives[0]), m.Fenced(P0, own(0)), whole(lives[1])]


@given(st.data())
def test_an_incarnation_that_comes_while_some_ranks_have_no_agent_gets_one(data: st.DataObject) -> None:
    """A rank whose network was down has none for the first; what the others had for it never was an agent of the node."""
    bench = Bench()
    bench.joint.submit(m.OpenPair(P0, ONE, 1))
    late = data.draw(st.integers(0, NUM_RANKS - 1))
    for rank in range(NUM_RANKS):
        if rank != late:
            bench.say(rank, opened(rank))
    bench.joint.submit(m.OpenPair(P0, TWO, 1))
    streams: list[list[m.TransferEvent]] = [
        [opened(rank, "two")] if rank == late else [m.Fenced(P0, own(rank)), opened(rank, "two")] for rank in range(NUM_RANKS)
    ]
    interleaved(data, bench, streams)
    assert bench.heard() == [whole("two")]


def test_a_probe_counts_when_every_rank_has_it(bench: Bench) -> None:
    bench.say(0, m.PairProbed(P0, own(0)))
    bench.say(2, m.PairProbed(P0, own(2)), m.PairProbed(P0, own(2)))
    assert bench.heard() == []
    bench.say(1, m.PairProbed(P0, own(1)))
    assert bench.heard() == [m.PairProbed(P0, own(0))]
    bench.all_say(m.PairProbed(P0, own(0)))
    assert bench.heard() == [], "the others' agents have other ids"


def test_a_grant_lands_when_it_has_on_every_rank(bench: Bench) -> None:
    bench.joint.submit(m.Expect(TOKEN, P0, own(0), 3))
    bench.say(1, m.Landed(TOKEN, FirstToken(7), 10, 3))
    bench.say(2, m.Landed(TOKEN, FirstToken(7), 30, 3))
    assert bench.heard() == []
    bench.say(0, m.Landed(TOKEN, FirstToken(7), 20, 3))
    assert bench.heard() == [m.Landed(TOKEN, FirstToken(7), 60, 3)]


def test_a_landing_that_fails_on_one_rank_is_forgotten_by_the_others(bench: Bench) -> None:
    bench.joint.submit(m.Expect(TOKEN, P0, own(0), 3))
    bench.told()
    failed = m.LandingFailed(TOKEN, "twice", 1)
    bench.say(0, m.Landed(TOKEN, FirstToken(7), 10))
    bench.say(1, failed)
    bench.say(2, m.LandingFailed(TOKEN, "too"))
    assert bench.heard() == [failed]
    assert bench.told() == [[m.Forget(TOKEN)], [], [m.Forget(TOKEN)]]


def test_nothing_lands_at_an_agent_that_is_being_fenced(bench: Bench) -> None:
    bench.joint.submit(m.Expect(TOKEN, P0, own(0), 3))
    bench.say(0, m.Landed(TOKEN, FirstToken(7), 10))
    bench.say(1, m.Landed(TOKEN, FirstToken(7), 10))
    bench.joint.submit(m.Fence(P0, own(0)))
    bench.say(0, m.Fenced(P0, own(0)))
    bench.say(2, m.Landed(TOKEN, FirstToken(7), 10))
    assert bench.heard() == []
    bench.joint.submit(m.Expect(GrantToken(b"1" * 16), P0, own(0), 3))
    assert not any(isinstance(command, m.Expect) and command.token != TOKEN for commands in bench.told() for command in commands)


def test_an_agent_that_is_about_to_be_fenced_is_not_said_again(bench: Bench) -> None:
    bench.joint.submit(m.Fence(P0, own(0)))
    bench.joint.submit(m.OpenPair(P0, ONE, 1))
    for rank in range(NUM_RANKS):
        bench.say(rank, m.Fenced(P0, own(rank)), opened(rank, "one again"), opened(rank, "one again"))
    assert bench.heard() == [m.Fenced(P0, own(0)), whole("one again")]


def test_a_fence_of_an_agent_that_is_gone_only_confirms(bench: Bench) -> None:
    bench.joint.submit(m.Fence(P0, AgentId("older")))
    assert bench.heard() == [m.Fenced(P0, AgentId("older"))]
    assert bench.told() == [[]] * NUM_RANKS


@dataclass
class RankAgents:
    """A rank that has agents as `Incoming` does: it gets to its commands in order, and is heard in order, both some time."""

    number: int
    rank: ScriptedRank
    asked: m.OpenPair | None = None
    num_made: int = 0
    said: list[m.TransferEvent] = field(default_factory=list)

    @property
    def agent_id(self) -> AgentId:
        return own(self.number, f"agent {self.num_made}")

    def obey(self) -> None:
        match command := self.rank.commands.pop(0):
            case m.OpenPair():
                if command != self.asked:
                    self._make(command)
                self._announce()
            case m.Fence(agent_id=agent_id) if agent_id == self.agent_id:
                assert self.asked is not None
                self._make(self.asked)
                self._announce()
            case m.Fence(peer, agent_id):
                self.said.append(m.Fenced(peer, agent_id))

    def _make(self, command: m.OpenPair) -> None:
        if self.asked is not None:
            self.said.append(m.Fenced(P0, self.agent_id))
        self.asked, self.num_made = command, self.num_made + 1

    def _announce(self) -> None:
        assert self.asked is not None
        self.said.append(m.PairOpened(P0, self.asked.peer_incarnation, endpoint(self.agent_id)))


@given(st.data(), st.lists(st.sampled_from((ONE, TWO)), min_size=1, max_size=4))
def test_whoever_asks_for_what_agents_and_however_late_ranks_are_one_is_whole_in_the_end(
    data: st.DataObject, asked: list[Incarnation]
) -> None:
    """Two routers need not agree about which start of the peer is its last: one has yet to hear of it."""
    bench = Bench()
    ranks = [RankAgents(number, rank) for number, rank in enumerate(bench.ranks)]
    left = [m.OpenPair(P0, incarnation, 1) for incarnation in asked]
    while steps := [*(["ask"] if left else []), *(r.obey for r in ranks if r.rank.commands), *(r for r in ranks if r.said)]:
        step = data.draw(st.sampled_from(steps))
        if isinstance(step, RankAgents):
            bench.say(step.number, step.said.pop(0))
        elif step == "ask":
            bench.joint.submit(left.pop(0))
        else:
            step()  # type: ignore[operator]
    *_, last = [event for event in bench.heard() if isinstance(event, m.PairOpened)]
    assert [one.agent_id for one in last.endpoints] == [rank.agent_id for rank in ranks]
    assert last.peer_incarnation == asked[-1]


# ── sending ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def writer() -> Bench:
    """Connected to d0."""
    bench = Bench()
    bench.joint.submit(m.ConnectPair(D0, ONE, endpoint(AgentId("far")), plain_kv(1, 8)))
    bench.say(2, m.PairConnected(D0, AgentId("far")))
    bench.say(0, m.PairConnected(D0, AgentId("far")))
    assert bench.heard() == []
    bench.say(1, m.PairConnected(D0, AgentId("far")))
    assert bench.heard() == [m.PairConnected(D0, AgentId("far"))]
    bench.told()
    return bench


def test_a_pair_that_one_rank_loses_is_closed_on_the_others_and_lost_once(writer: Bench) -> None:
    failed = m.PairFailed(D0, AgentId("far"), "gone")
    writer.say(1, failed)
    writer.say(2, failed)
    assert writer.heard() == [failed]
    assert writer.told() == [[m.ClosePair(D0)], [], [m.ClosePair(D0)]]


def test_a_failure_of_a_connection_that_was_replaced_is_nobodys_matter(writer: Bench) -> None:
    writer.joint.submit(m.ConnectPair(D0, ONE, endpoint(AgentId("farther")), plain_kv(1, 8)))
    writer.say(1, m.PairFailed(D0, AgentId("far"), "gone"), m.PairConnected(D0, AgentId("farther")))
    writer.say(0, m.PairConnected(D0, AgentId("farther")))
    writer.say(2, m.PairConnected(D0, AgentId("farther")))
    assert writer.heard() == [m.PairConnected(D0, AgentId("farther"))]


@given(st.data())
def test_references_come_back_when_no_rank_reads_the_blocks_and_the_end_is_last(data: st.DataObject) -> None:
    writer = Bench()
    end = m.PushEnded(TOKEN, True, True, 24, 1.0, 2.0)
    streams: list[list[m.TransferEvent]] = []
    for _ in range(NUM_RANKS):
        handles = data.draw(st.permutations([m.HandleDone(TOKEN, blocks, 8) for blocks in (BLOCKS, BLOCKS, OTHERS)]))
        streams.append([*handles, end])
    interleaved(data, writer, streams)
    *done, last = writer.heard()
    assert last == m.PushEnded(TOKEN, True, True, 3 * 24, 1.0, 2.0)
    assert sorted(done, key=lambda event: len(event.source)) == [  # type: ignore[attr-defined]
        m.HandleDone(TOKEN, OTHERS, 3 * 8),
        m.HandleDone(TOKEN, BLOCKS, 3 * 8),
        m.HandleDone(TOKEN, BLOCKS, 3 * 8),
    ]
    assert not writer.joint._handles and not writer.joint._ends


def test_a_push_is_what_the_worst_of_its_ranks_makes_of_it_and_lasts_from_the_first_to_the_last() -> None:
    writer = Bench()
    first, other = (m.Sent(m.Leg(rank, 0, range(rank, rank + 1), "direct"), 8, 4.0, 6.0) for rank in (1, 2))
    writer.say(1, m.PushEnded(TOKEN, True, True, 8, 5.0, 6.0, (first,)))
    writer.say(0, m.PushEnded(TOKEN, True, True, 0, None, None))
    assert writer.told() == [[]] * NUM_RANKS
    writer.say(2, m.PushEnded(TOKEN, False, False, 8, 4.0, 4.5, (other,)))
    assert writer.heard() == [m.PushEnded(TOKEN, False, False, 16, 4.0, 6.0, (first, other))]


def test_a_push_that_one_rank_gives_up_is_cancelled_on_the_others_once() -> None:
    writer = Bench()
    writer.say(1, m.PushEnded(TOKEN, True, False, 0, None, None))
    writer.say(0, m.PushEnded(TOKEN, True, False, 0, None, None))
    assert writer.told() == [[m.CancelPush(TOKEN)], [], [m.CancelPush(TOKEN)]]


def test_commands_go_to_every_rank_but_one_word_over_the_wire_will_do(writer: Bench) -> None:
    write, quiesce = m.PushBlocks(TOKEN, range(1), span(BLOCKS), BLOCKS), m.QuiesceByWire(TOKEN, D0, clean=True)
    writer.joint.submit(write)
    writer.joint.submit(quiesce)
    assert writer.told() == [[write, quiesce], [write], [write]]


@dataclass
class LateDevice:
    """The first rank's, asked by whoever likes."""

    is_done: bool = False

    def write(self, layers: range = range(1)) -> m.PushBlocks:
        """What it has not computed yet. What asks it is code with a memory: no pipe takes that."""
        return m.PushBlocks(TOKEN, layers, span(BLOCKS), BLOCKS, lambda: self.is_done)


BEGIN, END = m.BeginPush(TOKEN, D0, AgentId("far"), 30.0), m.PushEnded(TOKEN, True, False, 0, None, None)
CACHED, FINISH = m.PushBlocks(TOKEN, range(2, 3), span(OTHERS), OTHERS), m.FinishPush(TOKEN, None)


def ready(write: m.PushBlocks) -> m.PushBlocks:
    return msgspec.structs.replace(write, is_ready=m.at_once)


def given_up(write: m.PushBlocks) -> m.PushBlocks:
    return msgspec.structs.replace(write, is_ready=m.never)


def test_what_a_device_has_not_computed_the_other_ranks_are_told_when_it_has_and_the_rest_of_the_push_behind_it(writer: Bench) -> None:
    early, late = LateDevice(is_done=True), LateDevice()
    commands = [early.write(), late.write(range(1)), late.write(range(1, 2)), CACHED, FINISH]
    other = m.PushBlocks(GrantToken(b"another push 123"), range(1), span(OTHERS), OTHERS)
    for command in (*commands, m.RenewLease(TOKEN), other):
        writer.joint.submit(command)
    first, second, third = writer.told()
    assert first == [*commands, m.RenewLease(TOKEN), other], "the first rank asks its own device"
    assert second == third == [ready(early.write()), m.RenewLease(TOKEN), other]
    writer.joint._held_back.look()
    assert writer.told() == [[]] * NUM_RANKS
    late.is_done = True
    writer.joint._held_back.look()
    assert writer.told() == [[], *[[ready(late.write(range(1))), ready(late.write(range(1, 2))), CACHED, FINISH]] * 2]
    assert writer.joint._held_back.is_empty


@pytest.mark.parametrize("who", ["told", "one of the ranks"])
def test_what_is_held_back_of_a_cancelled_push_is_answered_by_every_rank_and_written_by_none(who: str, writer: Bench) -> None:
    late = LateDevice()
    for command in (late.write(), CACHED, FINISH):
        writer.joint.submit(command)
    writer.told()
    cancel = m.CancelPush(TOKEN)
    if who == "told":
        writer.joint.submit(cancel)
    else:
        writer.say(1, m.PushEnded(TOKEN, True, False, 0, None, None))
    answered = [given_up(late.write()), given_up(CACHED)]
    assert writer.told() == [[cancel], answered + [cancel] * (who == "told"), [*answered, cancel]]
    late.is_done = True
    writer.joint._held_back.look()
    assert writer.told() == [[]] * NUM_RANKS


def test_a_push_whose_pair_is_closed_ends_when_what_was_held_back_of_it_is_answered(writer: Bench) -> None:
    """The first rank knew of it, and answers it before its end; the others end theirs before they hear of it."""
    write, done = LateDevice().write(), m.HandleDone(TOKEN, BLOCKS, 0)
    for command in (BEGIN, write, m.ClosePair(D0)):
        writer.joint.submit(command)
    assert writer.told() == [[BEGIN, write, m.ClosePair(D0)], *[[BEGIN, m.ClosePair(D0)]] * 2]
    writer.say(0, done)
    writer.all_say(END)
    assert writer.heard() == []
    assert [commands[0] for commands in writer.told()[1:]] == [given_up(write)] * 2
    writer.say(1, done)
    writer.say(2, done)
    assert writer.heard() == [done, END]


def test_what_is_told_of_a_push_that_is_ending_waits_for_no_device(writer: Bench) -> None:
    """Else what is computed in vain would keep it from its end."""
    write = LateDevice().write()
    writer.joint.submit(BEGIN)
    writer.say(1, END)
    writer.told()
    writer.joint.submit(write)
    assert writer.told() == [[write], [given_up(write)], [given_up(write)]]


@dataclass
class RankPushes:
    """A rank that writes as `Outgoing` does: it gets to its commands in order, and is heard in order, both some time."""

    rank: ScriptedRank
    post: Callable[[m.TransferEvent], None]
    is_pushing: bool = False
    waiting: list[m.PushBlocks] = field(default_factory=list)
    said: list[m.TransferEvent] = field(default_factory=list)

    def steps(self) -> list[Callable[[], None]]:
        """What may happen to it next. A lease runs out when it will."""
        return [
            *([self.obey] if self.rank.commands else []),
            *([self.speak] if self.said else []),
            *([self.give_up] if self.is_pushing and not self.rank.commands else []),
        ]

    def obey(self) -> None:
        match command := self.rank.commands.pop(0):
            case m.BeginPush():
                self.is_pushing = True
            case m.PushBlocks():
                self.waiting.append(command)
            case _:
                self.give_up()
        self.write()

    def speak(self) -> None:
        self.post(self.said.pop(0))

    def write(self) -> None:
        """What is computed, or all for nothing."""
        while self.waiting and (not self.is_pushing or self.waiting[0].is_ready()):
            self.said.append(m.HandleDone(TOKEN, self.waiting.pop(0).source.blocks, 0))

    def give_up(self) -> None:
        if self.is_pushing:
            self.is_pushing = False
            self.write()
            self.said.append(END)


ENDINGS = (m.ClosePair(D0), m.CancelPush(TOKEN), m.ConnectPair(D0, TWO, endpoint(AgentId("farther")), plain_kv(1, 8)))


@given(st.data(), st.sampled_from(ENDINGS), st.booleans())
def test_whatever_ends_a_push_while_writes_are_held_back_its_end_is_last(
    data: st.DataObject, ending: m.TransferCommand, is_computed: bool
) -> None:
    bench, late = Bench(), LateDevice()
    ranks = [RankPushes(rank, partial(bench.say, number)) for number, rank in enumerate(bench.ranks)]

    def compute() -> None:
        late.is_done = True
        bench.joint._held_back.look()
        ranks[0].write()

    for command in (BEGIN, late.write(range(1)), late.write(range(1, 2)), CACHED):
        bench.joint.submit(command)
    left = [partial(bench.joint.submit, ending), *([compute] if is_computed else [])]
    while left or any(rank.rank.commands or rank.said for rank in ranks):
        step = data.draw(st.sampled_from([*left, *(step for rank in ranks for step in rank.steps())]))
        step()
        if step in left:
            left.remove(step)
    *done, end = bench.heard()
    assert end == END
    assert sorted(event.source for event in done) == [BLOCKS, BLOCKS, OTHERS]  # type: ignore[attr-defined]
    assert not bench.joint._handles and not bench.joint._ends and bench.joint._held_back.is_empty


def test_the_thread_looks_after_what_is_held_back_though_no_rank_says_anything() -> None:
    bench, late = Bench(), LateDevice()
    bench.joint.start()
    bench.joint.submit(late.write())
    assert bench.told()[1] == []
    late.is_done = True
    wait_until("the others are told", lambda: all(rank.commands == [ready(late.write())] for rank in bench.ranks[1:]), 10)
    bench.joint.stop()


def test_counts_are_of_all_ranks_but_for_fences_which_all_have_alike(bench: Bench) -> None:
    assert bench.joint.stats() == TransferStats(3, 1, 3, 30, 60)
