"""A stand-in for the model: no torch, but a KV pool whose contents decide every token."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest

from disaggd.engine.blocks import BlockPool
from disaggd.engine.engine import Engine, SequenceOutput
from disaggd.engine.scheduler import Chunk, Limits, StepPlan
from disaggd.engine.sequence import Sequence
from disaggd.ids import BlockId, SeqId
from disaggd.prefix import PrefixHasher
from disaggd.sampling import SamplingParams, TokenLogprob

BLOCK = 4
VOCAB = 50
EOS = 7


class Drawn(NamedTuple):
    token: int
    logprob: TokenLogprob | None


def next_token(context: list[int]) -> int:
    """What the stand-in says after `context`: any change of any token of it changes the answer's odds."""
    word = 0
    for token in context:
        word = (word * 1_000_003 + token + 1) % 2_147_483_647
    return word % VOCAB


class SlotRunner:
    """Keeps tokens where a model keeps K and V, and samples from what it reads back through the block table.

    With a `lookahead` it is a device that is as late as can be: it writes nothing until its results are asked for.
    """

    def __init__(self, num_blocks: int, max_step_tokens: int, lookahead: int) -> None:
        self.slots: list[int | None] = [None] * (num_blocks * BLOCK)
        self.max_step_tokens = max_step_tokens
        self.lookahead = lookahead
        self.drawn: dict[Sequence, int] = {}
        """Every sequence's last token."""

    def execute(self, plan: StepPlan, layers_done: Callable[[range], None] | None) -> Callable[[], list[Drawn]]:
        assert 0 < plan.num_tokens <= self.max_step_tokens
        for chunk in plan.chunks:
            assert chunk.start == chunk.sequence.num_computed < chunk.end
        compute = partial(self.compute, [(chunk, list(chunk.sequence.block_table), list(chunk.sequence.tokens)) for chunk in plan.chunks])
        tokens = None if self.lookahead else compute()
        for layers in (range(0, 2), range(2, 3)):
            if layers_done:
                layers_done(layers)
        return compute if tokens is None else lambda: tokens

    def compute(self, work: list[tuple[Chunk, list[BlockId], list[int]]]) -> list[Drawn]:
        for chunk, blocks, tokens in work:
            if chunk.end > len(tokens):
                tokens.append(self.drawn[chunk.sequence])
            self.write(blocks, tokens, range(chunk.start, chunk.end))
        sampling = [(chunk, blocks) for chunk, blocks, _ in work if chunk.samples]
        self.drawn |= {chunk.sequence: next_token(self.read(blocks, chunk.end)) for chunk, blocks in sampling}
        return [Drawn(self.drawn[chunk.sequence], TokenLogprob(-0.5)) for chunk, _ in sampling]

    def write(self, blocks: list[BlockId], tokens: list[int], positions: range) -> None:
        for position in positions:
            self.slots[blocks[position // BLOCK] * BLOCK + position % BLOCK] = tokens[position]

    def read(self, blocks: list[BlockId], num_tokens: int) -> list[int]:
        kept = [self.slots[blocks[p // BLOCK] * BLOCK + p % BLOCK] for p in range(num_tokens)]
        return [-1 if token is None else token for token in kept]


def make_engine(
    num_blocks: int = 64,
    max_step_tokens: int = 16,
    max_sequences: int = 8,
    max_model_len: int = 1000,
    lookahead: int = 0,
    hasher: PrefixHasher | None = None,
) -> Engine:
    """Without a `hasher` nothing is cached."""
    runner = SlotRunner(num_blocks, max_step_tokens, lookahead)
    limits = Limits(max_step_tokens, max_sequences, max_model_len)
    return Engine(runner, BlockPool(num_blocks, BLOCK, hasher), limits, eos_token_ids=[EOS])


both = pytest.mark.parametrize("lookahead", [0, 1])
"""Where a step computes, and where it is launched before the tokens of the one before are known."""


def write_kv(engine: Engine, blocks: list[BlockId], tokens: list[int]) -> None:
    """What another node's push does."""
    runner = engine._runner
    assert isinstance(runner, SlotRunner)
    runner.write(blocks, tokens, range(len(tokens)))


def prompt(seed: int, length: int) -> list[int]:
    return [(seed * 31 + i * 17) % VOCAB for i in range(length)]


def sequence(
    tokens: list[int], max_tokens: int = 8, *, name: str = "s", num_prompt: int | None = None, limit: int | None = None, **sampling: object
) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, **{"ignore_eos": True, **sampling})
    return Sequence(SeqId(name), list(tokens), params, num_prompt_tokens=num_prompt or len(tokens), output_limit=limit)


def expected(tokens: list[int], max_tokens: int) -> list[int]:
    """What the stand-in generates, without any engine."""
    context = list(tokens)
    for _ in range(max_tokens):
        context.append(next_token(context))
    return context[len(tokens) :]


def run(engine: Engine) -> list[SequenceOutput]:
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def grant(engine: Engine, tokens: list[int]) -> list[BlockId]:
    blocks = engine.pool.allocate(engine.pool.blocks_for(len(tokens) + 1))
    assert blocks is not None
    return blocks
