"""What each process of the cluster holds, read off /proc when the cluster is at rest; and what may not grow. Pure but for `read`."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import msgspec

MAX_FD_GROWTH = 3
MAX_THREAD_GROWTH = 0
MAX_RSS_GROWTH = 1.10
"""Of the median of the last third of the readings to that of the first, whose first reading warms up and does not count."""
MIN_READINGS = 7
"""With fewer there is nothing to be said of growth."""

_PAGE_BYTES = 4096


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """One process at one time of rest."""

    at_s: float
    node: str
    pid: int
    fds: int
    threads: int
    rss_bytes: int


class Growth(msgspec.Struct, frozen=True, kw_only=True):
    """One process over its life."""

    node: str
    pid: int
    readings: int
    fds: tuple[int, int]
    """At the first and the last third of its readings (medians)."""
    threads: tuple[int, int]
    rss_bytes: tuple[int, int]

    @property
    def excess(self) -> str | None:
        """What grew that must not."""
        if self.readings < MIN_READINGS:
            return None
        if self.fds[1] - self.fds[0] > MAX_FD_GROWTH:
            return f"{self.node} (pid {self.pid}): file descriptors grew from {self.fds[0]} to {self.fds[1]}"
        if self.threads[1] - self.threads[0] > MAX_THREAD_GROWTH:
            return f"{self.node} (pid {self.pid}): threads grew from {self.threads[0]} to {self.threads[1]}"
        if self.rss_bytes[1] > MAX_RSS_GROWTH * self.rss_bytes[0]:
            return f"{self.node} (pid {self.pid}): RSS grew from {self.rss_bytes[0] / 2**20:.0f} to {self.rss_bytes[1] / 2**20:.0f} MiB"
        return None


def read(node: str, pid: int, at_s: float) -> Reading:
    """Of a process that is ours and runs."""
    home = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (home / "status").read_text().splitlines())
    return Reading(
        at_s=at_s,
        node=node,
        pid=pid,
        fds=len(list((home / "fd").iterdir())),
        threads=int(status["Threads"]),
        rss_bytes=int((home / "statm").read_text().split()[1]) * _PAGE_BYTES,
    )


def growths(readings: Sequence[Reading]) -> list[Growth]:
    """One for each process that was read more than once, the longest lives first."""
    lives: dict[tuple[str, int], list[Reading]] = {}
    for reading in readings:
        lives.setdefault((reading.node, reading.pid), []).append(reading)
    found = [_growth(node, pid, life[1:]) for (node, pid), life in lives.items() if len(life) > 1]
    return sorted(found, key=lambda growth: -growth.readings)


def _growth(node: str, pid: int, life: Sequence[Reading]) -> Growth:
    third = max(1, len(life) // 3)
    first, last = life[:third], life[-third:]

    def ends(field: str) -> tuple[int, int]:
        return round(median(getattr(one, field) for one in first)), round(median(getattr(one, field) for one in last))

    return Growth(node=node, pid=pid, readings=len(life), fds=ends("fds"), threads=ends("threads"), rss_bytes=ends("rss_bytes"))
