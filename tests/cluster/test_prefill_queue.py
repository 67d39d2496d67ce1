"""First come first served, by the arrival of requests."""

from disaggd.cluster.prefill_queue import PrefillQueue
from disaggd.ids import SeqId

A, B, C = SeqId("a"), SeqId("b"), SeqId("c")


def make_queue() -> PrefillQueue:
    queue = PrefillQueue()
    for seq, arrived in ((A, 1.0), (B, 2.0), (C, 3.0)):
        queue.push(seq, arrived)
    return queue


def test_jobs_wait_in_the_order_of_arrival() -> None:
    assert list(make_queue()) == [A, B, C]


def test_a_job_that_returns_takes_the_place_it_had() -> None:
    queue = make_queue()
    queue.discard(A)
    queue.discard(B)
    queue.push(B, 2.0)
    queue.push(A, 1.0)
    assert list(queue) == [A, B, C]


def test_of_jobs_that_arrived_together_the_first_pushed_goes_first() -> None:
    queue = PrefillQueue()
    for seq in (B, A, C):
        queue.push(seq, 1.0)
    assert list(queue) == [B, A, C]


def test_a_job_that_leaves_is_gone_and_may_leave_twice() -> None:
    queue = make_queue()
    queue.discard(B)
    queue.discard(B)
    assert (list(queue), len(queue), B in queue, A in queue) == ([A, C], 2, False, True)


def test_jobs_may_leave_while_the_queue_is_walked() -> None:
    queue = make_queue()
    for seq in queue:
        queue.discard(seq)
    assert not queue
