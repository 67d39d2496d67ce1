"""A receipt of what the router's record says of a request. Runs on the router's loop; pure functions.

The router's clock and the nodes' are never compared: what a node measured of a job is counted back from the frame that
reported it, as if that had taken no time. The way there is what may be long, for a node looks at its frames between two steps.
"""

from collections.abc import Iterator

from disaggd.cluster.offer import Predicted as PredictedSeconds
from disaggd.cluster.protocol import PrefixOutcome
from disaggd.cluster.request import PastAttempt, RoutedSequence, Timeline
from disaggd.cluster.request import PrefixPush as PushedPrefix
from disaggd.ids import NodeName
from disaggd.observe.receipts import Attempt, CachedTokens, Decision, Predicted, PrefillClock, PrefixPush, Receipt, Span, SpanName, Spans

_PUSHED: tuple[PrefixOutcome | None, ...] = (None, "landed", "failed", "stopped")
"""Outcomes of prefixes that were under way, or are."""


def make_receipt(record: RoutedSequence, model: str, now: float, since_epoch_s: float) -> Receipt:
    """What happened to `record` so far, in the terms that users rely on. `since_epoch_s` is the wall clock at 0 of the router's."""
    times = record.timeline
    decision = _decision(record.was_remote, record.reason)
    return Receipt(
        id=record.request.id,
        key=record.request.key,
        model=model,
        decision=decision,
        reason=record.reason or None,
        predicted=_predicted(record.predicted),
        prediction_error=None if record.past else _prediction_error(record),
        prefill_node=record.prefill if record.was_remote else None,
        decode_node=record.decode,
        prompt_tokens=len(record.request.prompt),
        output_tokens=len(record.sent),
        cached_tokens=CachedTokens(record.cached_at_decode, record.cached_at_prefill),
        kv_bytes=record.kv_bytes,
        is_pushing=record.was_remote and record.grant is not None and times.last_done_ms is None,
        prefix_push=_prefix_push(record.prefix_push),
        retries=record.retries,
        spans_ms=_durations(times, is_remote=record.was_remote),
        prefill_clock_ms=_prefill_clock(times) if record.was_remote else None,
        finish_reason=record.finish_reason,
        error=record.error,
        phase=record.phase.value,
        policy=record.request.override,
        priority=record.request.priority,
        session=record.request.session,
        arrived_at=round(since_epoch_s + times.arrived, 6),
        age_ms=_ms(times.arrived, now) if times.finished is None else None,
        attempts=tuple(_attempts(record)),
    )


def _decision(was_remote: bool, reason: str) -> Decision | None:
    return None if reason == "" else "remote" if was_remote else "local"


def _prefix_push(push: PushedPrefix | None) -> PrefixPush | None:
    if push is None:
        return None
    return PrefixPush(outcome=push.outcome, tokens=push.num_tokens, kv_bytes=push.kv_bytes, ms=_rounded(push.took_ms))


def _predicted(predicted: PredictedSeconds | None) -> Predicted | None:
    if predicted is None:
        return None
    return Predicted(
        local_ttft_ms=_in_ms(predicted.local_ttft_s),
        remote_ttft_ms=_in_ms(predicted.remote_ttft_s),
        local_damage_ms=_in_ms(predicted.local_damage_s),
        breakeven_tokens=predicted.breakeven_tokens,
    )


def _prediction_error(record: RoutedSequence) -> float | None:
    predicted, actual = record.predicted, _decided_to_first_token_s(record.timeline, was_remote=record.was_remote)
    expected = None if predicted is None else predicted.remote_ttft_s if record.was_remote else predicted.local_ttft_s
    return None if expected is None or not actual else round(expected / actual - 1, 4)


def _decided_to_first_token_s(times: Timeline, *, was_remote: bool) -> float | None:
    """On the decode node's own clock if it prefilled: the frame that told of its decision may have waited for the first step.

    Elsewhere both ends are frames from a node, so that a hop in each cancels out.
    """
    if times.resumed is None or times.decided is None:
        return None
    if not was_remote:
        return None if times.local_wait_ms is None else (times.local_wait_ms + times.prefill_ms) / 1e3
    return times.resumed - times.decided if times.resumed > times.decided else None


def _durations(times: Timeline, *, is_remote: bool) -> Spans:
    reported, last_done = times.first_token_reported_ms, times.last_done_ms
    if is_remote:
        wait, prefill = (None, None) if reported is None else (reported - times.prefill_ms, times.prefill_ms)
    elif times.local_wait_ms is not None:
        wait, prefill = times.local_wait_ms, times.prefill_ms
    else:
        wait, prefill = None, _ms(times.placed, times.resumed)
    return Spans(
        queue=_ms(times.queued, times.dispatched),
        grant=_ms(times.granting, times.dispatched),
        prefill_wait=_rounded(wait),
        prefill=_rounded(prefill),
        transfer=_rounded(None if times.first_post_ms is None or last_done is None else last_done - times.first_post_ms),
        transfer_exposed=_rounded(None if reported is None or last_done is None else max(0.0, last_done - reported)),
        first_token=_ms(times.arrived, times.first_token),
        decode=_ms(times.first_token, times.finished),
        total=_ms(times.arrived, times.finished),
    )


def _prefill_clock(times: Timeline) -> PrefillClock | None:
    if times.first_token_reported_ms is None:
        return None
    return PrefillClock(first_token_reported=_rounded(times.first_token_reported_ms), last_handle_done=_rounded(times.last_done_ms))


# ── attempts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _attempts(record: RoutedSequence) -> Iterator[Attempt]:
    """Each begins where the last one ended."""
    arrived = began = record.timeline.arrived
    for number, past in enumerate(record.past):
        yield _attempt(past, arrived, began, _push_of(record, number), past.failure, has_decoded=True)
        began = past.ended
    yield _attempt(record, arrived, began, _push_of(record, record.attempt), None, has_decoded=len(record.sent) > 1)


def _push_of(record: RoutedSequence, attempt: int) -> PushedPrefix | None:
    """What was pushed for it to the prefill node, or still is; not what nobody began to."""
    push = record.prefix_push
    return push if push is not None and push.attempt == attempt and push.outcome in _PUSHED else None


def _attempt(
    of: PastAttempt | RoutedSequence, arrived: float, began: float, push: PushedPrefix | None, failure: str | None, *, has_decoded: bool
) -> Attempt:
    times = of.timeline
    spans = (
        Span(name, node, _rounded_ms(start - arrived), None if end is None else _rounded_ms(end - arrived))
        for name, node, start, end in _spans(times, of.was_remote, of.decode, of.prefill, push)
        if name != "decode" or has_decoded
    )
    return Attempt(
        decision=_decision(of.was_remote, of.reason),
        reason=of.reason or None,
        predicted=_predicted(of.predicted),
        prefill_node=of.prefill if of.was_remote else None,
        decode_node=of.decode,
        queue_depth=times.queue_depth,
        jobs_ahead=times.jobs_ahead,
        start_ms=_rounded_ms(began - arrived),
        end_ms=_ms(arrived, times.ended),
        failure=failure,
        spans=tuple(spans),
    )


PlacedSpan = tuple[SpanName, NodeName | None, float, float | None]
"""In seconds on the router's clock; None for an end that has not come."""


def _spans(
    times: Timeline, was_remote: bool, decode: NodeName | None, prefill: NodeName | None, push: PushedPrefix | None
) -> Iterator[PlacedSpan]:
    """Those that began; what the end of the attempt cut short ends with it."""
    if not was_remote and times.decided is not None and times.placed is not None:
        yield from _spans_at_decode(times, times.placed, times.decided, decode)
    elif times.placed is not None:
        yield "decide", decode, times.placed, _first(times.decided, times.ended)
    if times.queued is not None:
        yield "queue", None, times.queued, _first(times.granting, times.dispatched, times.ended)
    if times.granting is not None:
        yield "grant", decode, times.granting, _first(times.dispatched, times.ended)
    if was_remote and times.dispatched is not None:
        yield from _spans_elsewhere(times, times.dispatched, prefill, push)
    if times.resumed is not None:
        yield "decode", decode, times.resumed, times.ended


def _spans_elsewhere(times: Timeline, dispatched: float, node: NodeName | None, push: PushedPrefix | None) -> Iterator[PlacedSpan]:
    came = dispatched
    if times.prefilled is not None and times.first_token_reported_ms is not None:
        came = max(dispatched, times.prefilled - times.first_token_reported_ms / 1e3)
    if push is not None:
        yield "prefix_push", push.source, came, times.ended if push.took_ms is None else came + push.took_ms / 1e3
    if times.prefilled is None or times.first_token_reported_ms is None:
        yield "prefill", node, dispatched, _first(times.resumed, times.ended)
    else:
        began = max(came, times.prefilled - times.prefill_ms / 1e3)
        yield "prefill_wait", node, dispatched, began
        yield "prefill", node, began, times.prefilled
    if times.first_post_ms is not None and times.last_done_ms is not None:
        yield "transfer", node, came + times.first_post_ms / 1e3, came + times.last_done_ms / 1e3


def _spans_at_decode(times: Timeline, placed: float, decided: float, node: NodeName | None) -> Iterator[PlacedSpan]:
    if times.local_wait_ms is None or times.resumed is None:
        yield "decide", node, placed, decided
        yield "prefill", node, decided, _first(times.resumed, times.ended)
        return
    began = max(placed, times.resumed - times.prefill_ms / 1e3)
    came = max(placed, min(decided, began - times.local_wait_ms / 1e3))
    yield "decide", node, placed, came
    yield "prefill_wait", node, came, began
    yield "prefill", node, began, times.resumed


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _first(*times: float | None) -> float | None:
    return next((time for time in times if time is not None), None)


def _ms(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else _rounded_ms(end - start)


def _rounded_ms(span_s: float) -> float:
    return round(span_s * 1e3, 3)


def _in_ms(span_s: float | None) -> float | None:
    return None if span_s is None else _rounded_ms(span_s)


def _rounded(span_ms: float | None) -> float | None:
    return None if span_ms is None else round(span_ms, 3)
