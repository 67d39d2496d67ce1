"""`LocalPrefills`: the prompts that a decode node prefills itself, timed from their arrival to their first token.

Runs on the compute thread. The router has them for its receipts, and the next decisions what they say of the arithmetic.
"""

from collections.abc import Callable
from dataclasses import dataclass

from disaggd.cluster.protocol import LocalPrefill
from disaggd.engine.scheduler import StepPlan
from disaggd.engine.sequence import Sequence
from disaggd.roles.compute import LinkId, Outbox
from disaggd.roles.deciding import Decider


@dataclass(slots=True)
class Span:
    """A prompt, until its first token."""

    arrived: float
    plain_ttft_s: float | None
    """What the arithmetic said of its first token, before it was corrected by experience."""
    begun: float | None = None
    """When its first step began."""


class LocalPrefills:
    """One decode node's. `clock` is monotonic seconds."""

    def __init__(self, decider: Decider, outbox: Outbox, clock: Callable[[], float]) -> None:
        self._decider = decider
        self._outbox = outbox
        self._clock = clock
        self._spans: dict[Sequence, Span] = {}

    def arrived(self, sequence: Sequence, plain_ttft_s: float | None) -> None:
        self._spans[sequence] = Span(self._clock(), plain_ttft_s)

    def step_began(self, plan: StepPlan, began: float) -> None:
        """Prompts that have a part of this step have begun."""
        if not self._spans:
            return
        for chunk in plan.chunks:
            if (span := self._spans.get(chunk.sequence)) is not None and span.begun is None:
                span.begun = began

    def tokens_came(self, sequence: Sequence, link: LinkId) -> None:
        """Tells the router, if they are the first of a prompt that was prefilled here."""
        span = self._spans.pop(sequence, None)
        if span is None or span.begun is None:
            return
        now = self._clock()
        if span.plain_ttft_s is not None and not sequence.num_preemptions:
            self._decider.first_token_came(span.plain_ttft_s, now - span.arrived, now)
        wait_ms, prefill_ms = (span.begun - span.arrived) * 1e3, (now - span.begun) * 1e3
        self._outbox.send(link, LocalPrefill(sequence.seq_id, sequence.attempt, sequence.num_cached, wait_ms, prefill_ms))

    def forget(self, sequence: Sequence) -> None:
        """It ends here; nothing happens if it was not prefilled here, or has tokens already."""
        self._spans.pop(sequence, None)
