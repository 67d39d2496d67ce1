"""What a step takes, learned from the steps that were taken; and how much prefill a step may carry beside decodes.

    seconds = base + per_decode · decodes + per_decode_context · their context + per_token · n + per_token_context · n · (start + n/2)

for n prefill tokens that follow `start` others: a decode reads its whole context, a prefill token half of its own chunk besides.

Owned by the compute thread alone. Knows nothing of who waits for a step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

from disaggd.engine.scheduler import Chunk, StepPlan
from disaggd.least_squares import LeastSquares

ENOUGH = 8
"""Steps without which nothing is predicted, unless the node measured itself."""

LEAST_S = 1e-4
"""Nobody waits for a tenth of a millisecond."""

INFORMED = 32
"""So many steps are all learned from."""

DECODES_PER_SAMPLE = 4
"""Of steps that only decode, one in so many is learned from thereafter: they are all alike, and learning takes 50 µs."""

AIM = 0.85
"""Steps are sized for such a part of the target: they vary, and what the node does between two of them counts too."""

LEAST_SHARE = 0.25
"""A step may be longer than without prefill by such a part, however near the target the decodes come by themselves: else a prompt
would wait until some of them end."""

_UNKNOWN = (10e-3, 2e-3, 1e-6, 2e-3, 1e-6)
"""Deviations of the coefficients before a step was measured: a slow machine's."""


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What a step has to do, as far as its cost goes."""

    decodes: int
    decode_context: int
    """Tokens that they attend to, all together."""
    prefill_tokens: int
    prefill_context: float
    """Σ n · (start + n/2) over the prefill chunks."""

    @property
    def inputs(self) -> tuple[float, ...]:
        return (1.0, self.decodes, self.decode_context, self.prefill_tokens, self.prefill_context)


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds; see the module's formula."""

    base_s: float
    per_decode_s: float
    per_decode_context_s: float
    per_token_s: float
    per_token_context_s: float

    def decode_step_s(self, decodes: int, context: int) -> float:
        """A step of decodes only, or of nothing."""
        return self.base_s + self.per_decode_s * decodes + self.per_decode_context_s * context

    def prefill_s(self, num_tokens: int, start: int) -> float:
        """What `num_tokens` prefill tokens after `start` others add to steps that are taken anyway."""
        return self.per_token_s * num_tokens + self.per_token_context_s * num_tokens * (start + num_tokens / 2)

    def prefill_tokens_in(self, seconds: float, start: int) -> float:
        """How many tokens after `start` others take `seconds`: the inverse of `prefill_s`."""
        if seconds <= 0:
            return 0.0
        slope, bend = self.per_token_s + self.per_token_context_s * start, self.per_token_context_s / 2
        root = slope + sqrt(slope * slope + 4 * bend * seconds)
        return 2 * seconds / root if root else float("inf")


def load_of(plan: StepPlan) -> StepLoad:
    """One pass over the chunks: a chunk of one token that samples is a decode."""
    decodes = decode_context = prefill_tokens = 0
    prefill_context = 0.0
    for chunk in plan.chunks:
        if _is_decode(chunk):
            decodes += 1
            decode_context += chunk.end
        else:
            num_tokens = chunk.end - chunk.start
            prefill_tokens += num_tokens
            prefill_context += num_tokens * (chunk.start + num_tokens / 2)
    return StepLoad(decodes, decode_context, prefill_tokens, prefill_context)


def _is_decode(chunk: Chunk) -> bool:
    return chunk.samples and chunk.end - chunk.start == 1


@dataclass(frozen=True, slots=True)
class BegunStep:
    """A step that was launched."""

    load: StepLoad
    at: float


class StepPace:
    """Learns from every step, and sizes the prefill of those that decodes wait for.

    `itl_target_s`: with decodes running, no step should be predicted to take longer, but for `LEAST_SHARE`; None: prefill has whatever the
    step's tokens allow.
    `clock` is monotonic seconds.
    """

    def __init__(self, itl_target_s: float | None, clock: Callable[[], float]) -> None:
        self.itl_target_s = itl_target_s
        self.is_expecting = False
        """Sequences may be resumed at any moment whose first token is out already: their second comes with the step after the one that is
        under way then, so that no step may take more than half of the target."""
        self._clock = clock
        self._last_settled = 0.0
        self._num_decode_steps = 0
        self._fit = LeastSquares((0.0,) * len(_UNKNOWN), _UNKNOWN, least=LEAST_S)

    @property
    def cost(self) -> StepCost | None:
        """None until enough steps were measured."""
        return StepCost(*self._fit.coefficients) if self._fit.num_samples >= ENOUGH else None

    def begin(self, plan: StepPlan) -> BegunStep:
        """To be called right before the plan is launched."""
        return BegunStep(load_of(plan), self._clock())

    def predict(self, plan: StepPlan) -> float | None:
        """Seconds of a step; None until enough steps were measured."""
        return None if self.cost is None else self._fit.predict(load_of(plan).inputs)

    def settled(self, step: BegunStep, *, learns: bool = True) -> None:
        """Its tokens are here. Where a device computes ahead of the host, a step begins when the one before ends."""
        now = self._clock()
        if learns and self._is_sample(step.load):
            self._fit.learn(step.load.inputs, now - max(step.at, self._last_settled))
        self._last_settled = now

    def _is_sample(self, load: StepLoad) -> bool:
        if load.prefill_tokens or self._fit.num_samples < INFORMED:
            return True
        self._num_decode_steps += 1
        return self._num_decode_steps % DECODES_PER_SAMPLE == 0

    def prefill_tokens(self, decodes: int, decode_context: int, start: int) -> int | None:
        """How many prefill tokens, the first of them after `start` others, a step beside these decodes has time for.

        None: no limit; so it is without decodes, unless some are expected.
        """
        cost = self.cost
        if self.itl_target_s is None or cost is None or not (decodes or self.is_expecting):
            return None
        decode_step_s = cost.decode_step_s(decodes, decode_context)
        left_s = AIM * self.itl_target_s / (2 if self.is_expecting else 1) - decode_step_s
        tokens = cost.prefill_tokens_in(max(left_s, LEAST_SHARE * decode_step_s), start)
        return None if tokens == float("inf") else int(tokens)
