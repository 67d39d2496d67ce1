"""The trace: what the trace event format asks of it, and what a reader finds in it."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from disaggd.observe.chrome_trace import PIECE_EVENTS, trace_events, trace_pieces
from disaggd.observe.receipts import Span, Spans
from disaggd.observe.recorder import Event, FlownRequest, Recording, Sample
from tests.support.receipts import local_receipt, remote_attempt, remote_receipt, retried_receipt, running_receipt
from tests.support.trace_events import TraceEvents, check, names, slices


def recording(*requests: FlownRequest, samples: tuple[Sample, ...] = (), events: tuple[Event, ...] = ()) -> Recording:
    return Recording(began=100.0, since=100.0, now=110.0, requests=requests, samples=samples, events=events)


def busy() -> Recording:
    """Every kind of request, several at once."""
    requests = [
        FlownRequest(100.0, local_receipt("local")),
        FlownRequest(101.0, remote_receipt("one")),
        FlownRequest(101.05, remote_receipt("two")),
        FlownRequest(101.1, retried_receipt("again")),
        FlownRequest(109.0, running_receipt("running")),
    ]
    samples = (Sample(100.5, "d0", "blocks", {"free": 9, "used": 1}), Sample(102.0, "router", "prefill queue", {"jobs": 2}))
    events = (Event(100.1, "p0", "link up", {}), Event(101.2, "p0", "link down", {"reason": "x"}))
    return recording(*requests, samples=samples, events=events)


def decoded(taken: Recording) -> list[dict[str, Any]]:
    """Through its JSON."""
    trace = json.loads(b"".join(trace_pieces(taken, "router")))
    assert trace["displayTimeUnit"] == "ms"
    return list(trace["traceEvents"])


def test_a_trace_keeps_the_rules_of_its_format() -> None:
    events = decoded(busy())
    assert len(events) > 50
    check(events)


BROKEN: dict[str, Callable[[TraceEvents], object]] = {
    "a slice without an end": lambda events: next(event for event in events if event["ph"] == "X").pop("dur"),
    "a time before the beginning": lambda events: next(event for event in events if event["ph"] == "X").update(ts=-1),
    "an event before its time": lambda events: events.append(dict(next(event for event in events if event["ph"] == "C"))),
    "a process without a name": lambda events: events.remove(next(event for event in events if event["name"] == "process_name")),
    "a track without a name": lambda events: events.remove(next(event for event in events if event["name"] == "thread_name")),
    "a slice that leaves the one around it": lambda events: next(event for event in events if event["name"] == "queue").update(dur=10**8),
    "a counter of words": lambda events: next(event for event in events if event["ph"] == "C").update(args={"free": "9"}),
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN.keys())
def test_the_rules_would_notice(damage: Callable[[TraceEvents], object]) -> None:
    events = decoded(busy())
    damage(events)
    with pytest.raises(AssertionError):
        check(events)


def test_a_request_has_a_track_and_its_nodes_show_what_they_did_for_it() -> None:
    events = decoded(recording(FlownRequest(101.0, remote_receipt("one"))))
    assert slices(events, "router") == {
        "one": [
            ("one", 1_000_000, 2_200_000),
            ("decide", 1_000_000, 1_001_500),
            ("queue", 1_001_500, 1_020_000),
            ("grant", 1_020_000, 1_021_000),
            ("prefill_wait", 1_021_500, 1_023_000),
            ("prefill", 1_023_000, 1_130_000),
            ("decode", 1_131_000, 2_200_000),
        ]
    }
    assert slices(events, "p0") == {"prefill": [("one", 1_023_000, 1_130_000)], "transfer": [("one", 1_040_000, 1_142_000)]}
    assert slices(events, "d0") == {"decode": [("one", 1_131_000, 2_200_000)]}


def test_a_prefix_is_shown_by_the_node_that_pushed_it() -> None:
    pushed = remote_attempt(spans=(Span("prefix_push", "d0", 21.5, 30.0), *remote_attempt().spans))
    events = decoded(recording(FlownRequest(101.0, remote_receipt("one", attempts=(pushed,)))))
    assert slices(events, "d0")["prefix_push"] == [("one", 1_021_500, 1_030_000)]
    assert "prefix_push" not in [name for name, *_ in slices(events, "router")["one"]]


def test_a_node_that_does_several_at_once_has_as_many_tracks() -> None:
    events = decoded(busy())
    tracks = names(events, "thread_name")
    pid = next(pid for (pid,), name in names(events, "process_name").items() if name == "d0")
    assert sorted(name for (process, _), name in tracks.items() if process == pid) == ["decode", "decode", "decode", "events", "prefill"]


def test_a_decision_says_why_on_the_request_and_on_its_node() -> None:
    events = decoded(recording(FlownRequest(101.0, remote_receipt("one"))))
    decisions = [event for event in events if event["ph"] == "i"]
    assert [(event["name"], event["ts"]) for event in decisions] == [("remote", 1_001_500)] * 2
    assert len({event["pid"] for event in decisions}) == 2
    assert decisions[0]["args"]["reason"] == "long: 1500 uncached tokens > 512"
    assert decisions[0]["args"]["predicted"]["remote_ttft_ms"] == 120.0


def test_a_retry_says_what_failed() -> None:
    events = decoded(recording(FlownRequest(101.0, retried_receipt("again"))))
    (retry,) = [event for event in events if event["name"] == "retry"]
    assert (retry["ts"], retry["args"]["reason"]) == (1_090_000, "its prefill failed or is lost")


def test_what_runs_lasts_until_now() -> None:
    events = decoded(recording(FlownRequest(109.0, running_receipt("running"))))
    assert slices(events, "router")["running"][-1] == ("queue", 9_001_500, 10_000_000)


def test_counters_and_node_events_are_of_their_process() -> None:
    events = decoded(busy())
    pids = {name: pid for (pid,), name in names(events, "process_name").items()}
    (counter,) = [event for event in events if event["name"] == "blocks"]
    assert (counter["pid"], counter["ts"], counter["args"]) == (pids["d0"], 500_000, {"free": 9, "used": 1})
    (down,) = [event for event in events if event["name"] == "link down"]
    assert (down["pid"], down["s"], down["args"]) == (pids["p0"], "p", {"reason": "x"})


@pytest.mark.parametrize("late_by_ms", [0.0, 0.0004, 3.0])
def test_a_span_that_seems_to_begin_too_early_is_cut_and_the_rest_still_nests(late_by_ms: float) -> None:
    """Decode may bring a token before the prefill node tells of the end of its prefill."""
    spans = (Span("prefill", "p0", 1.0, 50.0 + late_by_ms), Span("decode", "d0", 50.0, 60.0))
    attempt = remote_attempt(end_ms=60.0, spans=spans)
    receipt = remote_receipt("one", attempts=(attempt,), spans_ms=Spans(total=60.0))
    mine = slices(decoded(recording(FlownRequest(101.0, receipt))), "router")["one"]
    (_, _, prefilled), (_, decoding, ended) = mine[1], mine[2]
    assert (prefilled, ended) == (decoding, 1_060_000)


def test_a_long_trace_comes_in_pieces() -> None:
    taken = recording(*(FlownRequest(101.0 + number / 100, remote_receipt(str(number))) for number in range(100)))
    pieces = list(trace_pieces(taken))
    assert len(pieces) >= 100 * 8 // PIECE_EVENTS + 2
    assert sum(event["name"] == "decode" and event["cat"] == "span" for event in trace_events(taken)) == 100
    json.loads(b"".join(pieces))


def test_an_empty_trace_is_one() -> None:
    assert [event["args"] for event in decoded(recording())] == [{"name": "router"}, {"sort_index": 1}]
