"""Sampling parameters from the wire: refused, or drawn with, and then nobody else's token in the batch is another."""

import torch
from hypothesis import strategies as st

from disaggd.cluster.protocol import Generate, pack_tokens
from disaggd.engine.sampler import SamplerRow, draw
from disaggd.errors import InvalidRequest
from disaggd.ids import SeqId
from disaggd.kernels import REFERENCE
from disaggd.roles.arrival import read_sequence
from disaggd.sampling import SamplingParams
from tests.fuzz import wild
from tests.fuzz.surface import Surface

VOCAB_SIZE = 50
TOKENS = [1, 2, 3]
LOGITS = torch.sin(torch.arange(VOCAB_SIZE, dtype=torch.float32)) * 5
GOOD = SamplerRow(SamplingParams(seed=5, top_logprobs=1), TOKENS, 3, 3)


def check(params: SamplingParams) -> None:
    """Every drawn token is one of the vocabulary."""
    try:
        sequence = read_sequence(Generate(SeqId("s"), 0, pack_tokens(TOKENS), 2, params, "", "auto", 1.0, None), VOCAB_SIZE)
    except InvalidRequest:
        return
    row = SamplerRow(sequence.sampling, sequence.tokens, sequence.num_prompt_tokens, 3)
    last = torch.tensor([3, 3])
    one, two = draw(REFERENCE, LOGITS.repeat(2, 1), last, [row, GOOD]).read()
    assert 0 <= one.token < VOCAB_SIZE
    assert [two] == draw(REFERENCE, LOGITS[None], last[:1], [GOOD]).read()


small = st.floats(0, 2)
live: wild.Live = {
    "temperature": small,
    "top_k": st.integers(0, 60),
    "top_p": st.floats(0.1, 1),
    "min_p": st.floats(0, 1),
    "seed": st.integers(0, 2**64 - 1),
    "max_tokens": st.integers(2, 9),
    "presence_penalty": small,
    "frequency_penalty": small,
    "repetition_penalty": st.floats(0.1, 3),
    "logit_bias": st.dictionaries(st.integers(0, VOCAB_SIZE - 1), wild.floats, max_size=3),
    "top_logprobs": st.none() | st.integers(0, 20),
}

SAMPLING = Surface("sampling parameters", wild.struct(SamplingParams, live), check, quick=100, share=0.06)
