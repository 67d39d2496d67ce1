"""Least slack first, nobody starves, and there is a bound."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from disaggd.cluster.prefill_queue import Job, PrefillQueue
from disaggd.ids import SeqId

A, B, C = SeqId("a"), SeqId("b"), SeqId("c")

AGING_S = 10.0


def make_queue(*jobs: Job, max_jobs: int = 10, max_tokens: int = 1000) -> PrefillQueue:
    queue = PrefillQueue(max_jobs=max_jobs, max_tokens=max_tokens, aging_s=AGING_S)
    for one in jobs:
        assert queue.has_room(one.num_tokens)
        queue.push(one)
    return queue


def job(
    seq: SeqId, arrived: float = 0.0, *, num_tokens: int = 10, prefill_s: float = 0.5, ttft_target_s: float = 1.0, priority: int = 0
) -> Job:
    return Job(seq=seq, arrived=arrived, num_tokens=num_tokens, ttft_target_s=ttft_target_s, prefill_s=prefill_s, priority=priority)


def order(queue: PrefillQueue, now: float = 0.0) -> list[SeqId]:
    return [job.seq for job in queue.in_order(now)]


# ── order ──


def test_jobs_alike_go_in_the_order_of_arrival() -> None:
    assert order(make_queue(job(B, 2.0), job(A, 1.0), job(C, 3.0))) == [A, B, C]


def test_whoever_must_start_first_goes_first() -> None:
    """A prompt that takes longer to prefill has less time to wait, and so has one that is promised its first token sooner."""
    assert order(make_queue(job(A, 1.0), job(B, 1.3, prefill_s=0.9))) == [B, A]
    assert order(make_queue(job(A, 1.0), job(B, 1.3, ttft_target_s=0.6))) == [B, A]
    assert order(make_queue(job(A, 1.0), job(B, 1.5, prefill_s=0.9))) == [A, B]


def test_a_step_of_priority_is_a_second() -> None:
    assert order(make_queue(job(A, 1.0), job(B, 2.9, priority=-2))) == [B, A]
    assert order(make_queue(job(A, 1.0), job(B, 3.1, priority=-2))) == [A, B]
    assert order(make_queue(job(A, 1.0, priority=1), job(B, 1.9))) == [B, A]


def test_of_jobs_that_are_due_together_the_first_to_come_goes_first() -> None:
    assert order(make_queue(job(B), job(A), job(C))) == [B, A, C]


def test_who_has_waited_for_the_aging_bound_goes_before_all_who_have_not() -> None:
    queue = make_queue(job(A, 0.0, priority=100), job(B, 1.0))
    assert order(queue, AGING_S - 0.1) == [B, A]
    assert order(queue, AGING_S) == [A, B]


def test_the_aged_go_by_arrival_whatever_their_slack() -> None:
    queue = make_queue(job(A, 1.0, priority=-100), job(B, 0.0, priority=100))
    assert order(queue, 5.0) == [A, B]
    assert order(queue, AGING_S + 1.0) == [B, A]


def test_a_job_that_returns_takes_the_place_it_had() -> None:
    queue = make_queue(job(A, 1.0), job(B, 2.0), job(C, 3.0))
    first, second = queue.take(A), queue.take(B)
    assert first is not None and second is not None
    queue.push(second)
    queue.push(first)
    assert order(queue) == [A, B, C]


@st.composite
def arrivals(draw: st.DrawFn) -> list[Job]:
    seconds = st.floats(0.0, 20.0)
    jobs = draw(st.lists(st.tuples(seconds, seconds, st.floats(0.01, 4.0), st.integers(-100, 100)), min_size=1, max_size=30))
    return [
        job(SeqId(str(n)), arrived, ttft_target_s=target, prefill_s=prefill, priority=priority)
        for n, (arrived, target, prefill, priority) in enumerate(sorted(jobs))
    ]


@given(arrivals())
def test_nobody_waits_past_the_aging_bound_behind_a_later_arrival(jobs: list[Job]) -> None:
    """One node serves one job at a time, and each is predicted exactly."""
    queue, now, served = make_queue(), 0.0, []
    coming = list(jobs)
    while coming or queue:
        now = max(now, coming[0].arrived) if not queue else now
        while coming and coming[0].arrived <= now:
            queue.push(coming.pop(0))
        chosen = next(queue.in_order(now))
        overtaken = [other for other in queue.in_order(now) if other.arrived < chosen.arrived]
        assert all(now - other.arrived < AGING_S for other in overtaken)
        queue.take(chosen.seq)
        served.append(chosen.seq)
        now += chosen.prefill_s
    assert sorted(served) == sorted(one.seq for one in jobs)


# ── bounds ──


def test_a_queue_that_is_full_of_jobs_has_no_room() -> None:
    queue = make_queue(job(A), job(B), max_jobs=2)
    assert not queue.has_room(1)
    queue.take(A)
    assert queue.has_room(1)


def test_a_queue_that_is_full_of_tokens_has_no_room() -> None:
    queue = make_queue(job(A, num_tokens=60), max_tokens=100)
    assert (queue.has_room(40), queue.has_room(41)) == (True, False)
    queue.take(A)
    assert (queue.num_tokens, len(queue)) == (0, 0)


def test_a_job_above_the_bound_finds_room_in_an_empty_queue() -> None:
    queue = make_queue(max_tokens=100)
    assert queue.has_room(500)


def test_a_job_that_was_promised_a_place_returns_to_a_full_queue() -> None:
    queue = make_queue(job(A), job(B, 1.0), max_jobs=2)
    first = queue.take(A)
    assert first is not None and queue.has_room(10)
    queue.push(job(C, 2.0))
    queue.push(first)
    assert order(queue) == [A, B, C]
    assert not queue.has_room(1)


def test_jobs_that_nobody_will_compute_are_counted_once_and_by_cause() -> None:
    queue = make_queue(job(A), job(B))
    queue.give_up(A, "gone")
    queue.give_up(A, "gone")
    queue.refuse()
    assert (order(queue), queue.num_tokens, queue.drops) == ([B], 10, {"gone": 1, "full": 1})


def test_jobs_may_leave_while_the_queue_is_walked() -> None:
    queue = make_queue(job(A), job(B))
    for one in queue.in_order(0.0):
        queue.take(one.seq)
    assert not queue and queue.num_tokens == 0


# ── what it tells ──


def test_the_work_ahead_is_that_of_whoever_goes_first() -> None:
    queue = make_queue(job(A, 0.0, prefill_s=0.5), job(B, 1.0, prefill_s=0.25), job(C, 5.0))
    assert queue.work_ahead_s(job(SeqId("new"), 2.0), now=2.0) == 0.75
    assert queue.work_ahead_s(replace(job(SeqId("new"), 2.0), priority=-50), now=2.0) == 0.0
    assert queue.work_ahead_s(job(SeqId("new"), 2.0), now=AGING_S) == 0.75
    assert queue.jobs_ahead(job(SeqId("new"), 2.0), now=2.0) == 2
    assert queue.jobs_ahead(replace(job(SeqId("new"), 2.0), priority=-50), now=2.0) == 0


def test_the_oldest_age_is_that_of_the_first_to_arrive() -> None:
    queue = make_queue(job(A, 1.0), job(B, 4.0, priority=-50))
    assert queue.oldest_age_s(5.0) == 4.0
    queue.take(A)
    assert queue.oldest_age_s(5.0) == 1.0
    queue.take(B)
    assert queue.oldest_age_s(5.0) == 0.0
