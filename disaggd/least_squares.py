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
from math import exp, log, sqrt

NOISE = 0.1
"""Standard deviation of a sample, as a share of what was predicted."""

MEMORY = 20
"""Samples after which what a sample said has faded to a third."""

LEAST_TOLERANCE = log(1.5)
"""A sample that is off by less is never suspect."""

SUSPECT = 4
"""A sample is suspect when its error is so many times the usual one; more where the coefficients themselves are in doubt."""

AGREEING, RECENT = 3, 4
"""So many of the recent samples must be suspect to the same side for the world to have changed; fewer are stalls."""


class LeastSquares:
    """Coefficients θ ≥ 0 of `value = Σ θᵢ·inputᵢ`, beginning at `prior`.

    `deviations`: how far the truth may be from `prior`, per coefficient: what was measured deserves small ones. `least`: values under
    it need not be told apart.
    """

    def __init__(self, prior: Sequence[float], deviations: Sequence[float], *, least: float) -> None:
        assert len(prior) == len(deviations) and min(prior) >= 0 and min(deviations) > 0 and least > 0
        self.coefficients = tuple(prior)
        self.num_samples = 0
        self._deviations = tuple(deviations)
        self._least = least
        self._covariance = _diagonal(deviations)
        self._usual_error = NOISE
        """Mean |log(value / predicted)| of late."""
        self._suspects: deque[int] = deque(maxlen=RECENT)
        """Of each recent sample: 0 fine, 1 far above what was predicted, −1 far below."""

    def predict(self, inputs: Sequence[float]) -> float:
        """What `inputs` should come to; never negative."""
        return _product(self.coefficients, inputs)

    def learn(self, inputs: Sequence[float], value: float) -> None:
        """One sample. A lone stray is taken for the largest error that is not suspect; when most agree, all before is forgotten."""
        predicted = self.predict(inputs)
        scale = max(predicted, self._least)
        row = [x / (NOISE * scale) for x in inputs]
        believed = self._believe(scale, max(value, self._least), self._doubt(row))
        self._update(row, (believed - predicted) / (NOISE * scale))
        self.num_samples += 1

    def _doubt(self, row: Sequence[float]) -> float:
        """Standard deviation of what is predicted, that of a sample included, in units of the latter."""
        return sqrt(1 + max(0.0, _product(row, self._along(row))))

    def _along(self, row: Sequence[float]) -> list[float]:
        return [_product(line, row) for line in self._covariance]

    def _believe(self, predicted: float, value: float, doubt: float) -> float:
        error = log(value / predicted)
        tolerance = max(LEAST_TOLERANCE, SUSPECT * self._usual_error)
        self._usual_error += (min(abs(error) / doubt, tolerance) - self._usual_error) / MEMORY
        if abs(error) <= tolerance * doubt:
            self._suspects.append(0)
            return value
        side = 1 if error > 0 else -1
        self._suspects.append(side)
        if self._suspects.count(side) < AGREEING:
            return predicted * exp(side * tolerance * doubt)
        self._suspects.clear()
        self._begin_anew(growth=max(1.0, value / predicted))
        return value

    def _begin_anew(self, growth: float) -> None:
        """Be as unsure of each coefficient as at the start, or as it is large if that is more; `growth` times that in a larger world."""
        self._covariance = _diagonal([growth * max(pair) for pair in zip(self.coefficients, self._deviations, strict=True)])

    def _update(self, row: Sequence[float], error: float) -> None:
        """`row` and `error` in units of the noise."""
        direction = self._along(row)
        excitation = _product(row, direction)
        if excitation <= 0:
            return  # all inputs are 0
        gain = error / (1 + excitation)
        coefficients = [c + gain * d for c, d in zip(self.coefficients, direction, strict=True)]
        kept = 1 - 1 / MEMORY
        shrink = (kept - (1 - kept) / excitation) / (kept * (1 + excitation))
        for i, line in enumerate(self._covariance):
            for j in range(len(line)):
                line[j] -= direction[i] * direction[j] * shrink
        self.coefficients = tuple(_not_negative(coefficients, self._covariance))


def _diagonal(deviations: Sequence[float]) -> list[list[float]]:
    return [[d * d if i == j else 0.0 for j in range(len(deviations))] for i, d in enumerate(deviations)]


def _product(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(left, right, strict=True))


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
