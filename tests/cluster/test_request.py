"""A request's phases, and what another attempt needs to know of it."""

import pytest

from disaggd.cluster.request import LEGAL_MOVES, Phase, Request, RoutedSequence, Timeline
from disaggd.ids import SeqId
from disaggd.sampling import SamplingParams
from tests.support.routing import Client


def make_record(max_tokens: int = 8) -> RoutedSequence:
    sampling = SamplingParams(max_tokens=max_tokens)
    return RoutedSequence(SeqId("s"), Request(id="request", prompt=(1, 2, 3), sampling=sampling), Client(), 60.0, Timeline(arrived=0.0))


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.DONE])
def test_any_phase_may_end_or_start_over(phase: Phase) -> None:
    assert {Phase.DONE, Phase.PLACED} <= LEGAL_MOVES[phase]


def test_what_is_done_stays_done() -> None:
    record = make_record()
    record.move(Phase.DONE)
    with pytest.raises(AssertionError):
        record.move(Phase.PLACED)


def test_a_job_reaches_a_prefill_node_only_through_a_grant_or_the_queue() -> None:
    sources = {phase for phase, moves in LEGAL_MOVES.items() if Phase.PREFILLING in moves}
    assert sources == {Phase.PLACED, Phase.QUEUED, Phase.GRANTING}


def test_an_illegal_move_is_refused() -> None:
    record = make_record()
    record.move(Phase.DECODING)
    with pytest.raises(AssertionError):
        record.move(Phase.QUEUED)


def test_what_was_sent_belongs_to_the_next_attempts_prompt() -> None:
    record = make_record(max_tokens=8)
    record.sent += [7, 8]
    assert (record.tokens, record.num_tokens, record.num_remaining) == ([1, 2, 3, 7, 8], 5, 6)


def test_credit_is_held_by_attempt() -> None:
    record = make_record()
    first = record.job
    record.attempt += 1
    assert record.job != first
