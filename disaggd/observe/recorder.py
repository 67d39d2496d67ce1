"""The flight recorder: what the cluster did in the last minutes, bounded in time and in memory. Runs on the router's loop.

It keeps what is made anyway, the receipts of ended requests and the nodes' gauges, and costs a request one append; nothing
is done per token. `chrome_trace` makes a trace of a `Recording`. Knows nothing of HTTP or of the cluster's frames.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping

import msgspec

from disaggd.observe.receipts import Receipt

MAX_REQUESTS = 10_000
"""A receipt of one attempt is about 2 kB."""
MAX_SAMPLES = 50_000
MAX_EVENTS = 10_000


class FlownRequest(msgspec.Struct, frozen=True, gc=False):
    """A request and when it came, in seconds on the recorder's clock: its receipt's spans count from there."""

    arrived: float
    receipt: Receipt


class Sample(msgspec.Struct, frozen=True, gc=False):
    """Values of one counter track of one node at one time."""

    at: float
    node: str
    track: str
    values: Mapping[str, float]


class Event(msgspec.Struct, frozen=True, gc=False):
    """Something that happened to a node, at one time."""

    at: float
    node: str
    name: str
    details: Mapping[str, str]


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the recorder's memory, taken at `now`; each list in order of time, requests in order of arrival."""

    began: float
    """When the recorder was started: time 0 of a trace."""
    since: float
    now: float
    requests: tuple[FlownRequest, ...]
    samples: tuple[Sample, ...]
    events: tuple[Event, ...]


class FlightRecorder:
    """Remembers `minutes`, or less where that would be more than `max_*` entries; nothing if those are 0.

    `clock` is monotonic seconds.
    """

    def __init__(
        self,
        minutes: float,
        clock: Callable[[], float],
        *,
        max_requests: int = MAX_REQUESTS,
        max_samples: int = MAX_SAMPLES,
        max_events: int = MAX_EVENTS,
    ) -> None:
        self._span_s = minutes * 60
        self._clock = clock
        self._began = clock()
        self._max_requests = max_requests
        self._requests: OrderedDict[str, tuple[float, FlownRequest]] = OrderedDict()
        """By sequence: when it was last told, and what."""
        self._samples: deque[Sample] = deque(maxlen=max_samples)
        self._events: deque[Event] = deque(maxlen=max_events)
        self._shown: dict[tuple[str, str], Mapping[str, float]] = {}
        """What each track of each node shows now."""

    def request(self, seq: str, arrived: float, receipt: Receipt) -> None:
        """A request has ended; told once more, its receipt replaces the former."""
        if not self._span_s:
            return
        now = self._clock()
        self._requests[seq] = (now, FlownRequest(arrived, receipt))
        self._requests.move_to_end(seq)
        self._forget_requests(now - self._span_s)

    def sample(self, node: str, track: str, named: Iterable[tuple[str, float]]) -> None:
        """The track's values from now on; the same ones again are no sample."""
        values = dict(named)
        if not self._span_s or self._shown.get((node, track)) == values:
            return
        now = self._clock()
        self._shown[node, track] = values
        self._samples.append(Sample(now, node, track, values))
        while self._samples[0].at < now - self._span_s:
            self._samples.popleft()

    def event(self, node: str, name: str, **details: str) -> None:
        """Something happened to, or at, a node."""
        if self._span_s:
            self._events.append(Event(self._clock(), node, name, details))

    def recording(self, seconds: float | None = None, running: Iterable[FlownRequest] = ()) -> Recording:
        """The last `seconds`, or all that is remembered; `running` are the requests that have not ended.

        Holds every request that was there at some time since. A track whose values did not change since begins with those it had.
        """
        now = self._clock()
        since = now - min(self._span_s, self._span_s if seconds is None else seconds)
        ended = (flown for told, flown in self._requests.values() if told >= since)
        return Recording(
            began=self._began,
            since=max(since, self._began),
            now=now,
            requests=tuple(sorted((*ended, *running), key=lambda flown: flown.arrived)),
            samples=tuple(self._samples_since(since)),
            events=tuple(event for event in self._events if event.at >= since),
        )

    def _samples_since(self, since: float) -> list[Sample]:
        """Those since then, and before them what each other track showed at that time."""
        standing, recent = dict[tuple[str, str], Mapping[str, float]](), list[Sample]()
        for sample in self._samples:
            if sample.at >= since:
                recent.append(sample)
            else:
                standing[sample.node, sample.track] = sample.values
        moved = {(sample.node, sample.track) for sample in recent}
        standing |= {track: values for track, values in self._shown.items() if track not in moved}
        return [*(Sample(since, node, track, values) for (node, track), values in standing.items()), *recent]

    def _forget_requests(self, before: float) -> None:
        """The oldest, one after another: those that are too old, and one too many."""
        while self._requests:
            told, _ = next(iter(self._requests.values()))
            if told >= before and len(self._requests) <= self._max_requests:
                return
            self._requests.popitem(last=False)
