"""`Wire`: when bytes from one node are at another, on a link whose rate may change. Pure arithmetic; knows no clock."""

from collections.abc import Sequence

import msgspec


class Rate(msgspec.Struct, frozen=True):
    """From `since_s` of virtual time on, so many bytes a second."""

    since_s: float
    bytes_per_s: float


class Wire:
    """One way between two nodes: what is sent arrives in order, each byte after all that were sent before it.

    `rates`: by time, the first from the beginning on; each holds until the next.
    """

    def __init__(self, rates: Sequence[Rate], latency_s: float) -> None:
        assert rates and all(rate.bytes_per_s > 0 for rate in rates)
        self._rates = tuple(rates)
        self._latency_s = latency_s
        self._free_at = 0.0

    def send(self, num_bytes: int, now: float) -> float:
        """When the last of these bytes has left the sender: behind everything sent before."""
        self._free_at = self._sent_at(max(now, self._free_at), num_bytes)
        return self._free_at

    def arrival(self, left_at: float) -> float:
        """When what left at `left_at` is there."""
        return left_at + self._latency_s

    def _sent_at(self, start: float, num_bytes: float) -> float:
        """The end of a transfer that begins at `start`, through every change of the rate meanwhile."""
        for rate, following in zip(self._rates, (*self._rates[1:], None), strict=True):
            if following is not None and following.since_s <= start:
                continue
            end = start + num_bytes / rate.bytes_per_s
            if following is None or end <= following.since_s:
                return end
            num_bytes -= (following.since_s - start) * rate.bytes_per_s
            start = following.since_s
        raise AssertionError("the last rate holds for ever")
