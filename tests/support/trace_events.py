"""What Chrome's trace event format asks of a trace, and what Perfetto needs to draw one as it was meant."""

from collections import defaultdict
from typing import Any

TraceEvents = list[dict[str, Any]]

PHASES = {"X": {"ts", "dur"}, "i": {"ts", "s"}, "C": {"ts", "args"}, "M": {"args"}}
"""The phases used here, and what each must have besides name, ph, pid and tid."""


def check(events: TraceEvents) -> None:
    """AssertionError for the first event that breaks a rule."""
    _check_fields(events)
    _check_order(events)
    _check_names(events)
    _check_nesting(events)


def _check_fields(events: TraceEvents) -> None:
    for event in events:
        assert event.keys() >= {"name", "ph", "pid", "tid"} | PHASES[event["ph"]], event
        assert all(isinstance(event[key], int) and event[key] >= 0 for key in ("pid", "tid", "ts")), event
        assert event.get("dur", 0) >= 0, event
        assert event.get("s", "t") in ("g", "p", "t"), event
        if event["ph"] == "C":
            assert event["args"] and all(isinstance(value, int | float) for value in event["args"].values()), event


def _check_order(events: TraceEvents) -> None:
    times = [event["ts"] for event in events if event["ph"] != "M"]
    assert times == sorted(times)


def _check_names(events: TraceEvents) -> None:
    """Every process and track has one name, before it is used."""
    processes, tracks = set[int](), set[tuple[int, int]]()
    for event in events:
        if event["name"] == "process_name":
            assert event["pid"] not in processes, event
            processes.add(event["pid"])
        elif event["name"] == "thread_name":
            assert (event["pid"], event["tid"]) not in tracks, event
            tracks.add((event["pid"], event["tid"]))
        elif event["ph"] != "M":
            assert event["pid"] in processes, event
            assert (event["pid"], event["tid"]) in tracks, event


def _check_nesting(events: TraceEvents) -> None:
    """Slices of a track that overlap without nesting are drawn wrongly, or dropped."""
    open_ends: dict[tuple[int, int], list[int]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            ends, end = open_ends[event["pid"], event["tid"]], event["ts"] + event["dur"]
            while ends and ends[-1] <= event["ts"]:
                ends.pop()
            assert not ends or end <= ends[-1], event
            ends.append(end)


def names(events: TraceEvents, kind: str) -> dict[tuple[int, ...], str]:
    """What metadata events of that kind call a process, or a track."""
    keys = ("pid",) if kind == "process_name" else ("pid", "tid")
    return {tuple(event[key] for key in keys): event["args"]["name"] for event in events if event["name"] == kind}


def slices(events: TraceEvents, process: str) -> dict[str, list[tuple[str, int, int]]]:
    """(name, start, end) of a process's slices, by the names of its tracks."""
    pids, tracks = names(events, "process_name"), names(events, "thread_name")
    found = defaultdict(list)
    for event in events:
        if event["ph"] == "X" and pids[event["pid"],] == process:
            found[tracks[event["pid"], event["tid"]]].append((event["name"], event["ts"], event["ts"] + event["dur"]))
    return found
