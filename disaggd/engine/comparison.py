"""Whether several ranks compute what one does: both are given the same tokens, and their logits after each of them are compared.

The tokens are a prompt's and those that one rank finds likeliest behind it. So what differs at one place is not carried on to the next,
and up to the first place where the ranks would choose another token, they have chosen these.
"""

from collections.abc import Callable, Sequence

import msgspec
import torch
from torch import Tensor

from disaggd.engine.build import LoadedEngine
from disaggd.engine.scheduler import Chunk, StepPlan
from disaggd.engine.sequence import Sequence as EngineSequence
from disaggd.ids import BlockId, SeqId
from disaggd.model.parallel import part_of
from disaggd.sampling import SamplingParams
from disaggd.transfer.layout import kv_spec

TOLERANCES = {"float32": 5e-5, "bfloat16": 5e-2, "float16": 5e-3}
"""By the model's dtype: how far two logits may be apart, of the largest one. Sums of other parts in another order are rounded otherwise, in
every layer: the built-in model's are 7e-7 apart in float32 on two ranks, 1e-2 in bfloat16 on four."""


class Difference(msgspec.Struct, frozen=True):
    """The first place at which the ranks would have chosen another token."""

    index: int
    """Of the token behind the prompt."""
    alone: int
    """The token that one rank chooses."""
    together: int
    margin: float
    """By which one rank's logit of its own choice is the larger."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Of `tp` ranks with one."""

    tp: int
    dtype: str
    num_prompt_tokens: int
    num_tokens: int
    """That were chosen, and at each of which all logits were compared."""
    largest_logit: float
    logit_error: float
    """The largest difference of two logits."""
    num_same: int
    """Of the tokens."""
    first_difference: Difference | None
    kv_token_bytes: int
    """Of the KV of one token, with one rank."""
    rank_token_bytes: tuple[int, ...]
    """By rank; more together where ranks hold the same KV heads."""

    @property
    def tolerated_error(self) -> float:
        return TOLERANCES[self.dtype] * self.largest_logit

    @property
    def is_close(self) -> bool:
        """Whether the difference is one of rounding."""
        return self.logit_error <= self.tolerated_error


def compare_ranks(build: Callable[[int], LoadedEngine], prompt: Sequence[int], num_tokens: int, tp: int) -> Comparison:
    """`build(ranks)` makes the engine of so many; the two are not there at once. Its pool holds prompt and tokens. Raises DisaggdError."""
    one = build(1)
    spec, block_size = one.spec, one.kv_spec.block_size
    reader, tokens, rows = _Reader(one), list(prompt), []
    for _ in range(num_tokens):
        rows.append(reader.read(tokens))
        tokens.append(int(rows[-1].argmax()))
    alone = torch.stack(rows)
    del one, reader
    together = _logits_of(build(tp), tokens, len(prompt))
    chosen, others = alone.argmax(1), together.argmax(1)
    return Comparison(
        tp=tp,
        dtype=spec.dtype,
        num_prompt_tokens=len(prompt),
        num_tokens=num_tokens,
        largest_logit=float(alone.abs().max()),
        logit_error=float((alone - together).abs().max()),
        num_same=int((chosen == others).sum()),
        first_difference=_first_difference(alone, chosen, others),
        kv_token_bytes=kv_spec(spec, block_size).bytes_per_block // block_size,
        rank_token_bytes=tuple(
            kv_spec(spec, block_size, len(part_of(spec, rank, tp).kv_heads)).bytes_per_block // block_size for rank in range(tp)
        ),
    )


def _logits_of(loaded: LoadedEngine, tokens: list[int], num_prompt: int) -> Tensor:
    """After the prompt, and after each token behind it but the last: float32 [tokens, vocabulary]. Ends the ranks."""
    try:
        reader = _Reader(loaded)
        return torch.stack([reader.read(tokens[:end]) for end in range(num_prompt, len(tokens))])
    finally:
        loaded.close()


def _first_difference(alone: Tensor, chosen: Tensor, others: Tensor) -> Difference | None:
    places = (chosen != others).nonzero()
    if not len(places):
        return None
    index = int(places[0])
    one, other = int(chosen[index]), int(others[index])
    return Difference(index, one, other, float(alone[index, one] - alone[index, other]))


class _Reader:
    """Computes one sequence that grows, and nothing beside it."""

    def __init__(self, loaded: LoadedEngine) -> None:
        self._loaded = loaded
        self._num_computed = 0

    def read(self, tokens: list[int]) -> Tensor:
        """Logits after `tokens`, which begin with those of the read before: float32 [vocabulary]."""
        pool, most = self._loaded.engine.pool, self._loaded.engine.limits.max_step_tokens
        sequence = EngineSequence(SeqId("compared"), tokens, SamplingParams(), num_prompt_tokens=len(tokens))
        sequence.block_table = [BlockId(i) for i in range(pool.blocks_for(len(tokens)))]
        assert len(sequence.block_table) <= pool.num_blocks
        while self._num_computed < len(tokens):
            end = min(self._num_computed + most, len(tokens))
            chunk = Chunk(sequence, self._num_computed, end, samples=end == len(tokens))
            logits = self._loaded.runner.logits(StepPlan((chunk,)))
            self._num_computed = end
        return logits[0].float().cpu()
