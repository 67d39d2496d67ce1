"""What clients that misbehave cost those that do not: good streams' tokens per second beside them, and beside the same load behaving.

A real cluster, `1P1D`; this process is all clients. See --help.
"""

import asyncio
import os
import random
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median

import click
import msgspec
import uvloop
from client import Outcome, Target, fetch
from cluster import Running, config_text, one_each, running, split
from machine import Load, LoadMeter, Machine, describe_machine
from report import Table, section, show, write_json
from server_process import get

_TIMEOUT_S = 300.0
_FREED_S = 120.0
_VOCAB_SIZE = 4096


class Job(msgspec.Struct, frozen=True, kw_only=True):
    good: int
    """Streams at a time, each followed by the next."""
    leaving: int
    slow: int
    idle: int
    seconds: float
    repeats: int


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    good_per_s: float
    """Tokens."""
    failed: int
    """Good requests."""
    router_mb: float
    """Most that was resident."""
    freed_s: float
    """From the last client's end until no block is used and no request open."""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    behaving: Turn
    misbehaving: Turn

    @property
    def ratio(self) -> float:
        return self.misbehaving.good_per_s / self.behaving.good_per_s


class Report(msgspec.Struct, frozen=True, kw_only=True):
    job: Job
    machine: Machine
    load: Load
    samples: list[Sample]


class Crowd:
    """All clients of one turn: the same requests at the same times, whether they behave or not."""

    def __init__(self, job: Job, target: Target, seed: int) -> None:
        self._job = job
        self._target = target
        self._seed = seed
        self._over = asyncio.Event()

    async def run(self, *, behaving: bool) -> list[Outcome]:
        """What came of the good requests that ended in time."""
        draw = random.Random(self._seed)
        job, found = self._job, list[Outcome]()
        async with asyncio.TaskGroup() as group:
            for _ in range(job.good):
                group.create_task(self._good(random.Random(draw.random()), found))
            for kind, count in ((self._leaving, job.leaving), (self._slow, job.slow), (self._idle, job.idle)):
                for _ in range(count):
                    group.create_task(self._later(draw.uniform(0, 0.8 * job.seconds), kind, random.Random(draw.random()), behaving))
            await asyncio.sleep(job.seconds)
            self._over.set()
        return found

    async def _good(self, draw: random.Random, found: list[Outcome]) -> None:
        while not self._over.is_set():
            found.append(await fetch(self._target, _body(draw, 64, 64), time.perf_counter(), _TIMEOUT_S))

    async def _later(
        self, after_s: float, kind: Callable[[random.Random, bool], Awaitable[object]], draw: random.Random, behaving: bool
    ) -> None:
        await asyncio.sleep(after_s)
        await kind(draw, behaving)

    async def _leaving(self, draw: random.Random, behaving: bool) -> None:
        """Goes at a random point: of its request, before its first token, or of its stream."""
        body = _body(draw, draw.choice((64, 512)), 32)
        if behaving:
            await fetch(self._target, body, time.perf_counter(), _TIMEOUT_S)
            return
        request = self._target.request(body)
        reader, writer = await asyncio.open_connection(self._target.host, self._target.port)
        sent = draw.choice((draw.randrange(len(request)), len(request), len(request)))
        writer.write(request[:sent])
        if sent == len(request):
            await _first(reader.read(draw.randrange(1, 6000)), self._over, draw.uniform(0.0, 2.0))
        writer.transport.abort()

    async def _slow(self, draw: random.Random, behaving: bool) -> None:
        """Reads a byte per second until the turn is over, or it is cut."""
        body = _body(draw, 64, 256)
        if behaving:
            await fetch(self._target, body, time.perf_counter(), _TIMEOUT_S)
            return
        with socket.socket() as client:  # of its own: streams read ahead
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            try:
                await loop.sock_connect(client, (self._target.host, self._target.port))
                await loop.sock_sendall(client, self._target.request(body))
                while not self._over.is_set() and await loop.sock_recv(client, 1):
                    await _first(asyncio.sleep(1.0), self._over, 1.0)
            except ConnectionError:
                return  # it was cut

    async def _idle(self, draw: random.Random, behaving: bool) -> None:
        """Connects and says nothing; one that behaves asks whether the server is well, and goes."""
        reader, writer = await asyncio.open_connection(self._target.host, self._target.port)
        if behaving:
            writer.write(b"GET /health HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n")
        await _first(reader.read(-1), self._over, _TIMEOUT_S)
        writer.transport.abort()


async def _first(work: Awaitable[object], over: asyncio.Event, seconds: float) -> None:
    """Until the work is done, the turn over, or so much time gone: whatever is first."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(over.wait())]
    done, waiting = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*done, *waiting, return_exceptions=True)


def _body(draw: random.Random, num_input: int, num_output: int) -> bytes:
    prompt = [draw.randrange(1, _VOCAB_SIZE) for _ in range(num_input)]
    fields = {"prompt": prompt, "max_tokens": num_output, "temperature": 0, "stream": True, "ignore_eos": True}
    return msgspec.json.encode(fields)


def play(job: Job, cluster: Running, seed: int, *, behaving: bool) -> Turn:
    """One turn, until the cluster is at rest again. RuntimeError if it does not come to rest."""
    target = Target.of(cluster.url, "completions", None)
    began_s = time.perf_counter()

    async def turn() -> list[Outcome]:
        return await Crowd(job, target, seed).run(behaving=behaving)

    found = uvloop.run(turn())
    ended_s = time.perf_counter()
    until_s = began_s + job.seconds
    tokens = sum(began_s <= at <= until_s for one in found for at in one.event_s)
    while not _is_at_rest(cluster):
        if time.perf_counter() - ended_s > _FREED_S:
            raise RuntimeError("blocks or requests are left when all clients have gone")
        time.sleep(0.05)
    metrics = _metrics(cluster)
    return Turn(
        good_per_s=tokens / job.seconds,
        failed=sum(one.error is not None for one in found),
        router_mb=metrics["process_resident_memory_bytes"] / 2**20,
        freed_s=time.perf_counter() - ended_s,
    )


def _metrics(cluster: Running) -> dict[str, float]:
    lines = get(f"{cluster.url}/metrics").decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


def _is_at_rest(cluster: Running) -> bool:
    metrics = _metrics(cluster)
    held = [value for name, value in metrics.items() if name.startswith("disaggd_kv_blocks{") and 'state="free"' not in name]
    cached = sum(value for name, value in metrics.items() if name.startswith("disaggd_kv_blocks{") and 'state="cached"' in name)
    return sum(held) == cached and metrics["disaggd_open_requests"] == 0


def measure(job: Job) -> Report:
    load = LoadMeter()
    cpus = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "config.toml"
        router = {"max_requests": job.good + job.leaving + job.slow, "kv_overcommit": 1000, "head_timeout_s": 5, "client_stall_s": 5}
        config.write_text(config_text(one_each(cpus, kv_cache="256MiB"), model={"path": "builtin:tiny"}, router=router))
        os.sched_setaffinity(0, split(cpus)[0])
        with running(config, Path(directory) / "cluster.log") as cluster:
            play(msgspec.structs.replace(job, seconds=2.0, leaving=0, slow=0, idle=0), cluster, -1, behaving=True)  # warms up
            samples = [_sample(job, cluster, turn) for turn in range(job.repeats)]
    return Report(job=job, machine=describe_machine(), load=load.read(), samples=samples)


def _sample(job: Job, cluster: Running, turn: int) -> Sample:
    behaving = play(job, cluster, turn, behaving=True)
    return Sample(behaving=behaving, misbehaving=play(job, cluster, turn, behaving=False))


def table(report: Report) -> Table:
    rows = [
        (
            f"{number}",
            f"{one.behaving.good_per_s:,.0f}",
            f"{one.misbehaving.good_per_s:,.0f}",
            f"{one.ratio:.0%}",
            f"{one.behaving.failed + one.misbehaving.failed}",
            f"{one.misbehaving.router_mb:.0f}",
            f"{one.misbehaving.freed_s:.1f}",
        )
        for number, one in enumerate(report.samples, 1)
    ]
    header = ("turn", "beside behaving, tok/s", "beside misbehaving", "ratio", "failed", "router MB", "freed after s")
    return Table("Good clients", header, tuple(rows))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--good", type=click.IntRange(min=1), default=16, show_default=True, help="Streams at a time that are measured.")
@click.option("--leaving", type=int, default=1000, show_default=True, help="Clients that disconnect at random points.")
@click.option("--slow", type=int, default=200, show_default=True, help="Clients that read one byte per second.")
@click.option("--idle", type=int, default=300, show_default=True, help="Connections that say nothing.")
@click.option("--seconds", type=float, default=30.0, show_default=True, help="Of each turn.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Turns of each kind, one after the other.")
@click.option("--quick", is_flag=True, help="Few clients, short: shows that it runs.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write figures here.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Append the section to this file.")
def main(
    good: int, leaving: int, slow: int, idle: int, seconds: float, repeats: int, quick: bool, json_path: Path | None, markdown: Path | None
) -> None:
    """Measure the good clients' tokens per second beside clients that misbehave, and beside the same clients behaving.

    They leave, hardly read, or say nothing; behaving, they read what they asked for to its end. Both kinds of turn have the
    same requests at the same times. The clients share a processor with router and prefill node; the decode node has the last
    one to itself, where there are two.
    """
    job = Job(good=good, leaving=leaving, slow=slow, idle=idle, seconds=seconds, repeats=repeats)
    if quick:
        job = Job(good=4, leaving=40, slow=8, idle=12, seconds=4.0, repeats=1)
    report = measure(job)
    ratio = median(one.ratio for one in report.samples)
    lines = [
        f"{job.good} good streams; {job.leaving} clients that leave, {job.slow} that read a byte a second, {job.idle} that say nothing",
        f"ratio, median of {job.repeats}: {ratio:.0%}",
    ]
    show(section("Clients that misbehave", report.machine, report.load, [table(report)], lines), markdown)
    write_json(json_path, report)


if __name__ == "__main__":
    main()
