"""What serving takes from the engine: tokens per second and step times, alone and behind HTTP. See --help.

Four processes: the engine alone; a router and a decode node; and this one, the client. Where there are two processors, the
engine and the node have the first to themselves, by turns, and router and client share the second.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, median

import click
import msgspec
import uvloop
from client import Outcome, Target, fetch
from cluster import config_text, split, url_of
from machine import Load, LoadMeter, Machine, describe_machine
from models import BUILTIN, resolve
from report import Table, section, show, write_json
from samples import Spread, spread
from served_engine import Setup, Steps
from served_node import Turn, read_turns
from server_process import answers
from workload import fixed, plan

from disaggd.model.directory import open_directory
from disaggd.transfer.layout import kv_spec

BLOCK_SIZE = 64
CHUNK = 512
"""The node's step budget: so many tokens of prompts go into one step."""
_BENCH = Path(__file__).parent
_START_S = 120.0
_STOP_S = 20.0
_TIMEOUT_S = 900.0


class Job(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    streams: tuple[int, ...]
    context: int
    steps: int
    repeats: int
    threads: int

    def num_outputs(self, streams: int) -> int:
        """Tokens for each stream: the first ones to begin go on while the prompts of the last are computed."""
        return self.steps + streams * -(-self.context // CHUNK) + 8

    @property
    def pool_tokens(self) -> int:
        most = max(self.streams)
        return most * (self.context + self.num_outputs(most) + 2 * BLOCK_SIZE)


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a turn in which all streams decode, and nothing else goes on."""

    began_s: float
    ended_s: float
    steps: int
    context: int
    """Tokens of a sequence at its begin, on average."""
    tokens_per_s: float


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One turn: served, and the engine alone over the same contexts."""

    streams: int
    context: int
    served_per_s: float
    engine_per_s: float
    served_step_ms: Spread
    engine_step_ms: Spread

    @property
    def share(self) -> float:
        return self.served_per_s / self.engine_per_s


class Report(msgspec.Struct, frozen=True, kw_only=True):
    job: Job
    machine: Machine
    load: Load
    samples: list[Sample]


# ── a turn ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def stream_all(target: Target, bodies: list[bytes]) -> list[Outcome]:
    """All at once, to their ends. RuntimeError if any fails."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(fetch(target, body, time.perf_counter(), _TIMEOUT_S)) for body in bodies]
    outcomes = [task.result() for task in tasks]
    if failed := [one.error for one in outcomes if one.error is not None]:
        raise RuntimeError(f"{len(failed)} of {len(bodies)} requests failed: {failed[0]}")
    return outcomes


def window_of(outcomes: list[Outcome], num_prompt_tokens: int) -> Window:
    """From the third token of the last stream to begin, to the last but one of the first to end.

    RuntimeError where that is next to nothing: the client was held up for longer than the steps took.
    """
    last = max(outcomes, key=lambda one: one.event_s[0])
    began_s, ended_s = last.event_s[2], min(one.event_s[-2] for one in outcomes)
    ends = [at for at in last.event_s if began_s <= at <= ended_s]
    if ends[:1] == ends[-1:]:
        raise RuntimeError("all tokens came at once: this machine is too busy, or --steps too few")
    done = [sum(at <= began_s for at in one.event_s) for one in outcomes]
    return Window(
        began_s=began_s,
        ended_s=ended_s,
        steps=len(ends) - 1,
        context=num_prompt_tokens + round(mean(done)),
        tokens_per_s=len(outcomes) * (len(ends) - 1) / (ends[-1] - ends[0]),
    )


def step_ms(turns: list[Turn], window: Window, streams: int) -> Spread:
    """The node's steps in the window, from the end of one to the end of the next; it may be done before a late client knows."""
    inside = [turn for turn in turns if window.began_s <= turn.ended_s <= window.ended_s and turn.running == streams]
    return _spread([(after.ended_s - before.ended_s) * 1e3 for before, after in pairwise(inside)])


def _spread(samples: list[float]) -> Spread:
    found = spread(samples)
    assert found is not None, "the window has no steps"
    return found


def jitter(steps: Spread) -> float:
    return (steps.p99 - steps.p50) / steps.p50


# ── the processes ────────────────────────────────────────────────────────────────────────────────────────────────────


class Bench(msgspec.Struct, frozen=True):
    """The processes that are measured, and what they are asked."""

    job: Job
    target: Target
    model: str
    vocab_size: int
    engine: Connection

    def run(self, streams: int, turn: int) -> tuple[Window, list[float]]:
        """Served, then the engine alone: its steps' seconds."""
        window = window_of(uvloop.run(stream_all(self.target, self._bodies(streams, turn))), self.job.context)
        self.engine.send(Steps(batch=streams, context=window.context, count=window.steps))
        return window, self.engine.recv()

    def _bodies(self, streams: int, turn: int) -> list[bytes]:
        planned = plan(fixed(streams, self.job.context, self.job.num_outputs(streams)), self.vocab_size, 1.0, seed=turn)
        fields = {"model": self.model, "temperature": 0, "stream": True, "ignore_eos": True}
        return [msgspec.json.encode({**fields, "prompt": one.prompt, "max_tokens": one.max_tokens}) for one in planned]


def measure(job: Job) -> Report:
    load = LoadMeter()
    with tempfile.TemporaryDirectory() as directory:
        turns = Path(directory) / "turns"
        with started(job, Path(directory), turns) as bench:
            bench.run(min(job.streams), -1)  # warms up
            found = [(streams, *bench.run(streams, turn)) for turn in range(job.repeats) for streams in job.streams]
        noted = read_turns(turns)
    samples = [
        Sample(
            streams=streams,
            context=window.context,
            served_per_s=window.tokens_per_s,
            engine_per_s=streams / mean(alone),
            served_step_ms=step_ms(noted, window, streams),
            engine_step_ms=_spread([seconds * 1e3 for seconds in alone]),
        )
        for streams, window, alone in found
    ]
    return Report(job=job, machine=describe_machine(), load=load.read(), samples=samples)


@contextlib.contextmanager
def started(job: Job, root: Path, turns: Path) -> Iterator[Bench]:
    """All processes, ready; the node's notes are written when they have ended."""
    path = resolve(job.model)
    engine_cpus, other_cpus = split(sorted(os.sched_getaffinity(0)))
    os.sched_setaffinity(0, other_cpus)
    config = root / "config.toml"
    config.write_text(_config(job, path, engine_cpus, other_cpus))
    url = url_of(config)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((root / "cluster.log").open("wb"))
        node = [str(_BENCH / "served_node.py"), str(turns), "--name", "d0"]
        nodes = [
            subprocess.Popen([sys.executable, *command, "--config", str(config)], stdout=log, stderr=log)
            for command in (node, ["-m", "disaggd", "--name", "router"])
        ]
        for process in nodes:
            stack.callback(_end, process)
        engine = stack.enter_context(_engine(job, path, engine_cpus))
        _wait_ready(url, nodes, root / "cluster.log")
        try:
            yield Bench(job, Target.of(url, "completions", None), "served", open_directory(path).spec().vocab_size, engine)
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{_tail(root / 'cluster.log')}") from error


@contextlib.contextmanager
def _engine(job: Job, path: str, cpus: tuple[int, ...]) -> Iterator[Connection]:
    ours, theirs = Pipe()
    command = [sys.executable, str(_BENCH / "served_engine.py"), str(theirs.fileno()), str(job.threads)]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    theirs.close()
    try:
        limits = {"pool_tokens": job.pool_tokens, "max_step_tokens": CHUNK, "max_sequences": max(job.streams)}
        ours.send(Setup(path=path, cpus=cpus, **limits))
        ours.recv()
        yield ours
    finally:
        _end(process)


def _config(job: Job, path: str, engine_cpus: tuple[int, ...], other_cpus: tuple[int, ...]) -> str:
    layout = kv_spec(open_directory(path).spec("bfloat16"), BLOCK_SIZE)
    pool_bytes = layout.blocks_for(job.pool_tokens) * layout.bytes_per_block
    limits = {"kv_cache": pool_bytes, "block_size": BLOCK_SIZE, "max_step_tokens": CHUNK, "max_sequences": max(job.streams)}
    router = {"role": "router", "cpus": other_cpus}
    decode = {"role": "decode", "cpus": engine_cpus, "threads": job.threads, **limits}
    model = {"path": path, "name": "served", "dtype": "bfloat16"}
    return config_text([router, decode], model=model, disaggregation={"policy": "never"})


def _wait_ready(url: str, processes: list[subprocess.Popen[bytes]], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while not answers(f"{url}/ready"):
        if any(process.poll() is not None for process in processes) or time.monotonic() > deadline:
            raise RuntimeError(f"the cluster did not start:\n{_tail(log)}")
        time.sleep(0.1)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────────────


def table(report: Report) -> Table:
    """A row per number of streams: medians of the turns."""
    rows = [_row(streams, [one for one in report.samples if one.streams == streams]) for streams in report.job.streams]
    alone = ("alone, step ms p50", "p99", "jitter")
    header = ("streams", "context", "engine tok/s", "served tok/s", "served/engine", *alone, "served, step ms p50", "p99", "jitter")
    return Table("The engine, alone and served", header, tuple(rows))


def _row(streams: int, samples: list[Sample]) -> tuple[str, ...]:
    cells = [
        f"{streams}",
        f"{median(one.context for one in samples):,.0f}",
        f"{median(one.engine_per_s for one in samples):,.0f}",
        f"{median(one.served_per_s for one in samples):,.0f}",
        f"{median(one.share for one in samples):.1%}",
    ]
    for steps in ([one.engine_step_ms for one in samples], [one.served_step_ms for one in samples]):
        cells += [f"{median(one.p50 for one in steps):.2f}", f"{median(one.p99 for one in steps):.2f}", f"{median(map(jitter, steps)):.0%}"]
    return tuple(cells)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--model", default="S", show_default=True, help="A shape (S, P, M), builtin:tiny, or a Hugging Face directory.")
@click.option("--streams", type=click.IntRange(min=1), multiple=True, help="Requests at once; may be given again.  [default: 8, 64]")
@click.option("--context", type=click.IntRange(min=1), default=1024, show_default=True, help="Tokens of each prompt.")
@click.option("--steps", type=click.IntRange(min=4), default=100, show_default=True, help="Decode steps in each turn, at least.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Turns; figures are their medians.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Compute threads, of both.")
@click.option("--quick", is_flag=True, help="The built-in model, short: shows that it runs, not how fast.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write figures here.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Append the section to this file.")
def main(
    model: str,
    streams: tuple[int, ...],
    context: int,
    steps: int,
    repeats: int,
    threads: int,
    quick: bool,
    json_path: Path | None,
    markdown: Path | None,
) -> None:
    """Measure what is left of the engine's speed behind a router and a decode node, and how even its steps are.

    A turn sends all requests at once, and counts from when the last has begun to stream until the first ends; then the
    engine alone, in a process of its own with the same settings, computes as many steps from the same contexts. Step times
    are taken in the compute thread, from the end of one turn to the end of the next; jitter is (p99 - p50) / p50.
    """
    job = Job(model=model, streams=streams or (8, 64), context=context, steps=steps, repeats=repeats, threads=threads)
    if quick:
        job = Job(model=BUILTIN, streams=(4,), context=64, steps=200, repeats=1, threads=1)
    report = measure(job)
    lines = [f"medians of {job.repeats} turns of {job.steps} steps or more; {job.threads} compute thread{'s' * (job.threads > 1)}"]
    show(section(f"Served: {Path(job.model).name}", report.machine, report.load, [table(report)], lines), markdown)
    write_json(json_path, report)


if __name__ == "__main__":
    main()
