"""Receipts as a router writes them, for those who show them: a local one, a remote one, one that was tried again, one that runs."""

from disaggd.observe.receipts import Attempt, CachedTokens, Predicted, PrefillClock, Receipt, Span, Spans

PREDICTED = Predicted(local_ttft_ms=310.0, remote_ttft_ms=120.0, local_damage_ms=14.0, breakeven_tokens=430)


def local_receipt(request_id: str = "local-1", **fields: object) -> Receipt:
    spans = (Span("decide", "d0", 0.0, 1.5), Span("prefill_wait", "d0", 1.0, 2.0), Span("prefill", "d0", 2.0, 30.0))
    values: dict[str, object] = {
        "decision": "local",
        "reason": "short: 40 uncached tokens <= 512",
        "predicted": Predicted(local_ttft_ms=28.0, remote_ttft_ms=55.0, local_damage_ms=0.0),
        "prediction_error": -0.09677,
        "decode_node": "d0",
        "prompt_tokens": 40,
        "output_tokens": 16,
        "spans_ms": Spans(prefill_wait=1.0, prefill=28.0, first_token=31.0, decode=170.0, total=201.0),
        "finish_reason": "length",
        "phase": "done",
        "arrived_at": 1_800_000_000.0,
    }
    attempt = Attempt(
        decision="local",
        reason="short: 40 uncached tokens <= 512",
        decode_node="d0",
        start_ms=0.0,
        end_ms=201.0,
        spans=(*spans, Span("decode", "d0", 31.0, 201.0)),
    )
    return Receipt(id=request_id, model="tiny", **{"attempts": (attempt,), **values, **fields})  # type: ignore[arg-type]


def remote_attempt(start_ms: float = 0.0, **fields: object) -> Attempt:
    at = start_ms
    values: dict[str, object] = {
        "decision": "remote",
        "reason": "long: 1500 uncached tokens > 512",
        "predicted": PREDICTED,
        "prefill_node": "p0",
        "decode_node": "d0",
        "queue_depth": 5,
        "jobs_ahead": 2,
        "start_ms": at,
        "end_ms": at + 1200.0,
        "spans": (
            Span("decide", "d0", at, at + 1.5),
            Span("queue", None, at + 1.5, at + 20.0),
            Span("grant", "d0", at + 20.0, at + 21.0),
            Span("prefill_wait", "p0", at + 21.5, at + 23.0),
            Span("prefill", "p0", at + 23.0, at + 130.0),
            Span("transfer", "p0", at + 40.0, at + 142.0),
            Span("decode", "d0", at + 131.0, at + 1200.0),
        ),
    }
    return Attempt(**{**values, **fields})  # type: ignore[arg-type]


def remote_receipt(request_id: str = "remote-1", **fields: object) -> Receipt:
    values: dict[str, object] = {
        "decision": "remote",
        "reason": "long: 1500 uncached tokens > 512",
        "predicted": PREDICTED,
        "prediction_error": -0.08397,
        "prefill_node": "p0",
        "decode_node": "d0",
        "prompt_tokens": 1500,
        "output_tokens": 128,
        "cached_tokens": CachedTokens(decode=0, prefill=64),
        "kv_bytes": 9_100_000,
        "spans_ms": Spans(
            queue=19.5,
            grant=1.0,
            prefill_wait=1.5,
            prefill=107.0,
            transfer=102.0,
            transfer_exposed=12.0,
            first_token=131.0,
            decode=1069.0,
            total=1200.0,
        ),
        "prefill_clock_ms": PrefillClock(first_token_reported=108.5, last_handle_done=120.5),
        "finish_reason": "length",
        "phase": "done",
        "arrived_at": 1_800_000_001.0,
        "attempts": (remote_attempt(),),
    }
    return Receipt(id=request_id, model="tiny", **{**values, **fields})  # type: ignore[arg-type]


def retried_receipt(request_id: str = "retried-1", **fields: object) -> Receipt:
    """Its prefill node was lost amid the prompt; what it had begun ended then."""
    lost = remote_attempt(
        end_ms=90.0,
        failure="its prefill failed or is lost",
        spans=(Span("decide", "d0", 0.0, 1.5), Span("queue", None, 1.5, 2.0), Span("prefill", "p0", 2.0, 90.0)),
    )
    again = remote_attempt(90.0, prefill_node="p1")
    return remote_receipt(
        request_id,
        attempts=(lost, again),
        retries=1,
        prefill_node="p1",
        prediction_error=None,
        spans_ms=Spans(first_token=221.0, total=1290.0),
        **fields,
    )


def running_receipt(request_id: str = "running-1", **fields: object) -> Receipt:
    """In the prefill queue for 40 ms."""
    waiting = remote_attempt(end_ms=None, prefill_node=None, spans=(Span("decide", "d0", 0.0, 1.5), Span("queue", None, 1.5)))
    values: dict[str, object] = {
        "decision": "remote",
        "reason": waiting.reason,
        "decode_node": "d0",
        "prompt_tokens": 1500,
        "phase": "queued",
        "age_ms": 41.5,
        "arrived_at": 1_800_000_002.0,
        "attempts": (waiting,),
    }
    return Receipt(id=request_id, model="tiny", **{**values, **fields})  # type: ignore[arg-type]
