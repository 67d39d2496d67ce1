"""A soak: no faults, a share of what the cluster can take, for long. Does memory grow, do descriptors, do latencies?

First the cluster's capacity is measured with clients that ask anew as soon as they are answered; then that share of it comes as a
Poisson process. Every answer is checked as under chaos.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import quantiles

import msgspec

from tests.chaos import catalogue, schedule
from tests.chaos.ledger import Outcome, judge
from tests.chaos.load import Load
from tests.chaos.report import began_at, machine, table
from tests.chaos.watch import Reading, read
from tests.support.clusters import Cluster
from tests.support.oracle import Oracle

CLIENTS = 16
"""Of the measurement of capacity."""
CAPACITY_S = 30.0
WINDOW_S = 300.0
"""Latencies of the first and of the last so many seconds are compared, or of the halves of a shorter soak."""
READ_EVERY_S = 10.0


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """Latencies of the requests that came in a stretch of time; milliseconds, 99th percentiles."""

    requests: int
    ttft_ms: float
    itl_ms: float


class Slope(msgspec.Struct, frozen=True, kw_only=True):
    """One process over the soak, its first window left out: that is when memory is touched for the first time."""

    node: str
    rss_bytes: tuple[int, int]
    """First and last."""
    rss_bytes_per_hour: float
    """Of a straight line through all readings."""
    fds: tuple[int, int]
    """Least and most."""
    threads: tuple[int, int]


class SoakReport(msgspec.Struct, frozen=True, kw_only=True):
    """A whole soak."""

    seed: int
    began: str
    machine: str
    minutes: float
    load: float
    capacity_per_s: float
    rate_per_s: float
    requests: int
    findings: list[str]
    windows: tuple[Window, Window]
    slopes: list[Slope]


def soak(directory: Path, oracle: Oracle, seed: int, minutes: float, load: float, num_cases: int) -> SoakReport:
    """On a 2P2D cluster of loopback, whose logs stay in `directory`."""
    cases = catalogue.build(num_cases, oracle)
    cluster = Cluster(directory, prefill=2, decode=2, router={"receipts": 2000})
    try:
        cluster.start()
        return asyncio.run(_soak(cluster, cases, seed, minutes, load))
    finally:
        cluster.close()


async def _soak(cluster: Cluster, cases: list[catalogue.Case], seed: int, minutes: float, load: float) -> SoakReport:
    async with contextlib.aclosing(Load(cluster.url, cases, _patient(seed, 1.0))) as clients:
        capacity = await clients.saturate(CLIENTS, CAPACITY_S)
    async with contextlib.aclosing(Load(cluster.url, cases, _patient(seed + 1, load * capacity))) as clients:
        began_s = time.monotonic()
        readings: list[Reading] = []
        async with clients.offered():
            while time.monotonic() < began_s + 60 * minutes:
                readings += [read(node.name, node.pid, time.monotonic()) for node in cluster.nodes.values()]
                await asyncio.sleep(READ_EVERY_S)
        outcomes = clients.take_outcomes()
        verdicts = [judge(outcome, clients.case_of(outcome.ask), ()) for outcome in outcomes]
    await asyncio.to_thread(cluster.wait_idle, 30.0)
    window_s = min(WINDOW_S, 30 * minutes)
    first = [one for one in outcomes if one.began_s < began_s + window_s]
    last = [one for one in outcomes if one.began_s >= began_s + 60 * minutes - window_s]
    return SoakReport(
        seed=seed,
        began=began_at(began_s),
        machine=machine(),
        minutes=minutes,
        load=load,
        capacity_per_s=capacity,
        rate_per_s=load * capacity,
        requests=len(verdicts),
        findings=[f"request {one.outcome.ask.index}: {one.finding}: {one.why}" for one in verdicts if one.finding is not None],
        windows=(window(first), window(last)),
        slopes=[slope([one for one in readings if one.node == name and one.at_s >= began_s + window_s]) for name in cluster.nodes],
    )


def _patient(seed: int, rate: float) -> Iterator[schedule.Ask]:
    """Clients that all read to the end."""
    return (msgspec.structs.replace(ask, manner="read") for ask in schedule.asks(seed, rate))


def window(outcomes: Sequence[Outcome]) -> Window:
    """Of streamed requests: whole replies tell no times."""
    streams = [one for one in outcomes if one.ask.stream and one.event_s]
    return Window(
        requests=len(outcomes),
        ttft_ms=p99([one.event_s[0] - one.began_s for one in streams]) * 1e3,
        itl_ms=p99([b - a for one in streams for a, b in pairwise(one.event_s)]) * 1e3,
    )


def p99(values: Sequence[float]) -> float:
    return quantiles(values, n=100)[98] if len(values) > 1 else float("nan")


def slope(readings: Sequence[Reading]) -> Slope:
    """Of one process; at least two readings."""
    times = [one.at_s / 3600 for one in readings]
    sizes = [one.rss_bytes for one in readings]
    mean_t, mean_s = sum(times) / len(times), sum(sizes) / len(sizes)
    spread = sum((t - mean_t) ** 2 for t in times)
    fds, threads = [one.fds for one in readings], [one.threads for one in readings]
    return Slope(
        node=readings[0].node,
        rss_bytes=(sizes[0], sizes[-1]),
        rss_bytes_per_hour=sum((t - mean_t) * (s - mean_s) for t, s in zip(times, sizes, strict=True)) / spread,
        fds=(min(fds), max(fds)),
        threads=(min(threads), max(threads)),
    )


def markdown(report: SoakReport) -> str:
    """The tables of docs/reliability.md."""
    first, last = report.windows
    rows = [
        ("run", f"seed {report.seed}, {report.began}, {report.minutes:g} min, {report.machine}"),
        ("load", f"{report.rate_per_s:.2f} requests/s, {report.load:.0%} of the {report.capacity_per_s:.2f} that {CLIENTS} clients get"),
        ("requests", f"{report.requests}, of which not right: {len(report.findings)}"),
        ("p99 of the first token, ms: begin → end", f"{first.ttft_ms:.0f} → {last.ttft_ms:.0f}"),
        ("p99 between tokens, ms: begin → end", f"{first.itl_ms:.0f} → {last.itl_ms:.0f}"),
    ]
    nodes = [
        (
            one.node,
            f"{one.rss_bytes[0] / 2**20:.0f} → {one.rss_bytes[1] / 2**20:.0f}",
            f"{one.rss_bytes_per_hour / 2**20:+.1f}",
            f"{one.fds[0]} to {one.fds[1]}",
            f"{one.threads[0]} to {one.threads[1]}",
        )
        for one in report.slopes
    ]
    return table(("", ""), rows) + "\n\n" + table(("process", "RSS, MiB", "slope, MiB/h", "fds", "threads"), nodes)
