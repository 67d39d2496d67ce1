"""What became of a replay: each request's outcome, and the figures that policies are compared by. Pure."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import msgspec

from disaggd.observe.spread import Spread, spread
from disaggd.roles.receipts import make_receipt
from disaggd.simulator.cluster import Client

_NUMBER = re.compile(r"\d[\d,.]*\d|\d")


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
    """OpenAI's code, or what there is instead, if it was not finished, or not even taken."""
    why: str | None = None
    """What its client was told then."""
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
    prediction_error: float | None
    """Of the TTFT, as in receipts: (predicted − actual) / actual; None if nobody could tell."""
    breakeven_tokens: int | None
    """From so many uncached tokens on a prompt would have cost less elsewhere at that moment; None if nobody could tell."""
    queued_ms: float | None
    """In the router's prefill queue."""
    retries: int


def outcome_of(client: Client, start_s: float) -> Outcome:
    record = client.record
    times = None if record is None else record.timeline
    receipt = None if record is None else make_receipt(record, "", now=0.0, since_epoch_s=0.0)
    return Outcome(
        arrived_s=client.arrived_at - start_s,
        prompt_tokens=client.row.num_input,
        output_tokens=len(client.tokens_at),
        error=None if client.error is None else client.error.code or client.error.message,
        why=None if client.error is None else client.error.message,
        remote=record is not None and record.was_remote,
        reason="" if record is None else record.reason.partition(":")[0],
        decode=None if record is None else record.decode,
        prefill=None if record is None or not record.was_remote else record.prefill,
        cached_at_decode=0 if record is None else record.cached_at_decode,
        cached_at_prefill=0 if record is None else record.cached_at_prefill,
        ttft_ms=(client.tokens_at[0] - client.arrived_at) * 1e3 if client.tokens_at else None,
        gaps_ms=tuple((later - earlier) * 1e3 for earlier, later in pairwise(client.tokens_at)),
        ended_s=(client.tokens_at[-1] if client.tokens_at else client.arrived_at) - start_s,
        prediction_error=None if receipt is None else receipt.prediction_error,
        breakeven_tokens=None if record is None or record.predicted is None else record.predicted.breakeven_tokens,
        queued_ms=None if times is None or times.queued is None or times.dispatched is None else (times.dispatched - times.queued) * 1e3,
        retries=0 if record is None else record.retries,
    )


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Some requests under one policy."""

    policy: str
    requests: int
    failed: int
    failures: dict[str, int]
    """Those by what their clients were told, its numbers aside; the most frequent first."""
    seconds: float
    """From the first of them to the last token."""
    good_share: float
    """Requests that kept the SLO, of all."""
    goodput_per_s: float
    ttft_ms: Spread | None
    itl_ms: Spread | None
    queued_ms: Spread | None
    prediction_error: Spread | None
    """Of the TTFT, whichever way."""
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
        failures=dict(Counter(_NUMBER.sub("…", one.why or one.error) for one in outcomes if one.error is not None).most_common()),
        seconds=seconds,
        good_share=num_good / len(outcomes),
        goodput_per_s=num_good / seconds if seconds else 0.0,
        ttft_ms=spread(_known(one.ttft_ms for one in outcomes)),
        itl_ms=spread(gap for one in outcomes for gap in one.gaps_ms),
        queued_ms=spread(_known(one.queued_ms for one in outcomes)),
        prediction_error=spread(abs(error) for error in _known(one.prediction_error for one in outcomes)),
        remote_share=sum(one.remote for one in outcomes) / len(outcomes),
        prompt_tokens=sum(one.prompt_tokens for one in outcomes),
        cached_at_decode=sum(one.cached_at_decode for one in outcomes),
        cached_at_prefill=sum(one.cached_at_prefill for one in outcomes),
        retries=sum(one.retries for one in outcomes),
    )


def _known(values: Iterable[float | None]) -> Iterable[float]:
    return (value for value in values if value is not None)
