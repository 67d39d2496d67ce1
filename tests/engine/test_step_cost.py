"""What steps take is learned from steps; and a prompt beside decodes gets the tokens that their time allows."""

import random

import pytest

from disaggd.engine.scheduler import Chunk, StepPlan
from disaggd.engine.sequence import Sequence
from disaggd.engine.step_cost import AIM, ENOUGH, LEAST_SHARE, StepCost, StepPace, load_of
from disaggd.ids import SeqId
from disaggd.sampling import SamplingParams

TRUTH = StepCost(base_s=0.005, per_decode_s=0.001, per_decode_context_s=2e-6, per_token_s=0.4e-3, per_token_context_s=2e-7)


class Machine:
    """Takes what `cost` says for each step, give or take `noise`."""

    def __init__(self, itl_target_s: float | None, cost: StepCost = TRUTH, noise: float = 0.03) -> None:
        self.now = 0.0
        self.cost = cost
        self.pace = StepPace(itl_target_s, lambda: self.now)
        self._noise = noise
        self._draw = random.Random(1)

    def step(self, decodes: int = 0, context: int = 500, start: int = 0, tokens: int = 0) -> float:
        """Seconds of one step."""
        chunks = [Chunk(sequence(context), context - 1, context, samples=True) for _ in range(decodes)]
        if tokens:
            chunks.append(Chunk(sequence(start + tokens + 1), start, start + tokens, samples=False))
        begun = self.pace.begin(StepPlan(tuple(chunks)))
        seconds = self.cost.decode_step_s(decodes, decodes * context) + self.cost.prefill_s(tokens, start)
        seconds *= self._draw.gauss(1, self._noise)
        self.now += seconds
        self.pace.settled(begun)
        return seconds

    def warm(self, steps: int = 200) -> None:
        for _ in range(steps):
            self.step(self._draw.randrange(9), self._draw.randrange(100, 2000), self._draw.randrange(2000), self._draw.randrange(256))


def sequence(num_tokens: int) -> Sequence:
    return Sequence(SeqId("s"), [0] * num_tokens, SamplingParams(), num_prompt_tokens=num_tokens)


def test_the_load_of_a_step_tells_decodes_from_prompts() -> None:
    chunks = (Chunk(sequence(500), 499, 500, True), Chunk(sequence(300), 100, 300, True), Chunk(sequence(900), 0, 64, False))
    load = load_of(StepPlan(chunks))
    assert load.inputs == (1.0, 1, 500, 264, 200 * (100 + 100) + 64 * 32)


def test_nothing_is_predicted_before_enough_steps() -> None:
    machine = Machine(0.03)
    for _ in range(ENOUGH - 1):
        machine.step(8, tokens=64)
    assert machine.pace.cost is None and machine.pace.prefill_tokens(8, 4000, 0) is None
    machine.step(8, tokens=64)
    assert machine.pace.cost is not None and machine.pace.prefill_tokens(8, 4000, 0) is not None


@pytest.mark.parametrize("start", [0, 1000, 3000])
def test_a_step_sized_for_the_target_meets_it(start: int) -> None:
    machine = Machine(0.04)
    machine.warm()
    tokens = machine.pace.prefill_tokens(8, 4000, start)
    assert tokens is not None
    seconds = TRUTH.decode_step_s(8, 4000) + TRUTH.prefill_s(tokens, start)
    assert 0.85 * 0.04 < seconds / AIM < 1.15 * 0.04


@pytest.mark.parametrize("target_s", [0.03, 0.015])
def test_decodes_that_take_the_target_themselves_get_longer_by_a_share_at_most(target_s: float) -> None:
    machine = Machine(target_s)
    machine.warm()
    tokens = machine.pace.prefill_tokens(8, 8000, 0)
    assert tokens is not None
    assert TRUTH.prefill_s(tokens, 0) == pytest.approx(LEAST_SHARE * TRUTH.decode_step_s(8, 8000), rel=0.15)


def test_without_decodes_or_without_a_target_there_is_no_limit() -> None:
    machine, free = Machine(0.04), Machine(None)
    machine.warm()
    free.warm()
    assert machine.pace.prefill_tokens(0, 0, 0) is None
    assert free.pace.prefill_tokens(8, 4000, 0) is None


def test_a_step_is_half_as_long_while_a_sequence_is_expected_and_limited_without_decodes_too() -> None:
    machine = Machine(0.08)
    machine.warm()
    machine.pace.is_expecting = True
    beside, alone = machine.pace.prefill_tokens(8, 4000, 0), machine.pace.prefill_tokens(0, 0, 0)
    assert beside is not None and alone is not None
    assert TRUTH.decode_step_s(8, 4000) + TRUTH.prefill_s(beside, 0) < 1.15 * 0.04
    assert 0.85 * 0.04 < (TRUTH.decode_step_s(0, 0) + TRUTH.prefill_s(alone, 0)) / AIM < 1.15 * 0.04


def test_a_machine_that_slows_down_is_followed_within_twenty_steps() -> None:
    machine = Machine(0.06)
    machine.warm()
    before = machine.pace.prefill_tokens(8, 4000, 0)
    machine.cost = StepCost(*(2 * getattr(TRUTH, field) for field in StepCost.__slots__))
    for _ in range(20):
        machine.step(8, 500, 0, 64)
    after = machine.pace.prefill_tokens(8, 4000, 0)
    assert before is not None and after is not None and after < before / 2
    assert machine.cost.decode_step_s(8, 4000) + machine.cost.prefill_s(after, 0) < 1.2 * 0.06


def test_where_a_device_works_ahead_a_step_begins_when_the_one_before_ends() -> None:
    now = 0.0
    pace = StepPace(None, lambda: now)
    plan = StepPlan((Chunk(sequence(500), 499, 500, True),))
    first = pace.begin(plan)
    for _ in range(40):
        second = pace.begin(plan)  # launched before the first one's results were asked for
        now += 0.01
        pace.settled(first)
        first = second
    assert pace.cost is not None
    assert pace.cost.decode_step_s(1, 500) == pytest.approx(0.01, rel=0.05)


def test_tokens_in_seconds_is_the_inverse_of_their_cost() -> None:
    for start in (0, 500, 4000):
        assert TRUTH.prefill_tokens_in(TRUTH.prefill_s(300, start), start) == pytest.approx(300)
    flat = StepCost(0.005, 0.001, 0.0, 0.0, 0.0)
    assert flat.prefill_tokens_in(0.01, 0) == float("inf")
    assert flat.prefill_tokens_in(-0.01, 0) == 0
