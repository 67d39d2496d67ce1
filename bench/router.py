"""How many streams and tokens one router carries, and how long it holds a token: see --help.

Three processes: stub decode nodes, the router, and this one, the client, which takes the times of events from the kernel.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import click
import msgspec
from arrivals import Listener, Stream
from client import Target
from machine import Load, LoadMeter, Machine, describe_machine, process_cpu_s
from models import BUILTIN
from report import Table, section, show, write_json
from samples import Spread, spread
from server_process import answers, free_ports
from stub_decode import Pace, Sent, Stub

from disaggd.model.directory import open_directory
from disaggd.transfer.layout import kv_spec

BLOCK_SIZE = 64
_WARM_SHARE = 0.1
"""Of the tokens, the first ones do not count."""

_KEPT_UP = 0.97
"""A run whose tokens came out at this part of the offered rate, or faster, was carried."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One offered rate."""

    offered_per_s: float
    carried_per_s: float
    """Events per second, from the stub's sending of the first that counts to this client's reading of the last."""
    added_ms: Spread
    """From the stub's send to the arrival at the client's socket."""
    router_cores: float
    router_us_per_token: float
    stub_late_ms: Spread
    """How late the stub sent its frames: large figures are this machine's, not the router's."""
    client_late_ms: Spread
    """How long events lay at the client's socket. Not in `added_ms`, unless so long that the stream's next event came."""
    client_cores: float
    is_one_event_per_token: bool

    @property
    def kept_up(self) -> bool:
        return self.carried_per_s >= _KEPT_UP * self.offered_per_s


class Report(msgspec.Struct, frozen=True, kw_only=True):
    machine: Machine
    load: Load
    streams: int
    peers: int
    runs: list[Run]


# ── the client ───────────────────────────────────────────────────────────────────────────────────────────────────────


def body_of(stream: int, num_tokens: int) -> bytes:
    """A stream's number is its prompt, so that the stub can tell them apart."""
    return msgspec.json.encode({"model": "stub", "prompt": [stream], "max_tokens": num_tokens, "ignore_eos": True, "stream": True})


# ── a run ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Bench(msgspec.Struct, frozen=True):
    """The processes that are measured."""

    stub: Connection
    router_pid: int
    target: Target
    num_streams: int
    is_stub_first: bool
    """The stub has real-time priority, so that the client, with which it shares a core, does not make it late."""

    def run(self, rate: float, seconds: float) -> Run:
        num_tokens = max(20, round(rate * seconds / self.num_streams))
        self.stub.send(Pace(num_streams=self.num_streams, num_tokens=num_tokens, step_s=self.num_streams / rate))
        with Listener() as listener:
            numbers = range(1, self.num_streams + 1)
            streams = [listener.open(self.target, body_of(number, num_tokens)) for number in numbers]
            self.stub.recv()  # all are there
            cpu_s, own_s = process_cpu_s(self.router_pid), time.process_time()
            self.stub.send(None)
            listener.listen(until=lambda: not listener.num_open)
            cpu_s, own_s = process_cpu_s(self.router_pid) - cpu_s, time.process_time() - own_s
        return self._judge(rate, num_tokens, streams, self.stub.recv(), cpu_s, own_s)

    def _judge(self, rate: float, num_tokens: int, streams: list[Stream], sent: Sent, cpu_s: float, own_s: float) -> Run:
        first = int(num_tokens * _WARM_SHARE)
        added, late, arrived = [], [], []
        for number, stream in enumerate(streams, start=1):
            stamps_s, event_s = sent.stamps_s[sent.node_of_stream[number]], stream.event_s[first:num_tokens]
            arrived += event_s
            added += [(at - stamp) * 1e3 for at, stamp in zip(event_s, stamps_s[first:], strict=False)]
            late += [(read - at) * 1e3 for at, read in zip(event_s, stream.read_s[first:], strict=False)]
        began_s, warm_s = (min(stamps[index] for stamps in sent.stamps_s) for index in (0, first))
        ended_s = max(arrived)
        return Run(
            offered_per_s=rate,
            carried_per_s=len(arrived) / (ended_s - warm_s),
            added_ms=_spread(added),
            router_cores=cpu_s / (ended_s - began_s),
            router_us_per_token=cpu_s * 1e6 / (num_tokens * self.num_streams),
            stub_late_ms=_spread([late_s * 1e3 for late_s in sent.late_s]),
            client_late_ms=_spread(late),
            client_cores=own_s / (ended_s - began_s),
            is_one_event_per_token=all(len(stream.event_s) == num_tokens + 1 for stream in streams),  # and [DONE]
        )


def _spread(samples: list[float]) -> Spread:
    found = spread(samples)
    assert found is not None, "no stream had any token"
    return found


@contextlib.contextmanager
def started(num_streams: int, num_peers: int, pin: bool) -> Iterator[Bench]:
    """Router and stubs; with two cores or more the router has the last one to itself."""
    directory = open_directory(BUILTIN)
    spec = directory.spec()
    router_port, *ports = free_ports(1 + num_peers)
    names = tuple(f"d{number}" for number in range(num_peers))
    addresses = tuple(f"127.0.0.1:{port}" for port in ports)
    stub = Stub(
        names=names,
        addresses=addresses,
        model_id=directory.model_id,
        kv=kv_spec(spec, BLOCK_SIZE),
        vocab_size=spec.vocab_size,
        max_model_len=spec.max_position_embeddings,
    )
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = root / "config.toml"
        config.write_text(_config(router_port, names, addresses, num_streams))
        ours, theirs = Pipe()
        stub_process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("stub_decode.py")), str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
        stack.callback(_end, stub_process)
        ours.send(stub)
        ours.recv()
        log = stack.enter_context((root / "router.log").open("wb"))
        router = subprocess.Popen([sys.executable, "-m", "disaggd", "--role", "router", "--config", str(config)], stdout=log, stderr=log)
        stack.callback(_end, router)
        url = f"http://127.0.0.1:{router_port}"
        _wait_ready(url, router, root / "router.log")
        if pin:
            _pin(router.pid, stub_process.pid)
        yield Bench(ours, router.pid, Target.of(url, "completions", None), num_streams, _put_first(stub_process.pid))


def _config(port: int, names: tuple[str, ...], addresses: tuple[str, ...], num_streams: int) -> str:
    parts = [f'[model]\npath = "{BUILTIN}"\nname = "stub"', f"[router]\nmax_requests = {num_streams + 1}"]
    parts.append(f'[[node]]\nname = "router"\nrole = "router"\nlisten = "127.0.0.1:{port}"')
    parts += [f'[[node]]\nname = "{name}"\nrole = "decode"\nlisten = "{at}"' for name, at in zip(names, addresses, strict=True)]
    return "\n".join(parts) + "\n"


def _wait_ready(url: str, router: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while not answers(f"{url}/ready"):
        if router.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the router did not start:\n{log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.05)


def _pin(router_pid: int, stub_pid: int) -> None:
    *others, last = sorted(os.sched_getaffinity(0))
    if others:
        os.sched_setaffinity(router_pid, {last})
        os.sched_setaffinity(stub_pid, others)
        os.sched_setaffinity(0, others)


def _put_first(pid: int) -> bool:
    """Give a process real-time priority; False where that is not allowed."""
    try:
        os.sched_setscheduler(pid, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        return False
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────────────


def table(runs: list[Run]) -> Table:
    """A row per offered rate: medians of its runs."""
    rows = [_row(rate, [run for run in runs if run.offered_per_s == rate]) for rate in dict.fromkeys(run.offered_per_s for run in runs)]
    late = ("stub late ms p99", "client late ms p99")
    header = ("offered tok/s", "carried tok/s", "added ms p50", "p99", "max", "router cores", "µs/token", *late, "client cores")
    return Table("One router process, one SSE event per token", header, tuple(rows))


def _row(rate: float, runs: list[Run]) -> tuple[str, ...]:
    def middle(figure: Callable[[Run], float]) -> float:
        return median(figure(run) for run in runs)

    return (
        f"{rate:,.0f}",
        f"{middle(lambda run: run.carried_per_s):,.0f}{'' if all(run.kept_up for run in runs) else ' (fell behind)'}",
        f"{middle(lambda run: run.added_ms.p50):.2f}",
        f"{middle(lambda run: run.added_ms.p99):.2f}",
        f"{middle(lambda run: run.added_ms.max):.1f}",
        f"{middle(lambda run: run.router_cores):.2f}",
        f"{middle(lambda run: run.router_us_per_token):.1f}",
        f"{middle(lambda run: run.stub_late_ms.p99):.1f}",
        f"{middle(lambda run: run.client_late_ms.p99):.1f}",
        f"{middle(lambda run: run.client_cores):.2f}",
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--streams", type=click.IntRange(min=1), default=256, show_default=True, help="Requests that stream at once.")
@click.option("--peers", type=click.IntRange(min=1), default=4, show_default=True, help="Stub decode nodes that share them.")
@click.option(
    "--rate", "rates", type=float, multiple=True, help="Tokens per second, in all; again for more.  [default: 10, 20, 40, 60 thousand]"
)
@click.option("--seconds", type=float, default=4.0, show_default=True, help="For each rate and turn.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Turns, each of all rates.")
@click.option("--pin/--no-pin", default=True, show_default=True, help="Give the router a core of its own.")
@click.option("--quick", is_flag=True, help="A few streams and tokens: shows that it runs, not how fast.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Append the section to this file.")
def main(
    streams: int,
    peers: int,
    rates: tuple[float, ...],
    seconds: float,
    repeats: int,
    pin: bool,
    quick: bool,
    json_path: Path | None,
    markdown: Path | None,
) -> None:
    """Measure one router between stub decode nodes, which send tokens at a given rate, and a client that streams them all.

    Every decode node sends a frame per step with one token for each of its streams, as real ones do, and the nodes take turns.
    A token's added latency is from the stub's send to its arrival at the client's socket. Detokenizing and JSON are included; the model is
    the built-in one's tokenizer.
    """
    if quick:
        streams, peers, rates, seconds, repeats = 16, 2, (1000.0,), 0.5, 1
    load, runs = LoadMeter(), []
    with started(streams, peers, pin) as bench:
        bench.run(1000.0 if quick else 5000.0, 0.5)  # warms up
        for rate in (rates or (10e3, 20e3, 40e3, 60e3)) * repeats:
            runs.append(bench.run(rate, seconds))
    report = Report(machine=describe_machine(), load=load.read(), streams=streams, peers=peers, runs=runs)
    lines = [f"{streams} streams over {peers} decode nodes; medians of {repeats} turns, {seconds:g} s for each rate"]
    lines.append(f"stub nodes at {'real-time' if bench.is_stub_first else 'ordinary (no other is allowed)'} priority")
    if not all(run.is_one_event_per_token for run in runs):
        lines.append("NOT one event per token: the figures mean something else")
    show(section("Router", report.machine, report.load, [table(runs)], lines), markdown)
    write_json(json_path, report)


if __name__ == "__main__":
    main()
