"""The state table, and the words for how far a sequence has come."""

import pytest

from disaggd.engine.sequence import LEGAL_MOVES, Sequence, SequenceState
from disaggd.ids import SeqId
from disaggd.sampling import SamplingParams

WAITING, QUEUED, RUNNING, PAUSED, FINISHED = SequenceState

MOVES = {
    (WAITING, QUEUED),
    (QUEUED, WAITING),
    (WAITING, RUNNING),
    (QUEUED, RUNNING),
    (RUNNING, WAITING),
    (RUNNING, PAUSED),
    (PAUSED, RUNNING),
    *((state, FINISHED) for state in (WAITING, QUEUED, RUNNING, PAUSED)),
}
"""The diagram of DESIGN's Sequence, with Abort as a column."""


def sequence(num_prompt: int = 3, num_delivered: int = 0, **fields: object) -> Sequence:
    tokens = list(range(num_prompt + num_delivered))
    return Sequence(SeqId("s"), tokens, SamplingParams(), num_prompt_tokens=num_prompt, **fields)


@pytest.mark.parametrize("target", SequenceState)
@pytest.mark.parametrize("source", SequenceState)
def test_only_the_moves_of_the_diagram_are_legal(source: SequenceState, target: SequenceState) -> None:
    moved = sequence()
    moved.state = source
    if (source, target) in MOVES:
        moved.move(target)
        assert moved.state is target
    else:
        with pytest.raises(AssertionError, match=f"{source.value} may not become {target.value}"):
            moved.move(target)


def test_every_state_has_a_row_in_the_table() -> None:
    assert set(LEGAL_MOVES) == set(SequenceState)


def test_delivered_tokens_count_as_outputs_and_as_given() -> None:
    retried = sequence(num_prompt=3, num_delivered=2)
    assert (retried.num_outputs, retried.num_given, retried.num_uncomputed) == (2, 5, 5)
    retried.tokens.append(7)
    assert (retried.num_outputs, retried.num_given) == (3, 5)


def test_output_limit_counts_only_what_was_sampled_here() -> None:
    handed = sequence(num_delivered=4, output_limit=1)
    assert not handed.reached_output_limit
    handed.tokens.append(7)
    assert handed.reached_output_limit


def test_two_sequences_with_the_same_tokens_differ() -> None:
    assert sequence() != sequence()


def test_a_reserved_sequence_must_hand_off_before_it_grows() -> None:
    assert sequence(reserve=True, output_limit=1).reserve
    with pytest.raises(AssertionError, match="may not grow"):
        sequence(reserve=True)
