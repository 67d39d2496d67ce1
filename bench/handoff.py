"""How fast KV goes from one process to another, and how much of it hides behind computing: see --help."""

import contextlib
import os
import random
import secrets
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path
from statistics import median
from typing import Any

import click
import msgspec
from handoff_node import Pushed
from handoff_pool import Geometry
from machine import Load, LoadMeter, Machine, describe_machine
from models import SHAPES
from namespaces import DEVICE, bits_per_s, linked
from report import Table, section, show, write_json
from samples import interleaved, medians

from disaggd.transfer.environment import transfer_environment

BLOCK_SIZE = 64
_BFLOAT16_BYTES = 2
_ANSWER_S = 120.0
_PORTS_EACH = 16


class Node:
    """This process's end of a `handoff_node.py` process, or of another that obeys in the same way."""

    def __init__(self, first: object, device: str, interface: str, prefix: tuple[str, ...], script: str = "handoff_node.py") -> None:
        self._connection, theirs = Pipe()
        wanted = transfer_environment(interface, gpu=device != "cpu")
        environment = {**os.environ, **wanted, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [*prefix, sys.executable, str(Path(__file__).with_name(script)), str(theirs.fileno()), device]
        self._process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()
        self._connection.send(first)
        self.answer()

    def call(self, name: str, *arguments: object) -> Any:
        self.ask(name, *arguments)
        return self.answer()

    def ask(self, name: str, *arguments: object) -> None:
        """Have it begin; `answer` waits for the end."""
        self._connection.send((name, arguments))

    def answer(self) -> Any:
        """TimeoutError when none comes, EOFError when the node has ended, its traceback then being on stderr."""
        if not self._connection.poll(_ANSWER_S):
            raise TimeoutError(f"a node did not answer within {_ANSWER_S:.0f} s")
        return self._connection.recv()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._connection.send(None)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Push(msgspec.Struct, frozen=True):
    """One hand-off of the whole pool, as both ends saw it."""

    sent: Pushed
    landed_s: float
    receiver_cpu_s: float

    @property
    def total_s(self) -> float:
        return self.landed_s - self.sent.began_s

    @property
    def exposed_s(self) -> float:
        """From the last layer computed to all of it landed: what decode waits for."""
        return self.landed_s - self.sent.computed_s


class Pair:
    """A sender and a receiver, connected over NIXL and over a raw socket."""

    def __init__(self, sender: Node, receiver: Node, host: str, layer_group: int, busy: bool) -> None:
        self._sender, self._receiver = sender, receiver
        self._layer_group, self._busy = layer_group, busy
        opened = receiver.call("open")
        self._agent_id = opened.agent_id
        sender.call("connect", opened)
        receiver.call("probed")
        port = receiver.call("raw_listen", host)
        receiver.ask("raw_accept")
        sender.call("raw_connect", host, port)
        receiver.answer()

    def push(self, compute_s: float = 0.0, verify: bool = False) -> Push:
        token = secrets.token_bytes(16)
        self._receiver.call("expect", token, self._agent_id, verify)
        self._receiver.ask("landed")
        sent = self._sender.call("push", token, self._agent_id, self._layer_group, compute_s, self._busy, verify)
        landed_s, cpu_s = self._receiver.answer()
        if self._receiver.call("digest") != self._sender.call("digest"):
            raise ValueError("what landed is not what was sent")
        return Push(sent, landed_s, cpu_s)

    def raw_s(self) -> float:
        self._receiver.ask("raw_receive")
        began_s = self._sender.call("raw_send")
        return float(self._receiver.answer() - began_s)

    def memcpy_s(self) -> float:
        return float(self._sender.call("memcpy"))


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """Medians, in bytes per second."""

    kv_bytes: int
    push: float
    verified: float | None
    """The push with checksums taken and compared."""
    raw_socket: float
    memcpy: float
    of_link: float | None
    """The push's part of the link's rate."""
    sender_cpu_s_per_gb: float
    receiver_cpu_s_per_gb: float
    verified_cpu_s_per_gb: tuple[float, float] | None
    """Sender's and receiver's."""
    samples_s: dict[str, list[float]]


class Overlap(msgspec.Struct, frozen=True, kw_only=True):
    """Pushing layer by layer while the next are computed. Milliseconds, medians."""

    compute_ms: float
    """Of one layer."""
    wire_ms: float
    """Of one layer: of a push of all of them at once."""
    exposed_ms: float
    at_end_ms: float
    """What would be exposed without overlap: the whole push."""

    @property
    def exposed_layers(self) -> float:
        return self.exposed_ms / self.wire_ms


class Report(msgspec.Struct, frozen=True, kw_only=True):
    machine: Machine
    load: Load
    speed: Speed
    overlaps: list[Overlap]


def measure_speed(pair: Pair, geometry: Geometry, repeats: int, rate: str | None, verify: bool) -> Speed:
    """The push, and a verified one, against a raw socket and a memcpy of the same bytes, by turns."""
    pushes: dict[bool, list[Push]] = {False: [], True: []}

    def push_s(verified: bool) -> float:
        pushes[verified].append(pair.push(verify=verified))
        return pushes[verified][-1].total_s

    measures = {"push": lambda: push_s(False), "raw socket": pair.raw_s, "memcpy": pair.memcpy_s}
    if verify:
        measures["verified"] = lambda: push_s(True)
    for warm_up in measures.values():
        warm_up()
    for warmed_up in pushes.values():
        warmed_up.clear()
    found = interleaved(measures, repeats)
    speeds = {name: geometry.kv_bytes / seconds for name, seconds in medians(found).items()}
    gigabytes = geometry.kv_bytes / 1e9
    cpu_s, verified_cpu_s = cpu_of(pushes[False]), cpu_of(pushes[True]) if verify else None
    return Speed(
        kv_bytes=geometry.kv_bytes,
        push=speeds["push"],
        verified=speeds.get("verified"),
        raw_socket=speeds["raw socket"],
        memcpy=speeds["memcpy"],
        of_link=None if rate is None else speeds["push"] * 8 / bits_per_s(rate),
        sender_cpu_s_per_gb=cpu_s[0] / gigabytes,
        receiver_cpu_s_per_gb=cpu_s[1] / gigabytes,
        verified_cpu_s_per_gb=(verified_cpu_s[0] / gigabytes, verified_cpu_s[1] / gigabytes) if verified_cpu_s is not None else None,
        samples_s=found,
    )


def cpu_of(pushes: list[Push]) -> tuple[float, float]:
    """Processor seconds of the sender and of the receiver, medians."""
    return median(push.sent.cpu_s for push in pushes), median(push.receiver_cpu_s for push in pushes)


def measure_overlap(pair: Pair, geometry: Geometry, speed: Speed, compute_s: float, repeats: int) -> Overlap:
    exposed = [pair.push(compute_s).exposed_s for _ in range(repeats)]
    at_end_s = geometry.kv_bytes / speed.push
    return Overlap(
        compute_ms=compute_s * 1e3, wire_ms=at_end_s / geometry.layers * 1e3, exposed_ms=median(exposed) * 1e3, at_end_ms=at_end_s * 1e3
    )


@contextlib.contextmanager
def paired(geometry: Geometry, device: str, rate: str | None, layer_group: int, busy: bool) -> Iterator[Pair]:
    """Both processes: on loopback, or in two namespaces with a link of that rate between them."""
    with contextlib.ExitStack() as stack:
        prefixes: list[tuple[str, ...]] = [(), ()]
        interface, host = "lo", "127.0.0.1"
        if rate is not None:
            ends = stack.enter_context(linked(rate))
            prefixes, interface, host = [end.prefix for end in ends], DEVICE, ends[1].address
        nodes = []
        for prefix in prefixes:
            nodes.append(Node(geometry, device, interface, prefix))
            stack.callback(nodes[-1].close)
        yield Pair(nodes[0], nodes[1], host, layer_group, busy)


def geometry_of(model: str, num_tokens: int) -> Geometry:
    """A pool that holds just one prompt."""
    shape = SHAPES[model]
    first = random.randrange(20_000, 31_000, _PORTS_EACH)
    return Geometry(
        layers=shape.layers,
        num_blocks=-(-num_tokens // BLOCK_SIZE),
        block_bytes=2 * shape.kv_heads * BLOCK_SIZE * shape.head_dim * _BFLOAT16_BYTES,
        ports=(first, first + _PORTS_EACH - 1),
    )


def tables(speed: Speed, overlaps: list[Overlap]) -> list[Table]:
    rows = [
        (name, f"{value / 1e9:.3f}", f"{speed.push / value:.0%}")
        for name, value in (
            ("push over NIXL", speed.push),
            ("the same, verified", speed.verified),
            ("raw TCP socket", speed.raw_socket),
            ("memcpy", speed.memcpy),
        )
        if value is not None
    ]
    found = [Table("Throughput", ("", "GB/s", "the push reaches"), tuple(rows))]
    if overlaps:
        times = [
            (
                f"{one.compute_ms:.2f}",
                f"{one.wire_ms:.2f}",
                f"{one.exposed_ms:.2f}",
                f"{one.exposed_layers:.1f}",
                f"{one.at_end_ms:.1f}",
            )
            for one in overlaps
        ]
        header = ("compute ms/layer", "wire ms/layer", "exposed ms", "exposed, in layers' wire", "pushed at the end, ms")
        found.append(Table("Overlap", header, tuple(times)))
    return found


def notes(speed: Speed, layer_group: int) -> list[str]:
    lines = [
        f"{speed.kv_bytes / 1e6:,.0f} MB, {layer_group} layer{'s' * (layer_group > 1)} a write",
        f"processor seconds per GB: sender {speed.sender_cpu_s_per_gb:.2f}, receiver {speed.receiver_cpu_s_per_gb:.2f}",
    ]
    if speed.verified_cpu_s_per_gb is not None:
        sender, receiver = speed.verified_cpu_s_per_gb
        lines.append(f"verified: sender {sender:.2f}, receiver {receiver:.2f}")
    return lines if speed.of_link is None else [*lines, f"{speed.of_link:.0%} of the link's rate, as payload"]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--model", type=click.Choice(list(SHAPES)), default="M", show_default=True, help="Whose KV it is.")
@click.option("--tokens", "num_tokens", type=click.IntRange(min=1), default=4096, show_default=True, help="Of the prompt handed over.")
@click.option("--layer-group", type=click.IntRange(min=1), default=1, show_default=True, help="Layers per write ([transfer] layer_group).")
@click.option(
    "--compute-ms", type=float, multiple=True, help="Compute time per layer; may be given again.  [default: ½, 1, 2 × the wire's]"
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Whose memory holds both pools.")
@click.option("--busy/--idle", default=True, show_default=True, help="Compute on a core, or leave it alone as a GPU's host would.")
@click.option("--verify", is_flag=True, help="Also with a checksum of every block, as [transfer] verify = true has it.")
@click.option("--namespaces", "rate", metavar="RATE", help="Over a link of this rate, such as 1gbit, instead of loopback; wants root.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Turns; figures are their medians.")
@click.option("--quick", is_flag=True, help="A small prompt of a small model: shows that it runs, not how fast.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Append the section to this file.")
def main(
    model: str,
    num_tokens: int,
    layer_group: int,
    compute_ms: tuple[float, ...],
    device: str,
    busy: bool,
    verify: bool,
    rate: str | None,
    repeats: int,
    quick: bool,
    json_path: Path | None,
    markdown: Path | None,
) -> None:
    """Measure a hand-off of one prompt's KV between two processes, as disaggd's transfer threads do it.

    Throughput against a raw TCP socket (in the host's memory) and a memcpy of the same bytes in the same run; KV of a GPU goes
    through the host's memory at both ends, and is timed from pool to pool. Then, with the layers "computed" one after
    another, how much of the transfer is left when the last one is done. Every push is checked by its bytes.
    """
    if quick:
        model, num_tokens, repeats = "S", 512, 2
    if rate is not None and os.geteuid() != 0:
        raise click.UsageError("--namespaces wants root")
    geometry, load = geometry_of(model, num_tokens), LoadMeter()
    with paired(geometry, device, rate, layer_group, busy) as pair:
        speed = measure_speed(pair, geometry, repeats, rate, verify)
        wire_s = geometry.kv_bytes / speed.push / geometry.layers
        times = [value / 1e3 for value in compute_ms] or [factor * wire_s for factor in (0.5, 1.0, 2.0)]
        overlaps = [measure_overlap(pair, geometry, speed, compute_s, repeats) for compute_s in times]
    report = Report(machine=describe_machine(), load=load.read(), speed=speed, overlaps=overlaps)
    title = (
        f"Hand-off of {num_tokens:,} tokens of {model}, "
        + (f"{rate} link" if rate else "loopback")
        + (", GPU memory at both ends" if device == "cuda" else "")
    )
    show(section(title, report.machine, report.load, tables(speed, overlaps), notes(speed, layer_group)), markdown)
    write_json(json_path, report)


if __name__ == "__main__":
    main()
