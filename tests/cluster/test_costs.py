"""What prefills, transfers and waits take is found out from what they took."""

import random

import pytest

from disaggd.cluster.costs import ENOUGH, FRESH_S, DelayFit, PrefillFit, TransferFit
from disaggd.cluster.offer import PrefillCost, PrefillWork

TRUTH = PrefillCost(0.004, 0.43e-3, 2e-8)
BYTES_PER_TOKEN = 12_288


def prefills(fit: PrefillFit, count: int, truth: PrefillCost = TRUTH, seed: int = 0) -> None:
    draw = random.Random(seed)
    for _ in range(count):
        num_uncached, num_cached = draw.randrange(16, 3000), draw.choice((0, 0, 512, 2048))
        fit.learn(
            PrefillWork(num_uncached, num_uncached * (num_cached + num_uncached / 2)),
            truth.seconds(num_uncached, num_cached) * draw.gauss(1, 0.05),
        )


def error(fit: PrefillFit, num_uncached: int, num_cached: int = 0, truth: PrefillCost = TRUTH) -> float:
    assert fit.cost is not None
    return abs(fit.cost.seconds(num_uncached, num_cached) / truth.seconds(num_uncached, num_cached) - 1)


def test_nothing_is_predicted_of_an_unmeasured_node_before_enough_prefills() -> None:
    fit = PrefillFit()
    prefills(fit, ENOUGH - 1)
    assert fit.cost is None
    prefills(fit, 1)
    assert fit.cost is not None


def test_prefills_are_learned_from_prefills() -> None:
    fit = PrefillFit()
    prefills(fit, 60)
    assert max(error(fit, n, c) for n, c in ((100, 0), (1000, 0), (3000, 0), (500, 2048))) < 0.2


def test_a_measured_node_is_predicted_at_once_and_corrected_within_twenty_prefills() -> None:
    measured = PrefillCost(0.004, 0.2e-3, 1e-8)  # alone on its machine
    fit = PrefillFit(measured)
    assert fit.cost == measured
    prefills(fit, 20)
    assert max(error(fit, n) for n in (300, 1000, 3000)) < 0.15


def push(fit: TransferFit, num_tokens: int, bytes_per_s: float, draw: random.Random) -> None:
    """As it comes about: the wire starts with the first layers, and ends with it or with the prompt's last ones."""
    prefill_s = TRUTH.seconds(num_tokens, 0)
    wire_s = num_tokens * BYTES_PER_TOKEN / bytes_per_s * draw.gauss(1, 0.05)
    tail_s = wire_s / 12
    fit.learn(num_tokens * BYTES_PER_TOKEN, prefill_s, max(tail_s, wire_s + prefill_s / 12 - prefill_s) + draw.uniform(0.001, 0.003))


def exposed(fit: TransferFit, num_tokens: int) -> float:
    return fit.cost.base_s + max(0.0, fit.cost.per_byte_s * num_tokens * BYTES_PER_TOKEN - TRUTH.seconds(num_tokens, 0))


def test_a_fast_wire_exposes_a_little() -> None:
    fit, draw = TransferFit(), random.Random(0)
    for _ in range(100):
        push(fit, draw.randrange(64, 3000), 1e9, draw)
    assert exposed(fit, 2000) < 0.01


@pytest.mark.parametrize("bytes_per_s", [25e6, 12.5e6])
def test_a_wire_slower_than_the_prompt_is_seen_within_twenty_pushes_and_its_recovery_too(bytes_per_s: float) -> None:
    fit, draw = TransferFit(), random.Random(0)
    for _ in range(100):
        push(fit, draw.randrange(64, 3000), 1e9, draw)
    for _ in range(20):
        push(fit, draw.randrange(64, 3000), bytes_per_s, draw)
    expected = 2000 * BYTES_PER_TOKEN / bytes_per_s + TRUTH.seconds(2000, 0) / 12 - TRUTH.seconds(2000, 0)
    assert exposed(fit, 2000) == pytest.approx(expected, rel=0.25)
    for _ in range(20):
        push(fit, draw.randrange(64, 3000), 1e9, draw)
    assert exposed(fit, 2000) < 0.02


def corrected(fit: DelayFit, predicted_s: float, now: float = 0.0) -> float:
    delay = fit.delay(now)
    return delay.overhead_s + delay.slowness * predicted_s


def delays(fit: DelayFit, count: int, slowness: float, draw: random.Random, *, late: int = 0) -> None:
    """At 0 s, first tokens at 8 ms and a factor; every `late`-th has others come in between, for ten times as long."""
    for i in range(count):
        predicted = draw.choice((0.01, draw.uniform(0.1, 2.0)))
        actual = (0.008 + slowness * predicted) * draw.gauss(1, 0.03)
        fit.learn(predicted, 10 * actual if late and i % late == 0 else actual, 0.0)


@pytest.mark.parametrize("late", [0, 6])
def test_delays_are_corrected_by_what_they_usually_were(late: int) -> None:
    fit = DelayFit()
    delays(fit, 60, 1.3, random.Random(0), late=late)
    assert corrected(fit, 0.01) == pytest.approx(0.021, rel=0.25)
    assert corrected(fit, 1.0) == pytest.approx(1.308, rel=0.15)


def test_a_node_that_becomes_slow_is_believed_within_twenty_delays() -> None:
    fit, draw = DelayFit(), random.Random(0)
    delays(fit, 60, 1.0, draw)
    delays(fit, 20, 2.0, draw)
    assert corrected(fit, 1.0) == pytest.approx(2.008, rel=0.15)


def test_how_late_a_burst_was_is_forgotten_though_nothing_newer_is_learned() -> None:
    fit = DelayFit()
    delays(fit, 60, 50.0, random.Random(0))
    assert corrected(fit, 1.0, FRESH_S) > 40.0
    assert corrected(fit, 1.0, FRESH_S + 0.1) == 1.0
