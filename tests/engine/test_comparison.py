"""Ranks that compute what one does are close to it; those that compute anything else are not, and the first other token is named."""

import pytest

from disaggd.engine.build import LoadedEngine, build_engine
from disaggd.engine.comparison import compare_ranks
from disaggd.engine.engine import generate
from disaggd.model.spec import Dtype
from disaggd.sampling import SamplingParams

PROMPT = list(range(5, 85))
NUM_TOKENS = 24


def build(tp: int = 1, dtype: Dtype = "float32") -> LoadedEngine:
    return build_engine(
        "builtin:tiny", dtype=dtype, kv_cache_bytes=2**20, block_size=16, max_step_tokens=64, max_sequences=4, max_model_len=256, tp=tp
    )


@pytest.mark.process
def test_two_ranks_are_close_to_one_and_hold_half_of_the_kv_each() -> None:
    found = compare_ranks(build, PROMPT, NUM_TOKENS, tp=2)
    assert found.is_close and 0 < found.logit_error < 1e-3 < found.largest_logit
    assert (found.num_same, found.first_difference) == (NUM_TOKENS, None)
    assert found.rank_token_bytes == (found.kv_token_bytes // 2,) * 2


def test_what_computes_the_same_is_not_apart_at_all() -> None:
    """As a rank's part would be, the second engine is read in the same steps: whatever the reader did wrong would show here, or below."""
    found = compare_ranks(lambda _: build(), PROMPT, NUM_TOKENS, tp=2)
    assert found.logit_error == 0 and found.num_same == NUM_TOKENS


def test_what_computes_something_else_is_told_from_rounding() -> None:
    found = compare_ranks(lambda ranks: build(dtype="float32" if ranks == 1 else "bfloat16"), PROMPT, NUM_TOKENS, tp=2)
    assert not found.is_close


def test_the_first_token_that_differs_is_the_first_that_generation_would_have_changed() -> None:
    found = compare_ranks(lambda ranks: build() if ranks == 1 else shifted(build()), PROMPT, NUM_TOKENS, tp=2)
    first = found.first_difference
    assert first is not None and first.index == 0 and first.margin > 0
    greedy = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    assert first.alone == next(generate(build().engine, PROMPT, greedy)).tokens[0]
    assert not found.is_close and found.num_same < NUM_TOKENS


def shifted(loaded: LoadedEngine) -> LoadedEngine:
    """An engine that mistakes every logit for its neighbour's."""
    logits = loaded.runner.logits
    loaded.runner.logits = lambda plan: logits(plan).roll(1, dims=1)  # type: ignore[method-assign]
    return loaded
