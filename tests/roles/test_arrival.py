"""What a link may bring that a router of ours never sends: refused, and the node lives."""

import math

import pytest

from disaggd.cluster.protocol import Generate, Prefill, pack_tokens
from disaggd.errors import InvalidRequest
from disaggd.ids import SeqId
from disaggd.roles.arrival import read_sequence
from disaggd.sampling import SamplingParams

GOOD = SamplingParams(max_tokens=8)


def prefill(tokens: bytes, num_prompt_tokens: int, sampling: SamplingParams = GOOD) -> Prefill:
    return Prefill(SeqId("s"), 3, tokens, num_prompt_tokens, sampling, "", None)


def test_a_good_one_is_a_sequence_with_all_it_was_given() -> None:
    sequence = read_sequence(prefill(pack_tokens([5, 6, 99]), 2), 100, reserve=True, output_limit=1)
    assert (sequence.seq_id, sequence.attempt, sequence.tokens, sequence.num_prompt_tokens) == ("s", 3, [5, 6, 99], 2)
    assert (sequence.reserve, sequence.output_limit, sequence.num_given) == (True, 1, 3)


@pytest.mark.parametrize(
    "frame",
    [
        prefill(b"", 0),
        prefill(b"abc", 1),
        prefill(pack_tokens([5]), 0),
        prefill(pack_tokens([5]), -1),
        prefill(pack_tokens([5]), 2),
        prefill(pack_tokens([5, 100]), 2),
        prefill(pack_tokens([5, 6]), 1, SamplingParams(max_tokens=1)),
        prefill(pack_tokens([5]), 1, SamplingParams(logit_bias={100: 1.0})),
        prefill(pack_tokens([5]), 1, SamplingParams(logit_bias={-1: 1.0})),
        prefill(pack_tokens([5]), 1, SamplingParams(top_logprobs=-1)),
        prefill(pack_tokens([5]), 1, SamplingParams(top_logprobs=21)),
        prefill(pack_tokens([5]), 1, SamplingParams(temperature=-1.0)),
        prefill(pack_tokens([5]), 1, SamplingParams(repetition_penalty=0.0)),
        prefill(pack_tokens([5]), 1, SamplingParams(seed=-1)),
        prefill(pack_tokens([5]), 1, SamplingParams(temperature=math.nan)),
        prefill(pack_tokens([5]), 1, SamplingParams(top_k=-2)),
        prefill(pack_tokens([5]), 1, SamplingParams(top_k=2**31)),
        prefill(pack_tokens([5]), 1, SamplingParams(top_p=0.0)),
        prefill(pack_tokens([5]), 1, SamplingParams(top_p=math.nan)),
        prefill(pack_tokens([5]), 1, SamplingParams(min_p=math.nan)),
        prefill(pack_tokens([5]), 1, SamplingParams(presence_penalty=-math.inf)),
        prefill(pack_tokens([5]), 1, SamplingParams(frequency_penalty=1e30)),
        prefill(pack_tokens([5]), 1, SamplingParams(repetition_penalty=math.inf)),
        prefill(pack_tokens([5]), 1, SamplingParams(logit_bias={5: math.nan})),
    ],
)
def test_a_bad_one_is_refused(frame: Generate | Prefill) -> None:
    with pytest.raises(InvalidRequest):
        read_sequence(frame, 100)
