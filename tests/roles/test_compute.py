"""The compute thread's loop, one turn at a time on the test's own thread, with a role that only takes notes."""

from collections.abc import Callable, Sequence

import msgspec
import pytest

from disaggd.cluster.protocol import Abort, CacheEvents, CacheSnapshot, Credit, Dismiss, Draining, Gauges, NoRoom, ToNode, ToRouter
from disaggd.engine.blocks import BlockPool
from disaggd.engine.engine import Engine, SequenceOutput
from disaggd.engine.scheduler import Limits, StepPlan
from disaggd.engine.sequence import Sequence as EngineSequence
from disaggd.ids import SeqId
from disaggd.roles.compute import GAUGES_PERIOD_S, Batch, ComputeThread, Drain, FrameIn, LinkDown, LinkId, LinkUp, Outbox, Stop
from disaggd.sampling import SamplingParams
from disaggd.transfer.messages import Fenced, TransferEvent
from tests.support.role_nodes import HASHER, FakeRunner, prompt

A, B = LinkId(1), LinkId(2)
NOTHING = Gauges(*(0 for _ in Gauges.__struct_fields__))


class NotingRole:
    """Notes what it is called with, and sends one frame at each tick and each delivery."""

    def __init__(self, outbox: Outbox) -> None:
        self.notes: list[object] = []
        self.deadline: float | None = None
        self.num_free = 0
        self.is_idle = True
        self._outbox = outbox

    def link_up(self, link: LinkId) -> None:
        self.notes.append(("up", link))

    def link_down(self, link: LinkId) -> None:
        self.notes.append(("down", link))

    def on_frame(self, link: LinkId, frame: ToNode) -> None:
        self.notes.append((link, frame))

    def on_event(self, event: TransferEvent) -> None:
        self.notes.append(event)

    def layers_done(self, plan: StepPlan, layers: range) -> None:
        self.notes.append(layers)

    def deliver(self, outputs: Sequence[SequenceOutput]) -> None:
        self.notes.append(f"deliver {len(outputs)}")
        self._outbox.broadcast(Credit(2))

    def tick(self) -> None:
        self.notes.append("tick")
        self._outbox.broadcast(Credit(1))

    def next_deadline(self) -> float | None:
        return self.deadline

    def gauges(self) -> Gauges:
        return msgspec.structs.replace(NOTHING, blocks_free=self.num_free)


class Loop:
    """A `ComputeThread` that no thread runs. `batches` is what crossed to asyncio."""

    def __init__(self, pool: BlockPool | None = None) -> None:
        self.now = 10.0
        self.batches: list[Batch] = []
        outbox = Outbox(self.batches.append)
        self.role = NotingRole(outbox)
        self.engine = Engine(FakeRunner(), pool or BlockPool(16, 4), Limits(16, 8, 100))
        self.failures: list[BaseException] = []
        self.num_drained = 0
        self.thread = ComputeThread(
            self.engine,
            self.role,
            outbox,
            lambda: self.now,
            self.failures.append,
            drained=lambda: setattr(self, "num_drained", self.num_drained + 1),
        )

    def turn(self, *messages: object) -> None:
        for message in messages:
            self.thread.inbox.put(message)
        self.thread.turn()

    def frames(self) -> list[ToRouter]:
        return [frame for batch in self.batches for _, frame in batch]

    def gauges_sent(self) -> int:
        return sum(isinstance(frame, Gauges) for frame in self.frames())


def add_sequence(loop: Loop, max_tokens: int = 4) -> None:
    tokens = prompt(6)
    loop.engine.add(EngineSequence(SeqId("s"), tokens, SamplingParams(max_tokens=max_tokens, ignore_eos=True), len(tokens)))


def test_a_turn_takes_the_whole_inbox_ticks_steps_and_delivers() -> None:
    loop = Loop()
    add_sequence(loop)
    frame, event = Abort(SeqId("x"), 0), Fenced("p0", "agent")
    loop.turn(LinkUp(A), FrameIn(A, frame), event, LinkDown(A))
    assert loop.role.notes == [("up", A), (A, frame), event, ("down", A), "tick", range(0, 2), range(2, 3), "deliver 1"]


def test_answers_leave_before_the_step_and_tokens_after_it() -> None:
    loop = Loop()
    add_sequence(loop)
    loop.turn(LinkUp(A))
    assert loop.batches[0] == [(A, Credit(1))]
    assert loop.batches[1][0] == (A, Credit(2))


def test_with_work_to_do_an_empty_inbox_holds_nobody_up() -> None:
    loop = Loop()
    add_sequence(loop, max_tokens=2)
    loop.turn()
    loop.turn()
    assert not loop.engine.sequences


@pytest.mark.parametrize("late", [0.0, 3.0])
def test_an_idle_node_wakes_for_the_roles_deadline(late: float) -> None:
    """With the deadline due the turn returns by itself; else it would wait for a message that never comes."""
    loop = Loop()
    loop.turn(LinkUp(A))
    loop.role.deadline = loop.now - late
    loop.turn()
    assert loop.role.notes.count("tick") == 2


def test_gauges_go_out_when_they_change_but_not_more_often_than_the_period() -> None:
    loop = Loop()
    loop.turn(LinkUp(A))
    assert loop.gauges_sent() == 1
    loop.turn(FrameIn(A, Abort(SeqId("x"), 0)))
    assert loop.gauges_sent() == 1, "unchanged"
    loop.role.num_free = 5
    loop.now += GAUGES_PERIOD_S / 2
    loop.turn(FrameIn(A, Abort(SeqId("x"), 0)))
    assert loop.gauges_sent() == 1, "too soon"
    loop.now += GAUGES_PERIOD_S / 2
    loop.turn()
    assert loop.gauges_sent() == 2, "and nobody had to wake it"


def test_a_new_router_hears_the_gauges_though_they_did_not_change() -> None:
    loop = Loop()
    loop.turn(LinkUp(A))
    loop.now += GAUGES_PERIOD_S
    loop.turn(LinkUp(B))
    assert [link for batch in loop.batches for link, frame in batch if isinstance(frame, Gauges)] == [A, A, B]


def test_frames_for_a_router_that_is_gone_are_dropped() -> None:
    batches: list[Batch] = []
    outbox = Outbox(batches.append)
    outbox.links.add(A)
    outbox.send(A, NoRoom(SeqId("s"), 0))
    outbox.send(B, NoRoom(SeqId("s"), 0))
    outbox.flush()
    assert batches == [[(A, NoRoom(SeqId("s"), 0))]]


def test_an_outbox_keeps_the_order_and_posts_nothing_when_empty() -> None:
    batches: list[Batch] = []
    outbox = Outbox(batches.append)
    outbox.links |= {A, B}
    outbox.send(B, Credit(1))
    outbox.broadcast(Credit(2))
    outbox.flush()
    outbox.flush()
    assert batches == [[(B, Credit(1)), (A, Credit(2)), (B, Credit(2))]]


def failing(role: NotingRole) -> Callable[[], None]:
    def tick() -> None:
        raise AssertionError("a bug")

    role.tick = tick  # type: ignore[method-assign]
    return tick


def test_an_error_ends_the_thread_and_is_handed_over() -> None:
    loop = Loop()
    failing(loop.role)
    loop.thread.inbox.put(LinkUp(A))
    loop.thread._main()
    assert [str(error) for error in loop.failures] == ["a bug"]


def test_stop_ends_the_loop_after_its_turn() -> None:
    loop = Loop()
    add_sequence(loop)
    loop.thread.inbox.put(Stop())
    loop.thread._main()
    assert loop.role.notes[-1] == "deliver 1" and not loop.failures


# ── its sign of life ──


def test_the_thread_shows_a_pulse_at_every_layer_group_and_rests_only_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop()
    pulse, seen = loop.thread.pulse, []
    monkeypatch.setattr(loop.role, "layers_done", lambda plan, layers: seen.append((pulse.count, pulse.is_resting)))
    add_sequence(loop)
    loop.turn(LinkUp(A))
    assert seen == [(3, False), (4, False)], "the message, the turn, and one more each"
    loop.turn()
    assert not pulse.is_resting, "there was work: it waited for nothing"
    loop = Loop()
    loop.thread.pulse.beat()
    wait = loop.thread._idle_s
    monkeypatch.setattr(loop.thread, "_idle_s", lambda: seen.append(loop.thread.pulse.is_resting) or wait())
    loop.turn(LinkUp(A))
    assert seen[-1] is True


# ── a node that is to stop ──


def drain_frames(loop: Loop) -> list[LinkId]:
    """Routers that were told, in order."""
    return [link for batch in loop.batches for link, frame in batch if isinstance(frame, Draining)]


def test_a_node_without_routers_is_drained_at_once_and_says_so_once() -> None:
    loop = Loop()
    loop.turn(Drain())
    loop.turn(FrameIn(A, Abort(SeqId("x"), 0)))
    assert loop.num_drained == 1


def test_a_node_is_drained_when_all_routers_have_let_it_go_and_it_has_nothing_left() -> None:
    loop = Loop()
    loop.role.is_idle = False
    loop.turn(LinkUp(A), LinkUp(B), Drain())
    assert sorted(drain_frames(loop)) == [A, B]
    loop.turn(FrameIn(A, Dismiss()))
    loop.role.is_idle = True
    loop.turn(FrameIn(A, Abort(SeqId("x"), 0)))
    assert loop.num_drained == 0, "the other router may have sent something already"
    loop.role.is_idle = False
    loop.turn(FrameIn(B, Dismiss()))
    assert loop.num_drained == 0, "something is still pushed"
    loop.role.is_idle = True
    loop.turn(FrameIn(A, Abort(SeqId("x"), 0)))
    assert loop.num_drained == 1
    assert not any(isinstance(note, tuple) and note[1] == Dismiss() for note in loop.role.notes)


def test_a_router_that_is_lost_need_not_let_go_and_one_that_comes_must() -> None:
    loop = Loop()
    loop.turn(LinkUp(A), Drain(), LinkUp(B), LinkDown(A))
    assert drain_frames(loop) == [A, B]
    assert loop.num_drained == 0
    loop.turn(LinkDown(B))
    assert loop.num_drained == 1


# ── what the prefix cache holds ──


def caching_loop() -> Loop:
    return Loop(BlockPool(16, 4, HASHER))


def cache_events(loop: Loop, link: LinkId) -> list[CacheEvents]:
    return [frame for batch in loop.batches for to, frame in batch if to == link and isinstance(frame, CacheEvents)]


def names(tokens: list[int]) -> bytes:
    return b"".join(HASHER.hash(digest) for digest in HASHER.digests(tokens))


def test_each_router_hears_of_the_cache_by_a_snapshot_and_then_by_numbered_changes() -> None:
    loop = caching_loop()
    add_sequence(loop, max_tokens=1)
    loop.turn(LinkUp(A))
    assert cache_events(loop, A) == [CacheEvents(0, True, b"", b""), CacheEvents(1, False, names(prompt(6)), b"")]
    loop.turn(LinkUp(B))
    assert cache_events(loop, B) == [CacheEvents(0, True, names(prompt(6)), b"")]
    loop.engine.pool.clear()
    loop.turn(LinkUp(LinkId(3)))
    assert cache_events(loop, A)[2:] == [CacheEvents(2, False, b"", names(prompt(6)))]
    assert cache_events(loop, B)[1:] == [CacheEvents(1, False, b"", names(prompt(6)))]


def test_a_router_that_asks_gets_a_snapshot_under_the_next_number() -> None:
    loop = caching_loop()
    add_sequence(loop, max_tokens=1)
    loop.turn(LinkUp(A), LinkUp(B))
    loop.turn(FrameIn(A, CacheSnapshot()))
    assert cache_events(loop, A)[2:] == [CacheEvents(2, True, names(prompt(6)), b"")]
    assert len(cache_events(loop, B)) == 2
    assert not any(isinstance(note, tuple) and note[1] == CacheSnapshot() for note in loop.role.notes)


def test_a_node_without_a_prefix_cache_says_nothing_of_it() -> None:
    loop = Loop()
    add_sequence(loop, max_tokens=1)
    loop.turn(LinkUp(A), FrameIn(A, CacheSnapshot()))
    assert cache_events(loop, A) == []
