"""Who gets what in a step: decodes first, first come first served, and only younger ones give way."""

import pytest

from disaggd.engine.blocks import BlockPool
from disaggd.engine.prefix_cache import PrefixCache
from disaggd.engine.scheduler import Limits, Scheduler, StepPlan
from disaggd.engine.sequence import Sequence, SequenceState
from disaggd.engine.step_cost import StepPace
from disaggd.errors import ConfigError
from disaggd.ids import SeqId
from disaggd.sampling import SamplingParams

BLOCK = 4


class Bench:
    """A scheduler over a small pool, with all the time in the world; `step` settles what it planned as an engine would."""

    def __init__(self, num_blocks: int = 100, max_step_tokens: int = 16, max_sequences: int = 8) -> None:
        self.pool = BlockPool(num_blocks, BLOCK)
        self.cache = PrefixCache(self.pool)
        limits = Limits(max_step_tokens, max_sequences, max_model_len=1000)
        self.scheduler = Scheduler(self.pool, limits, self.cache, StepPace(None, lambda: 0.0))
        self.arrivals = 0

    def sequence(self, num_tokens: int, reserve: bool = False) -> Sequence:
        made = Sequence(
            SeqId(str(self.arrivals)),
            [0] * num_tokens,
            SamplingParams(),
            num_prompt_tokens=num_tokens,
            reserve=reserve,
            output_limit=1 if reserve else None,
        )
        made.arrival, self.arrivals = self.arrivals, self.arrivals + 1
        return made

    def wait(self, num_tokens: int, reserve: bool = False) -> Sequence:
        made = self.sequence(num_tokens, reserve)
        self.scheduler.wait(made)
        return made

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        for chunk in plan.chunks:
            chunk.sequence.num_computed = chunk.end
            if chunk.samples:
                chunk.sequence.tokens.append(0)
        return plan

    def finish(self, sequence: Sequence) -> None:
        self.scheduler.drop(sequence)
        sequence.move(SequenceState.FINISHED)


def spans(plan: StepPlan) -> list[tuple[str, int, int]]:
    return [(chunk.sequence.seq_id, chunk.start, chunk.end) for chunk in plan.chunks]


def test_nothing_to_do_is_an_empty_plan() -> None:
    assert Bench().step().chunks == ()


def test_a_long_prompt_is_computed_in_chunks_that_end_on_block_boundaries() -> None:
    bench = Bench(max_step_tokens=10)
    bench.wait(19)
    plans = [bench.step() for _ in range(4)]
    assert [spans(plan) for plan in plans] == [[("0", 0, 8)], [("0", 8, 16)], [("0", 16, 19)], [("0", 19, 20)]]
    assert [len(plan.sampling) for plan in plans] == [0, 0, 1, 1]


def test_decodes_go_before_an_older_prefill() -> None:
    bench = Bench(max_step_tokens=8)
    bench.wait(30)
    bench.step()
    resumed = bench.sequence(4)
    resumed.move(SequenceState.QUEUED)
    bench.scheduler.run(resumed, bench.pool.allocate(2) or [])
    resumed.num_computed = 3
    assert spans(bench.step()) == [("1", 3, 4), ("0", 8, 12)]


def test_prompts_are_served_first_come_first_served_and_nobody_overtakes() -> None:
    bench = Bench(max_step_tokens=16)
    for num_tokens in (14, 9, 2):
        bench.wait(num_tokens)
    assert spans(bench.step()) == [("0", 0, 14)]  # 2 left: under a block of the second, though the third would fit
    assert spans(bench.step()) == [("0", 14, 15), ("1", 0, 9), ("2", 0, 2)]


def test_no_new_prompt_overtakes_a_prefill_that_waits_for_budget() -> None:
    bench = Bench(max_step_tokens=8)
    for _ in range(5):
        bench.wait(1)
    bench.wait(12)  # in the first step 3 tokens are left for it, under a block
    bench.wait(1)
    decodes = [str(number) for number in range(5)]
    assert [name for name, _, _ in spans(bench.step())] == decodes
    bench.finish(bench.scheduler.running[4])
    assert spans(bench.step())[4:] == [("5", 0, 4)]
    bench.wait(1)
    joined = bench.sequence(2)
    joined.move(SequenceState.QUEUED)
    bench.scheduler.run(joined, bench.pool.allocate(1) or [])
    joined.num_computed = 1
    assert [name for name, _, _ in spans(bench.step())] == ["0", "1", "2", "3", "8"]


def test_a_last_chunk_may_be_smaller_than_a_block() -> None:
    bench = Bench(max_step_tokens=16)
    bench.wait(14)
    bench.wait(2)
    assert spans(bench.step()) == [("0", 0, 14), ("1", 0, 2)]


def test_decodes_beyond_the_budget_wait_for_the_older() -> None:
    bench = Bench(max_step_tokens=4, max_sequences=8)
    for _ in range(6):
        bench.wait(1)
    bench.step()
    plan = bench.step()
    assert plan.num_tokens == 4
    assert [name for name, _, _ in spans(plan)] == ["0", "1", "2", "3"]


def test_max_sequences_bounds_those_admitted() -> None:
    bench = Bench(max_sequences=2)
    first, *_ = [bench.wait(2) for _ in range(3)]
    assert len(bench.step().chunks) == 2
    assert len(bench.step().chunks) == 2
    bench.finish(first)
    assert [name for name, _, _ in spans(bench.step())] == ["1", "2"]


def test_a_sequence_is_admitted_with_the_blocks_of_all_its_tokens() -> None:
    bench = Bench(max_step_tokens=8)
    prompt = bench.wait(30)
    bench.step()
    assert len(prompt.block_table) == 8
    assert bench.pool.num_free == 92


def test_admission_leaves_each_running_sequence_a_block_to_grow_into() -> None:
    bench = Bench(num_blocks=4)
    bench.wait(8)
    waiting = bench.wait(8)  # two blocks are free, but the first needs its third at once
    bench.step()
    assert waiting.state is SequenceState.WAITING
    small = Bench(num_blocks=5)
    small.wait(8)
    admitted = small.wait(8)
    small.step()
    assert admitted.state is SequenceState.RUNNING


def test_reserved_sequences_need_no_room_to_grow() -> None:
    bench = Bench(num_blocks=4)
    bench.wait(8, reserve=True)
    second = bench.wait(8, reserve=True)
    bench.step()
    assert second.state is SequenceState.RUNNING
    assert bench.pool.num_free == 0


def test_the_youngest_is_preempted_for_an_older_and_computes_anew() -> None:
    bench = Bench(num_blocks=5)
    old, young = bench.wait(8), bench.wait(8)
    for _ in range(4):
        bench.step()
    assert bench.pool.num_free == 0  # 12 tokens of the elder in 3 blocks, 8 + 1 of the younger wait for a third
    assert (old.state, young.state) == (SequenceState.RUNNING, SequenceState.RUNNING)
    while len(old.tokens) <= 12:
        bench.step()
    plan = bench.step()
    assert spans(plan) == [("0", 12, 13)]
    assert (young.state, young.num_computed, young.block_table, young.num_preemptions) == (SequenceState.WAITING, 0, [], 1)
    bench.finish(old)
    assert spans(bench.step()) == [("1", 0, len(young.tokens) - 1)]


def test_the_youngest_waits_in_place_rather_than_give_up_its_blocks() -> None:
    bench = Bench(num_blocks=5)
    old, young = bench.wait(8), bench.wait(8)
    bench.step()
    plan = bench.step()
    assert spans(plan) == [("0", 8, 9)]  # the elder took the last block
    assert (young.state, young.num_computed) == (SequenceState.RUNNING, 8)
    bench.finish(old)
    assert spans(bench.step()) == [("1", 8, 9)]


def test_a_reserved_sequence_is_never_preempted() -> None:
    bench = Bench(num_blocks=14, max_step_tokens=8)
    old, reserved = bench.wait(8), bench.wait(40, reserve=True)
    while len(old.tokens) <= 16:
        bench.step()
    assert bench.pool.num_free == 0
    assert [name for name, _, _ in spans(bench.step())] == ["1"]  # the elder waits for it
    assert (reserved.state, len(reserved.block_table)) == (SequenceState.RUNNING, 10)


def test_the_preempted_go_first_the_older_ahead() -> None:
    bench = Bench(num_blocks=9, max_step_tokens=64)
    old, middle, young = bench.wait(4), bench.wait(4), bench.wait(4)
    bench.step()
    for grown in (middle, young):
        grown.tokens += [0] * 3
    bench.step()
    late = bench.wait(4)
    old.tokens += [0] * 40  # nine blocks hold only 36: everybody gives way
    bench.scheduler.schedule()
    assert bench.scheduler.waiting == [middle, young, late]
    assert bench.scheduler.blocks_owed() == bench.pool.blocks_for(len(middle.tokens)) + bench.pool.blocks_for(len(young.tokens))


def test_the_preempted_go_before_older_ones_that_never_ran() -> None:
    bench = Bench(num_blocks=4)
    large = bench.sequence(16)
    old, young = bench.wait(4), bench.wait(4)
    bench.step()
    bench.scheduler.wait(large)
    young.tokens += [0] * 3
    bench.step()
    old.tokens += [0] * 7
    bench.step()
    assert bench.scheduler.waiting == [young, large]


def test_drop_releases_whatever_the_state() -> None:
    bench = Bench(max_step_tokens=8)
    running, waiting, queued = bench.wait(30), bench.wait(30), bench.sequence(4)
    queued.move(SequenceState.QUEUED)
    bench.step()
    for sequence in (running, waiting, queued):
        bench.finish(sequence)
    assert (bench.scheduler.running, bench.scheduler.waiting, bench.pool.num_free) == ([], [], 100)


def test_limits_that_would_starve_prefill_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_step_tokens: 3 is less than a block of 4"):
        Bench(max_step_tokens=3)
    with pytest.raises(ConfigError, match="max_sequences: 0"):
        Bench(max_sequences=0)


# ── earmarks ──


def parked(bench: Bench, num_tokens: int) -> Sequence:
    """A sequence that waits for a grant."""
    made = bench.sequence(num_tokens)
    made.move(SequenceState.QUEUED)
    return made


def test_younger_sequences_leave_what_is_kept_for_an_older_one() -> None:
    bench = Bench(num_blocks=10)
    older, granted = bench.wait(8), parked(bench, 20)
    bench.scheduler.earmarks[granted] = 6
    younger = bench.wait(8)
    assert spans(bench.step()) == [("0", 0, 8)], "2 of 10 blocks, one to grow into, and 6 kept: 2 more are too many"
    del bench.scheduler.earmarks[granted]
    assert younger.seq_id in {seq for seq, *_ in spans(bench.step())}
    assert older.state is SequenceState.RUNNING


def test_what_is_kept_for_a_younger_one_is_free_for_an_older() -> None:
    """Else each would wait for the other."""
    bench = Bench(num_blocks=10, max_sequences=1)
    waiting, granted = bench.wait(8), parked(bench, 36)
    bench.scheduler.earmarks[granted] = 10
    assert spans(bench.step()) == [(waiting.seq_id, 0, 8)]


def test_a_place_is_kept_too() -> None:
    bench = Bench(max_sequences=2)
    bench.wait(4)
    granted = parked(bench, 4)
    bench.scheduler.earmarks[granted] = 2
    bench.wait(4)
    assert spans(bench.step()) == [("0", 0, 4)]


def test_nothing_is_kept_from_the_preempted_nor_from_growth() -> None:
    bench = Bench(num_blocks=4)
    old, young = bench.wait(8), bench.wait(7)
    bench.step()
    granted = parked(bench, 12)
    bench.scheduler.earmarks[granted] = 3
    bench.step()
    assert (old.state, young.state) == (SequenceState.RUNNING, SequenceState.WAITING), "the older has grown at the younger's cost"
    bench.finish(old)
    assert young.seq_id in {seq for seq, *_ in spans(bench.step())}


def test_an_earmark_ends_with_its_sequence() -> None:
    bench = Bench()
    granted = parked(bench, 12)
    bench.scheduler.earmarks[granted] = 3
    bench.finish(granted)
    assert not bench.scheduler.earmarks


def test_grants_go_by_the_order_of_their_earmarks() -> None:
    bench = Bench()
    first, second, third = (parked(bench, 4) for _ in range(3))
    bench.scheduler.earmarks = {second: 5, first: 7}
    assert [bench.scheduler.earmarked_before(sequence) for sequence in (second, first, third)] == [[], [5], [5, 7]]
