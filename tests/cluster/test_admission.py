"""Admission by predicted KV: what fits is taken, what would wait behind all that is refused, with a time to come again."""

from typing import Any

import pytest

from disaggd.cluster.admission import MAX_RETRY_S
from disaggd.errors import Overloaded
from tests.support.routing import D0, D1, P0, Client, Routing

POOL = 256
"""Tokens of a node's pool: 64 blocks of four."""


class Admitting(Routing):
    """`predicted` is what all sequences are thought to need."""

    def __init__(self, overcommit: float = 1.0, **rules: Any) -> None:
        super().__init__(kv_overcommit=overcommit, **rules)

    @property
    def predicted(self) -> int:
        return self.dispatcher.admission.num_tokens

    def refused(self, num_tokens: int, max_tokens: int) -> Overloaded:
        with pytest.raises(Overloaded) as refusal:
            self.submit(num_tokens, max_tokens)
        return refusal.value

    def finish(self, client: Client, num_outputs: int, took_s: float = 1.0) -> None:
        self.now += took_s
        self.tokens(client, len(client.tokens), *range(num_outputs - len(client.tokens)), finish="stop")


def test_prompt_and_output_are_counted_until_the_sequence_is_over() -> None:
    cluster = Admitting()
    client = cluster.decoding(40, 8)
    assert cluster.predicted == 48
    cluster.finish(client, 3)
    assert cluster.predicted == 0
    gone = cluster.submit(40, 8)
    cluster.dispatcher.end(gone.seq, "abort")
    assert cluster.predicted == 0


def test_what_the_pools_hold_is_taken_and_one_more_is_refused() -> None:
    cluster = Admitting(decodes=(D0, D1))
    for _ in range(4):
        cluster.submit(100, 28)
    assert cluster.predicted == 2 * POOL
    assert cluster.refused(10, 1).status == 429
    assert len(cluster.dispatcher.sequences) == 4, "nothing of it is left behind"
    assert cluster.predicted == 2 * POOL


def test_overcommit_lets_so_many_pools_full_wait() -> None:
    cluster = Admitting(overcommit=2.0)
    for _ in range(4):
        cluster.submit(100, 28)
    cluster.refused(10, 1)


def test_a_sequence_that_is_alone_is_taken_whatever_it_needs() -> None:
    cluster = Admitting(overcommit=0.1)
    cluster.submit(200, 50)
    cluster.refused(1, 1)


def test_outputs_that_end_early_make_room_for_more() -> None:
    """max_tokens says what a client fears, not what it gets."""
    cluster = Admitting()
    for _ in range(200):
        cluster.finish(cluster.decoding(10, 200), 5)
    for _ in range(16):
        cluster.submit(10, 200)
    assert cluster.predicted == POOL
    cluster.refused(10, 200)


def test_one_that_outgrows_the_prediction_needs_what_it_has() -> None:
    cluster = Admitting()
    for _ in range(200):
        cluster.finish(cluster.decoding(10, 200), 5)
    client = cluster.decoding(10, 200)
    cluster.tokens(client, 0, *range(5))
    assert cluster.predicted == 16
    cluster.tokens(client, 5, *range(100))
    assert cluster.predicted == 115


def test_a_retry_counts_once() -> None:
    cluster = Admitting(decodes=(D0, D1))
    client = cluster.decoding(40, 8)
    cluster.tokens(client, 0, 1, 2, 3)
    cluster.down(cluster.decode_of(client))
    assert cluster.predicted == 48


def test_a_refusal_says_when_there_will_be_room() -> None:
    """Sequences take 10 s, and the pool is full of them: a tenth of it is free after one."""
    cluster = Admitting()
    for _ in range(300):
        cluster.finish(cluster.decoding(10, 6), 6, took_s=10.0)
    for _ in range(16):
        cluster.submit(10, 6)
    assert cluster.refused(20, 5).retry_after_s == 1
    assert cluster.refused(128, 6).retry_after_s == 6
    assert cluster.refused(10_000, 6).retry_after_s == MAX_RETRY_S


def test_aborted_sequences_teach_nothing() -> None:
    cluster = Admitting()
    for _ in range(200):
        cluster.dispatcher.end(cluster.submit(10, 200).seq, "abort")
    cluster.submit(10, 200)
    assert cluster.predicted == 210
    assert P0 in cluster.dispatcher.prefills
