"""What became of a replay: each request's outcome, and the figures that policies are compared by. Pure."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import msgspec

from disaggd.cluster.request import RoutedSequence
from disaggd.observe.spread import Spread, spread
from disaggd.simulator.cluster import Client


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """What a good request keeps within; None: anything."""

    ttft_ms: float | None = None
    itl_ms: float | None = None
    """Its longest gap between two tokens."""

    def is_met(self, outcome: "Outcome") -> bool:
        if outcome.error is not None or outcome.ttft_ms is None:
            return False
        felt = ((self.ttft_ms, outcome.ttft_ms), (self.itl_ms, max(outcome.gaps_ms, default=0.0)))
        return all(limit is None or milliseconds <= limit for limit, milliseconds in felt)


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One request. Times in milliseconds, but for `arrived_s`."""

    arrived_s: float
    """After the first request."""
    prompt_tokens: int
    output_tokens: int
    error: str | None
    """Why it was not finished, or not even taken."""
    remote: bool
    """A prefill node computed its prompt."""
    reason: str
    """The code of the decision."""
    decode: str | None
    prefill: str | None
    cached_at_decode: int
    cached_at_prefill: int
    ttft_ms: float | None
    gaps_ms: tuple[float, ...]
    ended_s: float
    predicted_ttft_ms: float | None
    """When the decision was made; None if nobody could tell."""
    breakeven_tokens: int | None
    """From so many uncached tokens on a prompt would have cost less elsewhere at that moment; None if nobody could tell."""
    queued_ms: float | None
    """In the router's prefill queue."""
    retries: int

    @property
    def ttft_error(self) -> float | None:
        """By what part of what was felt the prediction was wrong."""
        if self.predicted_ttft_ms is None or self.ttft_ms is None:
            return None
        return abs(self.predicted_ttft_ms - self.ttft_ms) / self.ttft_ms


def outcome_of(client: Client, start_s: float) -> Outcome:
    record = client.record
    times = None if record is None else record.timeline
    predicted_s = None if record is None else _predicted_s(record)
    return Outcome(
        arrived_s=client.arrived_at - start_s,
        prompt_tokens=client.row.num_input,
        output_tokens=len(client.tokens_at),
        error="refused" if record is None else client.error.code or client.error.message if client.error is not None else None,
        remote=record is not None and record.was_remote,
        reason="" if record is None else record.reason.partition(":")[0],
        decode=None if record is None else record.decode,
        prefill=None if record is None or not record.was_remote else record.prefill,
        cached_at_decode=0 if record is None else record.cached_at_decode,
        cached_at_prefill=0 if record is None else record.cached_at_prefill,
        ttft_ms=(client.tokens_at[0] - client.arrived_at) * 1e3 if client.tokens_at else None,
        gaps_ms=tuple((later - earlier) * 1e3 for earlier, later in pairwise(client.tokens_at)),
        ended_s=(client.tokens_at[-1] if client.tokens_at else client.arrived_at) - start_s,
        predicted_ttft_ms=None if predicted_s is None else predicted_s * 1e3,
        breakeven_tokens=None if record is None or record.predicted is None else record.predicted.breakeven_tokens,
        queued_ms=None if times is None or times.queued is None or times.dispatched is None else (times.dispatched - times.queued) * 1e3,
        retries=0 if record is None else record.retries,
    )


def _predicted_s(record: RoutedSequence) -> float | None:
    """Of the way that was taken."""
    if record.predicted is None:
        return None
    return record.predicted.remote_ttft_s if record.was_remote else record.predicted.local_ttft_s


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Some requests under one policy."""

    policy: str
    requests: int
    failed: int
    seconds: float
    """From the first of them to the last token."""
    good_share: float
    """Requests that kept the SLO, of all."""
    goodput_per_s: float
    ttft_ms: Spread | None
    itl_ms: Spread | None
    queued_ms: Spread | None
    ttft_error: Spread | None
    """Predicted against felt, as a part of what was felt."""
    remote_share: float
    prompt_tokens: int
    cached_at_decode: int
    cached_at_prefill: int
    retries: int


def summarize(policy: str, outcomes: Sequence[Outcome], slo: Slo) -> Summary:
    seconds = max(one.ended_s for one in outcomes) - min(one.arrived_s for one in outcomes)
    num_good = sum(slo.is_met(one) for one in outcomes)
    return Summary(
        policy=policy,
        requests=len(outcomes),
        failed=sum(one.error is not None for one in outcomes),
        seconds=seconds,
        good_share=num_good / len(outcomes),
        goodput_per_s=num_good / seconds if seconds else 0.0,
        ttft_ms=spread(_known(one.ttft_ms for one in outcomes)),
        itl_ms=spread(gap for one in outcomes for gap in one.gaps_ms),
        queued_ms=spread(_known(one.queued_ms for one in outcomes)),
        ttft_error=spread(_known(one.ttft_error for one in outcomes)),
        remote_share=sum(one.remote for one in outcomes) / len(outcomes),
        prompt_tokens=sum(one.prompt_tokens for one in outcomes),
        cached_at_decode=sum(one.cached_at_decode for one in outcomes),
        cached_at_prefill=sum(one.cached_at_prefill for one in outcomes),
        retries=sum(one.retries for one in outcomes),
    )


def _known(values: Iterable[float | None]) -> Iterable[float]:
    return (value for value in values if value is not None)
