"""What prefills, transfers and waits take, learned from what they took: the fits behind every prediction.

Plain Python, on the router's loop or a decode node's compute thread. Each fit is a few coefficients by `LeastSquares`, which forgets,
takes a lone stall for one, and believes a change when several samples agree. Knows no node and no clock.
"""

from collections import deque
from statistics import median

import msgspec

from disaggd.cluster.offer import PrefillCost, PrefillWork, TransferCost
from disaggd.least_squares import LeastSquares

LEAST_S = 2e-3
"""Nobody tells times to first token apart that differ by less."""

ENOUGH = 3
"""Prefills without which nothing is predicted of a node that did not measure itself."""

_MEASURED_WITHIN = 0.3
"""Share by which a node's own measurement may be off: it was alone on its machine."""

_UNKNOWN_PREFILL = (0.05, 2e-3, 1e-6)
_TAIL_S = 2e-3
_PER_BYTE_S = 1e-9
"""A gigabyte per second, as loopback and fast networks have; a slower link shows with the first long prompts."""

_LATE = 0.05
"""A push that outlasts its prompt by more than this share of the prompt, and the tail, was slower than the prompt."""

_HIDDEN = 0.7
"""A wire that was thought slower than the prompt and was hidden behind it takes less than the prompt did; nobody knows how much less."""

DELAYS_IN_MIND, ENOUGH_DELAYS = 24, 6

FRESH_S = 30.0
"""Delays older than this are forgotten. Those of a burst would else keep everybody from a way that then nobody tries, so that nothing newer
is learned of it."""


class PrefillFit:
    """Seconds that one node computes on a prompt."""

    def __init__(self, measured: PrefillCost | None = None) -> None:
        if measured is None:
            self._fit = LeastSquares((0.0, 0.0, 0.0), _UNKNOWN_PREFILL, least=LEAST_S)
        else:
            prior = (measured.base_s, measured.per_token_s, measured.per_token_context_s)
            floors = (LEAST_S, 1e-6, 1e-10)
            deviations = [max(floor, _MEASURED_WITHIN * value) for floor, value in zip(floors, prior, strict=True)]
            self._fit = LeastSquares(prior, deviations, least=LEAST_S)
        self._enough = ENOUGH if measured is None else 0

    @property
    def cost(self) -> PrefillCost | None:
        """None until enough is known."""
        return PrefillCost(*self._fit.coefficients) if self._fit.num_samples >= self._enough else None

    def learn(self, work: PrefillWork, seconds: float) -> None:
        """All that the node computed in the time: prompts that share steps would else each seem to take as long as all of them."""
        self._fit.learn((1.0, work.num_tokens, work.context), seconds)


class TransferFit:
    """Seconds of KV on one way from a prefill node to a decode node.

    The wire works while the prompt is computed, so one sees it only where it is slower: what is exposed after the first token is
    `base + max(0, per_byte · bytes − prefill)`. A push that the prompt's computing hid tells that the wire is no slower than that,
    and what is left of it after the last layer.
    """

    def __init__(self) -> None:
        self._tail = LeastSquares((_TAIL_S,), (10 * _TAIL_S,), least=LEAST_S)
        self._wire = LeastSquares((_PER_BYTE_S,), (10 * _PER_BYTE_S,), least=LEAST_S)

    @property
    def cost(self) -> TransferCost:
        return TransferCost(*self._tail.coefficients, *self._wire.coefficients)

    def learn(self, num_bytes: int, prefill_s: float, exposed_s: float) -> None:
        """A push of `num_bytes` ended `exposed_s` after the first token of a prompt that was computed for `prefill_s`."""
        tail_s, whole_s = self.cost.base_s, prefill_s + exposed_s
        if exposed_s > tail_s + max(LEAST_S, _LATE * prefill_s):
            return self._wire.learn((num_bytes,), whole_s - tail_s)
        if self._wire.predict((num_bytes,)) > whole_s:
            self._wire.learn((num_bytes,), _HIDDEN * whole_s)
        return self._tail.learn((1.0,), exposed_s)


class Delay(msgspec.Struct, frozen=True):
    """What is predicted by arithmetic comes after `overhead_s + slowness · predicted`."""

    overhead_s: float = 0.0
    slowness: float = 1.0


class DelayFit:
    """How late things are against the arithmetic. Hops, steps under way, and a machine that is shared.

    Medians, the factor of the longest third of the last few, the constant of the shortest: some are late by any measure, because of what
    came in between and nobody could foresee, and that is no reason to predict the others later. Times are seconds on any one clock.
    """

    def __init__(self) -> None:
        self._recent = deque[tuple[float, float, float]](maxlen=DELAYS_IN_MIND)
        """When; predicted and actual seconds."""

    def learn(self, predicted_s: float, actual_s: float, now: float) -> None:
        """The arithmetic had said `predicted_s`."""
        self._recent.append((now, predicted_s, actual_s))

    def delay(self, now: float) -> Delay:
        """By what was learned of late; none where that is too little."""
        by_length = sorted((predicted, actual) for at, predicted, actual in self._recent if now - at <= FRESH_S)
        if len(by_length) < ENOUGH_DELAYS:
            return Delay()
        third = len(by_length) // 3
        shorter, longer = by_length[:third], by_length[-third:]
        slowness = median(actual / max(predicted, LEAST_S) for predicted, actual in longer)
        return Delay(max(0.0, median(actual - slowness * predicted for predicted, actual in shorter)), slowness)
