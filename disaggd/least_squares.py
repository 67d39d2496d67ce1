"""Coefficients of a cost, learned from one measured sample after another: recursive least squares with forgetting.

Plain Python, some ten microseconds a sample: the router has no numpy, and a decode node learns from every step. Knows nothing of what is
measured.

    K = P·x / (1 + xᵀPx)      θ ← θ + K·(y − xᵀθ)      P ← P − (Px)(Px)ᵀ · β / (λ (1 + xᵀPx)),   β = λ − (1 − λ) / xᵀPx

with x and y in units of the noise, which is a share of the predicted value: errors of a short job count as those of a long one. What is
forgotten is only what the sample speaks of (Kulhavý's directional forgetting): thousands of decode steps leave what was learned of
prefills as it was, and the covariance cannot wind up.
"""

from collections import deque
from collections.abc import Sequence
from math import exp, log

NOISE = 0.1
"""Standard deviation of a sample, as a share of what was predicted."""

MEMORY = 20
"""Samples after which what a sample said has faded to a third."""

LEAST_TOLERANCE = log(1.5)
"""A sample that is off by less is never suspect."""

SUSPECT = 4
"""A sample is suspect when its error is so many times the usual one."""

AGREEING, RECENT = 3, 4
"""So many of the recent samples must be suspect to the same side for the world to have changed; fewer are stalls."""

BEGINNING = 3
"""The first samples are believed, whatever they say, unless the coefficients were measured before."""


class LeastSquares:
    """Coefficients θ ≥ 0 of `value = Σ θᵢ·inputᵢ`, beginning at `prior`.

    `deviations`: how far the truth may be from `prior`, per coefficient. `least`: values under it need not be told apart.
    `is_measured`: `prior` is worth some samples; else the first ones are believed as they are.
    """

    def __init__(self, prior: Sequence[float], deviations: Sequence[float], *, least: float, is_measured: bool = False) -> None:
        assert len(prior) == len(deviations) and min(prior) >= 0 and min(deviations) > 0 and least > 0
        self.coefficients = tuple(prior)
        self.num_samples = 0
        self._deviations = tuple(deviations)
        self._least = least
        self._believed = 0 if is_measured else BEGINNING
        self._covariance: list[list[float]] = []
        self._usual_error = NOISE
        """Mean |log(value / predicted)| of late."""
        self._suspects: deque[int] = deque(maxlen=RECENT)
        """Of each recent sample: 0 fine, 1 far above what was predicted, −1 far below."""
        self._begin_anew()

    def predict(self, inputs: Sequence[float]) -> float:
        """What `inputs` should come to; never negative."""
        return sum(coefficient * x for coefficient, x in zip(self.coefficients, inputs, strict=True))

    def learn(self, inputs: Sequence[float], value: float) -> None:
        """One sample. A lone stray is taken for the largest error that is not suspect; when most agree, all before is forgotten."""
        predicted = self.predict(inputs)
        believed = self._believe(max(predicted, self._least), max(value, self._least))
        self._update(inputs, believed - predicted, NOISE * max(predicted, self._least))
        self.num_samples += 1

    def _believe(self, predicted: float, value: float) -> float:
        if self.num_samples < self._believed:
            return value
        error = log(value / predicted)
        tolerance = max(LEAST_TOLERANCE, SUSPECT * self._usual_error)
        self._usual_error += (min(abs(error), tolerance) - self._usual_error) / MEMORY
        if abs(error) <= tolerance:
            self._suspects.append(0)
            return value
        side = 1 if error > 0 else -1
        self._suspects.append(side)
        if self._suspects.count(side) < AGREEING:
            return predicted * exp(side * tolerance)
        self._suspects.clear()
        self._begin_anew(growth=max(1.0, value / predicted))
        return value

    def _begin_anew(self, growth: float = 1.0) -> None:
        """As unsure of each coefficient as at the start, or as of its present size if that is more; `growth` times that in a larger world."""
        deviations = [growth * max(pair) for pair in zip(self.coefficients, self._deviations, strict=True)]
        self._covariance = [[d * d if i == j else 0.0 for j in range(len(deviations))] for i, d in enumerate(deviations)]

    def _update(self, inputs: Sequence[float], error: float, noise: float) -> None:
        row = [x / noise for x in inputs]
        direction = [sum(p * x for p, x in zip(line, row, strict=True)) for line in self._covariance]
        excitation = sum(d * x for d, x in zip(direction, row, strict=True))
        if excitation <= 0:
            return  # all inputs are 0
        gain = error / noise / (1 + excitation)
        coefficients = [c + gain * d for c, d in zip(self.coefficients, direction, strict=True)]
        kept = 1 - 1 / MEMORY
        shrink = (kept - (1 - kept) / excitation) / (kept * (1 + excitation))
        for i, line in enumerate(self._covariance):
            for j in range(len(line)):
                line[j] -= direction[i] * direction[j] * shrink
        self.coefficients = tuple(_not_negative(coefficients, self._covariance))


def _not_negative(coefficients: list[float], covariance: list[list[float]]) -> list[float]:
    """The nearest coefficients ≥ 0 as `covariance` measures distance: what one may not be, those that vary with it make up for."""
    for _ in coefficients:
        worst = min(range(len(coefficients)), key=coefficients.__getitem__)
        if coefficients[worst] >= 0 or covariance[worst][worst] <= 0:
            break
        step = coefficients[worst] / covariance[worst][worst]
        coefficients = [c - step * line[worst] for c, line in zip(coefficients, covariance, strict=True)]
        coefficients[worst] = 0.0
    return [max(0.0, c) for c in coefficients]
