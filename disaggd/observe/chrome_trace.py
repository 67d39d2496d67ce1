"""A recording as a trace in Chrome's trace event format, which https://ui.perfetto.dev and chrome://tracing open.

A process per node and one for the router; in the router's a track per request, in a node's one per activity, or several
where it does so many at once: slices of a track nest, and never overlap otherwise. Times are whole microseconds since the
recorder began, so that a slice that ends where the next one begins does so exactly. Pure functions: a generator that yields
a trace in pieces, so that whoever sends it can do other things between two.
"""

import heapq
from collections.abc import Iterator
from typing import Any

import msgspec

from disaggd.observe.receipts import Attempt, Receipt, Span
from disaggd.observe.recorder import FlownRequest, Recording

TraceEvent = dict[str, Any]

PIECE_EVENTS = 200
"""Takes about a millisecond to make."""

ROUTER = "router"
_EVENTS_TRACK = 1
"""Thread id of every process's own events and counters."""
_FIRST_TRACK = 2
_ACTIVITIES = ("prefill", "transfer", "decode", "prefix_push")
"""What nodes do for a request, and so the names of their tracks, in this order."""
_BESIDE = ("transfer", "prefix_push")
"""Those that overlap others of a request: only their nodes show them."""
_TRACKS_PER_ACTIVITY = 100_000


def trace_pieces(recording: Recording, router: str = ROUTER) -> Iterator[bytes]:
    """The JSON object of a trace, in pieces of about `PIECE_EVENTS` events. `router` is the router's name."""
    yield b'{"displayTimeUnit":"ms","traceEvents":[\n'
    piece: list[bytes] = []
    is_first = True
    for event in trace_events(recording, router):
        piece.append(msgspec.json.encode(event))
        if len(piece) == PIECE_EVENTS:
            yield (b"" if is_first else b",\n") + b",\n".join(piece)
            piece, is_first = [], False
    if piece:
        yield (b"" if is_first else b",\n") + b",\n".join(piece)
    yield b"\n]}\n"


def trace_events(recording: Recording, router: str = ROUTER) -> Iterator[TraceEvent]:
    """In order of time, each track named before its first event."""
    return _Trace(recording, router).events()


class _Trace:
    """Names processes and tracks as they come."""

    def __init__(self, recording: Recording, router: str) -> None:
        self._recording = recording
        self._router = router
        self._pids: dict[str, int] = {}
        self._named: set[tuple[int, int]] = set()
        self._lanes: dict[tuple[int, str], _Lanes] = {}
        """By process and activity."""

    def events(self) -> Iterator[TraceEvent]:
        yield from self._process(self._router)
        for event in heapq.merge(self._of_requests(), self._of_samples(), self._of_events(), key=_time):
            yield from self._with_names(event)

    # ── the three sources, each in order of time ─────────────────────────────────────────────────────────────────────

    def _of_requests(self) -> Iterator[TraceEvent]:
        """No event of a request is before its arrival: what is before the next one's can go."""
        waiting: list[tuple[int, int, int, TraceEvent]] = []
        count = 0
        for number, flown in enumerate(self._recording.requests):
            arrived = self._us(flown.arrived)
            while waiting and waiting[0][0] < arrived:
                yield heapq.heappop(waiting)[-1]
            for event in self._of_request(flown, number + _FIRST_TRACK):
                # Of two slices that begin together the longer one is the outer one, and comes first.
                heapq.heappush(waiting, (event["ts"], -event.get("dur", 0), count, event))
                count += 1
        while waiting:
            yield heapq.heappop(waiting)[-1]

    def _of_samples(self) -> Iterator[TraceEvent]:
        for sample in self._recording.samples:
            yield {
                "name": sample.track,
                "ph": "C",
                "ts": self._us(sample.at),
                "pid": sample.node,
                "tid": _EVENTS_TRACK,
                "args": dict(sample.values),
            }

    def _of_events(self) -> Iterator[TraceEvent]:
        for event in self._recording.events:
            yield {
                "name": event.name,
                "cat": "node",
                "ph": "i",
                "s": "p",
                "ts": self._us(event.at),
                "pid": event.node,
                "tid": _EVENTS_TRACK,
                "args": dict(event.details),
            }

    def _of_request(self, flown: FlownRequest, track: int) -> Iterator[TraceEvent]:
        receipt, arrived = flown.receipt, self._us(flown.arrived)
        end = self._end(flown, receipt.spans_ms.total)
        yield _slice(receipt.id, "request", arrived, end, self._router, track, _summary(receipt))
        free = arrived
        for attempt in receipt.attempts:
            for span in attempt.spans:
                start, stop = self._us(flown.arrived + span.start_ms / 1e3), self._end(flown, span.end_ms)
                if span.name not in _BESIDE:
                    yield _slice(span.name, "span", min(max(start, free), end), min(stop, end), self._router, track, _at(span))
                    free = max(free, stop)
                if span.node is not None and span.name in _ACTIVITIES:
                    yield _slice(receipt.id, span.name, start, stop, span.node, None, {"tokens": receipt.prompt_tokens})
            yield from self._moments(flown, attempt, track)

    def _moments(self, flown: FlownRequest, attempt: Attempt, track: int) -> Iterator[TraceEvent]:
        """The decision, and what ended the attempt."""
        decided = next((span.end_ms for span in attempt.spans if span.name == "decide"), None)
        if attempt.decision is not None and decided is not None:
            details = {"request": flown.receipt.id, "reason": attempt.reason, "predicted": attempt.predicted}
            ts = self._us(flown.arrived + decided / 1e3)
            yield _instant(attempt.decision, ts, self._router, track, details)
            if attempt.decode_node is not None:
                yield _instant(attempt.decision, ts, attempt.decode_node, _EVENTS_TRACK, details)
        if attempt.failure is not None and attempt.end_ms is not None:
            details = {"request": flown.receipt.id, "reason": attempt.failure}
            yield _instant("retry", self._us(flown.arrived + attempt.end_ms / 1e3), self._router, track, details)

    # ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _with_names(self, event: TraceEvent) -> Iterator[TraceEvent]:
        """`event` with numbers for its process and track; before it, whatever names those for the first time."""
        node, track = event["pid"], event["tid"]
        yield from self._process(node)
        pid = self._pids[node]
        name = event["name"] if event.get("cat") == "request" else event.get("cat", "")
        if track is None:
            track, name = self._lane(pid, event["cat"], event["ts"], event["ts"] + event["dur"])
        elif track == _EVENTS_TRACK:
            name = "events"
        if (pid, track) not in self._named:
            self._named.add((pid, track))
            yield _metadata("thread_name", pid, track, {"name": name})
            yield _metadata("thread_sort_index", pid, track, {"sort_index": track})
        event["pid"], event["tid"] = pid, track
        yield event

    def _process(self, node: str) -> Iterator[TraceEvent]:
        if node in self._pids:
            return
        self._pids[node] = pid = len(self._pids) + 1
        yield _metadata("process_name", pid, 0, {"name": node})
        yield _metadata("process_sort_index", pid, 0, {"sort_index": pid})

    def _lane(self, pid: int, activity: str, start: int, end: int) -> tuple[int, str]:
        """A track of the activity that is free from `start` to `end`, and its name."""
        lane = self._lanes.setdefault((pid, activity), _Lanes()).take(start, end)
        return _FIRST_TRACK + _ACTIVITIES.index(activity) * _TRACKS_PER_ACTIVITY + lane, activity

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _us(self, at: float) -> int:
        return max(0, round((at - self._recording.began) * 1e6))

    def _end(self, flown: FlownRequest, end_ms: float | None) -> int:
        """What has not ended lasts until now."""
        return self._us(self._recording.now if end_ms is None else flown.arrived + end_ms / 1e3)


class _Lanes:
    """Numbers from 0 for what goes on at the same time, as low as can be."""

    def __init__(self) -> None:
        self._busy: list[tuple[int, int]] = []
        """(until when, lane), the earliest first."""
        self._free: list[int] = []

    def take(self, start: int, end: int) -> int:
        """Nobody has the lane that is returned between `start` and `end`. Each start is at or after the last one."""
        while self._busy and self._busy[0][0] <= start:
            heapq.heappush(self._free, heapq.heappop(self._busy)[1])
        lane = heapq.heappop(self._free) if self._free else len(self._busy)
        heapq.heappush(self._busy, (end, lane))
        return lane


def _slice(name: str, category: str, start: int, end: int, node: str, track: int | None, args: dict[str, Any]) -> TraceEvent:
    return {"name": name, "cat": category, "ph": "X", "ts": start, "dur": max(0, end - start), "pid": node, "tid": track, "args": args}


def _instant(name: str, ts: int, node: str, track: int, args: dict[str, Any]) -> TraceEvent:
    return {"name": name, "cat": "decision", "ph": "i", "s": "t", "ts": ts, "pid": node, "tid": track, "args": args}


def _metadata(name: str, pid: int, track: int, args: dict[str, Any]) -> TraceEvent:
    return {"name": name, "ph": "M", "ts": 0, "pid": pid, "tid": track, "args": args}


def _summary(receipt: Receipt) -> dict[str, Any]:
    return {
        "decision": receipt.decision,
        "reason": receipt.reason,
        "prefill_node": receipt.prefill_node,
        "decode_node": receipt.decode_node,
        "prompt_tokens": receipt.prompt_tokens,
        "output_tokens": receipt.output_tokens,
        "cached_tokens": receipt.cached_tokens,
        "kv_bytes": receipt.kv_bytes,
        "retries": receipt.retries,
        "finish_reason": receipt.finish_reason,
    }


def _at(span: Span) -> dict[str, Any]:
    return {"node": span.node} if span.node is not None else {}


def _time(event: TraceEvent) -> int:
    return int(event["ts"])
