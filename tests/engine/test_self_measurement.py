"""A node that measures itself knows its speed, takes no longer than it may, and is as if it had not."""

import logging
import re
from collections.abc import Callable

import pytest

from disaggd.engine.blocks import BlockPool
from disaggd.engine.engine import Engine
from disaggd.engine.scheduler import Limits, StepPlan
from disaggd.engine.self_measurement import LIMIT_S, TURNS, measure_steps
from disaggd.engine.step_cost import StepCost, StepPace, load_of
from disaggd.prefix import PrefixHasher
from disaggd.sampling import SamplingParams
from tests.support.oracle import Oracle, prompt_of

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
FAST = StepCost(base_s=0.004, per_decode_s=0.001, per_decode_context_s=1e-6, per_token_s=0.4e-3, per_token_context_s=5e-8)
SLOW = StepCost(*(20 * getattr(FAST, field) for field in StepCost.__slots__))


class Machine:
    """Stands where a runner stands: computes nothing, and takes what `cost` says for it."""

    def __init__(self, cost: StepCost, lookahead: int = 0) -> None:
        self.lookahead = lookahead
        self.now = 0.0
        self.cost = cost
        self.plans: list[StepPlan] = []
        self._busy_until = 0.0

    def execute(self, plan: StepPlan, layers_done: Callable[[range], None] | None) -> Callable[[], list[object]]:
        self.plans.append(plan)
        load = load_of(plan)
        seconds = self.cost.decode_step_s(load.decodes, load.decode_context) + self.cost.prefill_s(load.prefill_tokens, 0)
        self._busy_until = done = max(self._busy_until, self.now) + seconds

        def results() -> list[object]:
            self.now = max(self.now, done)
            return []

        return results


def make_engine(machine: Machine, num_blocks: int = 200, block_size: int = 64) -> Engine:
    pool = BlockPool(num_blocks, block_size, PrefixHasher("model", "float32", block_size))
    pace = StepPace(0.03, lambda: machine.now)
    return Engine(machine, pool, Limits(512, 64, 4096), pace=pace)  # type: ignore[arg-type]


def measure(machine: Machine, engine: Engine) -> None:
    measure_steps(engine, lambda: machine.now)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_it_finds_out_what_steps_take(lookahead: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "disaggd")
    machine = Machine(FAST, lookahead)
    engine = make_engine(machine)
    measure(machine, engine)
    cost = engine.pace.cost
    assert cost is not None
    for decodes, context in ((1, 500), (8, 4000)):
        assert cost.decode_step_s(decodes, context) == pytest.approx(FAST.decode_step_s(decodes, context), rel=0.15)
    assert cost.base_s + cost.prefill_s(512, 0) == pytest.approx(FAST.base_s + FAST.prefill_s(512, 0), rel=0.15)
    assert engine.pace.prefill_tokens(8, 4000, 0) is not None
    assert re.search(r"prefills 2,\d{3} tokens/s;", caplog.text)


@pytest.mark.parametrize("cost", [FAST, SLOW])
def test_it_takes_no_longer_than_it_may(cost: StepCost) -> None:
    machine = Machine(cost)
    measure(machine, make_engine(machine))
    longest = max(cost.decode_step_s(len(plan.chunks), 0) + cost.prefill_s(plan.num_tokens, 0) for plan in machine.plans)
    assert machine.now < LIMIT_S + TURNS * longest


def test_nothing_is_left_of_it() -> None:
    machine = Machine(FAST)
    engine = make_engine(machine)
    before = engine.gauges()
    measure(machine, engine)
    assert engine.gauges() == before
    assert (engine.pool.hashes(), engine.cache.queried_tokens, engine.sequences, engine.has_work) == ([], 0, {}, False)
    assert all(engine.pool.references(block) == 0 for block in range(engine.pool.num_blocks))


@pytest.mark.parametrize(("num_blocks", "block_size"), [(32, 16), (40, 16), (32, 64)])
def test_a_small_pool_is_enough(num_blocks: int, block_size: int) -> None:
    machine = Machine(FAST)
    engine = make_engine(machine, num_blocks, block_size)
    measure(machine, engine)
    assert engine.pace.cost is not None and engine.pool.num_free == num_blocks


def test_in_a_tiny_one_it_is_left_out_aloud(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(FAST)
    engine = make_engine(machine, num_blocks=31)
    measure(machine, engine)
    assert engine.pace.cost is None and machine.plans == []
    assert "too small to measure" in caplog.text


def test_a_real_engine_says_afterwards_what_it_would_have_said() -> None:
    measured, other = Oracle(), Oracle()
    now = [0.0]

    def clock() -> float:
        now[0] += 1e-3
        return now[0]

    measure_steps(measured.engine, clock)
    assert measured.engine.pace.cost is not None
    prompt = prompt_of(300, other)
    assert measured.continue_(prompt, GREEDY) == other.continue_(prompt, GREEDY)
