"""Least squares that forget: coefficients found under noise, changes followed, strays ignored, nothing below zero."""

import random

import pytest

from disaggd.least_squares import LeastSquares

TRUTH = (0.004, 0.4e-3, 2e-8)
"""Seconds of a prefill: base, per token, per token and context."""


def inputs(num_tokens: int) -> tuple[float, float, float]:
    return (1.0, num_tokens, num_tokens * num_tokens / 2)


def unsure() -> LeastSquares:
    return LeastSquares((0.0, 1e-3, 0.0), (0.1, 1e-3, 1e-6), least=1e-4)


def value(num_tokens: int, truth: tuple[float, ...] = TRUTH) -> float:
    return sum(c * x for c, x in zip(truth, inputs(num_tokens), strict=True))


def feed(fit: LeastSquares, draw: random.Random, count: int, truth: tuple[float, ...] = TRUTH, noise: float = 0.05) -> None:
    for _ in range(count):
        num_tokens = draw.randrange(16, 4096)
        fit.learn(inputs(num_tokens), value(num_tokens, truth) * draw.gauss(1, noise))


def error(fit: LeastSquares, num_tokens: int, truth: tuple[float, ...] = TRUTH) -> float:
    return abs(fit.predict(inputs(num_tokens)) / value(num_tokens, truth) - 1)


def test_without_noise_the_coefficients_themselves_are_found() -> None:
    fit = unsure()
    feed(fit, random.Random(0), 60, noise=0.0)
    assert fit.coefficients == pytest.approx(TRUTH, rel=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_under_noise_it_predicts_short_and_long(seed: int) -> None:
    fit = unsure()
    feed(fit, random.Random(seed), 100)
    assert max(error(fit, num_tokens) for num_tokens in (64, 256, 1024, 4096)) < 0.1


@pytest.mark.parametrize("factor", [0.1, 0.5, 2, 80])
@pytest.mark.parametrize("seed", range(3))
def test_a_changed_world_is_followed_within_twenty_samples(factor: float, seed: int) -> None:
    fit, draw = unsure(), random.Random(seed)
    feed(fit, draw, 200)
    changed = tuple(factor * coefficient for coefficient in TRUTH)
    feed(fit, draw, 20, changed)
    assert max(error(fit, num_tokens, changed) for num_tokens in (256, 1024, 4096)) < 0.2


def test_one_coefficient_may_change_alone() -> None:
    fit, draw = LeastSquares((0.001, 1e-9), (0.01, 1e-9), least=1e-4), random.Random(0)
    for seconds_per_byte in (0.5e-9, 40e-9):
        for _ in range(20):
            num_bytes = draw.randrange(1_000_000, 50_000_000)
            fit.learn((1.0, num_bytes), 0.002 + seconds_per_byte * num_bytes * draw.gauss(1, 0.05))
    assert fit.coefficients[1] == pytest.approx(40e-9, rel=0.1)


@pytest.mark.parametrize("stalls", [1, 2])
def test_a_stall_is_no_news(stalls: int) -> None:
    fit = unsure()
    feed(fit, random.Random(0), 100)
    for _ in range(stalls):
        fit.learn(inputs(1024), 50 * value(1024))
    assert error(fit, 1024) < 0.2


def test_a_measured_prior_withstands_a_first_stall_and_a_guess_believes_it() -> None:
    measured = LeastSquares(TRUTH, [c / 10 for c in TRUTH], least=1e-4)
    measured.learn(inputs(1024), 50 * value(1024))
    assert error(measured, 1024) < 0.6
    fresh = unsure()
    fresh.learn(inputs(1024), 50 * value(1024))
    assert fresh.predict(inputs(1024)) == pytest.approx(50 * value(1024), rel=0.2)


def test_what_was_never_tried_is_believed_at_once() -> None:
    """Decode steps by the hundred say nothing of what a prompt costs."""
    fit = LeastSquares((0.0, 0.0), (0.01, 1e-3), least=1e-4)
    for _ in range(200):
        fit.learn((1.0, 0.0), 0.005)
    fit.learn((1.0, 256), 0.25)
    assert fit.predict((1.0, 256)) == pytest.approx(0.25, rel=0.05)


def test_thousands_of_like_samples_leave_the_rest_alone() -> None:
    fit = LeastSquares((0.01, 1e-3), (0.01, 1e-3), least=1e-4)
    draw = random.Random(0)
    for _ in range(100):
        num_tokens = draw.randrange(0, 512)
        fit.learn((1.0, num_tokens), 0.015 + 0.4e-3 * num_tokens)
    for _ in range(5000):
        fit.learn((1.0, 0.0), 0.015 * draw.gauss(1, 0.1))
    assert fit.coefficients[1] == pytest.approx(0.4e-3, rel=0.05)
    fit.learn((1.0, 512), 1.3 * (0.015 + 0.4e-3 * 512))
    assert fit.coefficients[1] < 0.4e-3 * 1.35


@pytest.mark.parametrize("seed", range(10))
def test_no_coefficient_is_ever_negative(seed: int) -> None:
    fit, draw = unsure(), random.Random(seed)
    for _ in range(300):
        fit.learn(inputs(draw.randrange(1, 4096)), draw.lognormvariate(-4, 2))
        assert min(fit.coefficients) >= 0


def test_what_a_coefficient_may_not_be_the_others_make_up_for() -> None:
    """A cost that grows ever slower would want a negative quadratic part."""
    fit = unsure()
    for _ in range(30):
        for num_tokens in (256, 512, 1024, 2048):
            fit.learn(inputs(num_tokens), 0.4e-3 * num_tokens**0.9)
    assert fit.coefficients[2] == 0
    assert max(abs(fit.predict(inputs(n)) / (0.4e-3 * n**0.9) - 1) for n in (256, 2048)) < 0.15


def test_nothing_is_learned_from_nothing() -> None:
    fit = unsure()
    before = fit.coefficients
    fit.learn((0.0, 0.0, 0.0), 1.0)
    assert fit.coefficients == before
