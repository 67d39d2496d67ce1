"""The flight recorder: what it remembers, for how long, and how much at most."""

from dataclasses import dataclass, field

from disaggd.observe.recorder import FlightRecorder, FlownRequest
from tests.support.receipts import local_receipt, remote_receipt, running_receipt


@dataclass
class Flight:
    """A recorder of one minute, and its clock."""

    now: float = 1000.0
    minutes: float = 1.0
    limits: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.recorder = FlightRecorder(self.minutes, lambda: self.now, **self.limits)  # type: ignore[arg-type]

    def requests(self, seconds: float | None = None) -> list[str]:
        return [flown.receipt.id for flown in self.recorder.recording(seconds).requests]

    def samples(self, seconds: float | None = None) -> list[tuple[float, str, dict[str, float]]]:
        return [(sample.at, sample.node, dict(sample.values)) for sample in self.recorder.recording(seconds).samples]


def test_a_request_is_remembered_for_minutes_after_its_end() -> None:
    flight = Flight()
    flight.recorder.request("a", 990.0, local_receipt("a"))
    flight.now += 59
    flight.recorder.request("b", 1058.0, local_receipt("b"))
    assert flight.requests() == ["a", "b"]
    flight.now += 2
    assert flight.requests() == ["b"]


def test_the_last_seconds_hold_whoever_was_there_since() -> None:
    flight = Flight()
    flight.recorder.request("gone", 999.0, local_receipt("gone"))
    flight.now += 10
    flight.recorder.request("long", 999.5, local_receipt("long"))
    assert flight.requests(5) == ["long"]


def test_requests_come_in_the_order_of_their_arrival_and_those_that_run_among_them() -> None:
    flight = Flight()
    flight.recorder.request("second", 998.0, local_receipt("second"))
    flight.recorder.request("first", 990.0, local_receipt("first"))
    running = [FlownRequest(995.0, running_receipt("running"))]
    assert [flown.receipt.id for flown in flight.recorder.recording(running=running).requests] == ["first", "running", "second"]


def test_a_request_that_is_told_again_is_there_once_with_the_latest() -> None:
    flight = Flight()
    flight.recorder.request("a", 990.0, remote_receipt("a", kv_bytes=0))
    flight.recorder.request("a", 990.0, remote_receipt("a", kv_bytes=77))
    assert [flown.receipt.kv_bytes for flown in flight.recorder.recording().requests] == [77]


def test_no_flood_makes_it_remember_more_than_its_bounds() -> None:
    flight = Flight(limits={"max_requests": 3, "max_samples": 4, "max_events": 2})
    for number in range(10):
        flight.recorder.request(f"s{number}", 1000.0, local_receipt(str(number)))
        flight.recorder.sample("d0", "blocks", [("free", number)])
        flight.recorder.event("d0", "link up")
    recording = flight.recorder.recording()
    assert [flown.receipt.id for flown in recording.requests] == ["7", "8", "9"]
    assert (len(recording.samples), len(recording.events)) == (4, 2)


def test_a_value_that_stays_is_no_sample() -> None:
    flight = Flight()
    for free in (5, 5, 4, 4, 5):
        flight.now += 1
        flight.recorder.sample("d0", "blocks", [("free", free)])
    assert flight.samples() == [(1001.0, "d0", {"free": 5}), (1003.0, "d0", {"free": 4}), (1005.0, "d0", {"free": 5})]


def test_a_track_begins_with_what_it_showed_before() -> None:
    """Also one whose last change is forgotten."""
    flight = Flight()
    flight.recorder.sample("d0", "blocks", [("free", 9)])
    flight.now += 3600
    flight.recorder.sample("p0", "blocks", [("free", 7)])
    flight.now += 20
    flight.recorder.sample("p0", "blocks", [("free", 6)])
    flight.now += 1
    since = flight.now - 10
    first, second, third = flight.samples(10)
    assert sorted((first, second)) == [(since, "d0", {"free": 9}), (since, "p0", {"free": 7})]
    assert third == (flight.now - 1, "p0", {"free": 6})


def test_a_recorder_of_no_minutes_records_nothing_but_shows_what_runs() -> None:
    flight = Flight(minutes=0.0)
    flight.recorder.request("a", 990.0, local_receipt("a"))
    flight.recorder.sample("d0", "blocks", [("free", 5)])
    flight.recorder.event("d0", "link up")
    recording = flight.recorder.recording(running=[FlownRequest(995.0, running_receipt("running"))])
    assert ([flown.receipt.id for flown in recording.requests], recording.samples, recording.events) == (["running"], (), ())
