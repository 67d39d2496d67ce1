"""Chunks beside decodes: as large as the step has time for, never none, and finer than a block where nobody pushes it."""

from disaggd.engine.blocks import BlockPool
from disaggd.engine.prefix_cache import PrefixCache
from disaggd.engine.scheduler import GRAIN, Limits, Scheduler, StepPlan
from disaggd.engine.sequence import Sequence
from disaggd.ids import SeqId
from disaggd.sampling import SamplingParams

BLOCK = 64


class Budget:
    """Allows `limit` prefill tokens beside decodes, and keeps what it was asked."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.limits_alone = False
        self.asked: list[tuple[int, int, int]] = []

    def prefill_tokens(self, decodes: int, decode_context: int, start: int) -> int | None:
        self.asked.append((decodes, decode_context, start))
        return self.limit if decodes or self.limits_alone else None


class Bench:
    """A scheduler whose steps `budget` limits, with `num_decodes` sequences of 100 tokens that decode."""

    def __init__(self, limit: int | None, num_decodes: int = 2) -> None:
        self.budget = Budget(limit)
        self.pool = BlockPool(100, BLOCK)
        self.scheduler = Scheduler(self.pool, Limits(512, 16, 10_000), PrefixCache(self.pool), self.budget)
        self.arrivals = 0
        for _ in range(num_decodes):
            self.wait(100)
        if num_decodes:
            self.step()
        self.budget.asked.clear()

    def wait(self, num_tokens: int, reserve: bool = False) -> Sequence:
        name, limit = SeqId(str(self.arrivals)), 1 if reserve else None
        made = Sequence(name, [0] * num_tokens, SamplingParams(), num_prompt_tokens=num_tokens, reserve=reserve, output_limit=limit)
        made.arrival, self.arrivals = self.arrivals, self.arrivals + 1
        self.scheduler.wait(made)
        return made

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        for chunk in plan.chunks:
            chunk.sequence.num_computed = chunk.end
            if chunk.samples:
                chunk.sequence.tokens.append(0)
        return plan

    def chunk_ends(self, sequence: Sequence) -> list[int]:
        """Where the chunks of `sequence` end, until it is computed."""
        ends: list[int] = []
        while sequence.num_computed < sequence.num_prompt_tokens:
            ends += [chunk.end for chunk in self.step().chunks if chunk.sequence is sequence]
        return ends


def test_with_decodes_running_chunks_have_the_size_that_the_budget_allows() -> None:
    bench = Bench(limit=50)
    assert bench.chunk_ends(bench.wait(200)) == [48, 96, 144, 192, 200]


def test_the_budget_is_told_what_it_is_about() -> None:
    bench = Bench(limit=50)
    bench.chunk_ends(bench.wait(90))
    assert bench.budget.asked == [(2, 202, 0), (2, 204, 48)]


def test_with_none_running_the_whole_step_is_the_prompts() -> None:
    bench = Bench(limit=50, num_decodes=0)
    assert bench.chunk_ends(bench.wait(700)) == [512, 700]


def test_the_budget_may_limit_a_step_without_decodes() -> None:
    bench = Bench(limit=50, num_decodes=0)
    bench.budget.limits_alone = True
    assert bench.chunk_ends(bench.wait(100)) == [48, 96, 100]


def test_prefill_always_advances() -> None:
    bench = Bench(limit=0)
    assert bench.chunk_ends(bench.wait(2 * GRAIN + 2)) == [GRAIN, 2 * GRAIN, 2 * GRAIN + 2]


def test_what_is_pushed_as_it_is_computed_ends_on_blocks_and_advances_too() -> None:
    bench = Bench(limit=50)
    assert bench.chunk_ends(bench.wait(200, reserve=True)) == [64, 128, 192, 200]
    wide = Bench(limit=150)
    assert wide.chunk_ends(wide.wait(200, reserve=True)) == [128, 200]


def test_two_prompts_share_one_budget() -> None:
    bench = Bench(limit=50)
    first, second = bench.wait(47), bench.wait(200)
    plan = bench.step()
    assert [(chunk.sequence, chunk.end) for chunk in plan.chunks[2:]] == [(first, 47)]  # 3 tokens are left: under a grain
    plan = bench.step()
    assert [(chunk.sequence, chunk.end) for chunk in plan.chunks if chunk.sequence is second] == [(second, 48)]


def test_without_a_limit_a_step_takes_what_its_tokens_allow() -> None:
    bench = Bench(limit=None)
    assert bench.chunk_ends(bench.wait(700)) == [508, 700]
