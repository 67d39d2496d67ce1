"""Direct against repacked: which way KV is faster from one cut into another, and how often the rule picks it: see --help."""

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import click
import msgspec
from handoff import Node
from machine import Load, LoadMeter, Machine, describe_machine
from namespaces import DEVICE, linked
from report import Table, section, show, write_json
from reshape_cells import HEAD_DIM, LAYERS, Cell, cells
from samples import interleaved

from disaggd.config import TransferConfig
from disaggd.transfer.path import path_of

WAYS = ("direct", "repacked")
TIE = 0.05
"""Ways that differ by less than that part are as fast as each other."""

_PORTS_EACH = 16


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One cell: medians."""

    kind: str
    source_block: int
    target_block: int
    slice_bytes: int
    """What one write's rank gets of a target block."""
    num_blocks: int
    scattered: bool
    seconds: dict[str, float]
    cpu_s: dict[str, float]
    """Of the sender's process."""
    samples_s: dict[str, list[float]]
    ruled: str

    @property
    def faster(self) -> str:
        return min(WAYS, key=self.seconds.__getitem__)

    @property
    def is_right(self) -> bool:
        return self.ruled == self.faster or self.seconds[self.ruled] <= self.seconds[self.faster] * (1 + TIE)


class Report(msgspec.Struct, frozen=True, kw_only=True):
    machine: Machine
    load: Load
    direct_slice_bytes: int
    results: list[Result]


def measure(sender: Node, receiver: Node, kind: str, one: Cell, repeats: int, direct_slice_bytes: int) -> Result:
    opened = receiver.call("open", one)
    sender.call("connect", one, opened)
    cpu_s: dict[str, list[float]] = {way: [] for way in WAYS}
    digests = {}

    def seconds(way: str) -> float:
        receiver.ask("landed", LAYERS)
        began_s, cpu = sender.call("write", way, opened.agent_id)
        took_s = float(receiver.answer() - began_s)
        cpu_s[way].append(cpu)
        return took_s

    for way in WAYS:  # also warms up
        seconds(way)
        digests[way] = receiver.call("digest")
        cpu_s[way].clear()
    if digests["direct"] != digests["repacked"]:
        raise ValueError(f"the two ways bring different bytes: {one}")
    samples = interleaved({way: lambda way=way: seconds(way) for way in WAYS}, repeats)
    for node in (sender, receiver):
        node.call("close")
    return Result(
        kind=kind,
        source_block=one.source.block_size,
        target_block=one.target.block_size,
        slice_bytes=len(one.cut.heads) * one.target.groups[0].head_bytes,
        num_blocks=one.target.blocks_for(one.num_tokens),
        scattered=one.scattered,
        seconds={way: median(found) for way, found in samples.items()},
        cpu_s={way: median(found) for way, found in cpu_s.items()},
        samples_s=samples,
        ruled=path_of(one.ours, one.theirs, one.cut, direct_slice_bytes),
    )


@contextlib.contextmanager
def paired(rate: str | None) -> Iterator[tuple[Node, Node]]:
    """Both processes: on loopback, or in two namespaces with a link of that rate between them."""
    with contextlib.ExitStack() as stack:
        prefixes: list[tuple[str, ...]] = [(), ()]
        interface = "lo"
        if rate is not None:
            prefixes, interface = [end.prefix for end in stack.enter_context(linked(rate))], DEVICE
        nodes = []
        first = random.randrange(20_000, 31_000, 2 * _PORTS_EACH)
        for number, prefix in enumerate(prefixes):
            ports = first + number * _PORTS_EACH, first + (number + 1) * _PORTS_EACH - 1
            nodes.append(Node(ports, "cpu", interface, prefix, "reshape_node.py"))
            stack.callback(nodes[-1].close)
        yield nodes[0], nodes[1]


def table(results: list[Result]) -> Table:
    rows = [
        (
            {"split": "a block's part becomes a block", "join": "a block becomes a block's part", "sizes": "blocks of other sizes"}[
                one.kind
            ],
            f"{one.source_block} → {one.target_block}",
            f"{one.slice_bytes / 1024:g}",
            str(one.num_blocks),
            "scattered" if one.scattered else "neighbours",
            f"{one.seconds['direct'] * 1e3:.2f}",
            f"{one.seconds['repacked'] * 1e3:.2f}",
            f"{one.seconds['direct'] / one.seconds['repacked']:.2f}×",
            f"{one.cpu_s['direct'] * 1e3:.1f} / {one.cpu_s['repacked'] * 1e3:.1f}",
            f"{one.ruled}{'' if one.is_right else ', wrongly'}",
        )
        for one in results
    ]
    header = ("", "tokens", "KiB a slice", "blocks", "lying", "direct, ms", "repacked, ms", "gain", "sender's CPU, ms", "the rule")
    return Table("Ways", header, tuple(rows))


def notes(results: list[Result], direct_slice_bytes: int) -> list[str]:
    right = sum(one.is_right for one in results)
    strictly = sum(one.ruled == one.faster for one in results)
    picked = [one for one in results if one.ruled == "repacked"]
    gains = [one.seconds["direct"] / one.seconds["repacked"] for one in picked]
    return [
        f"{LAYERS} layers, a write each, heads of {HEAD_DIM} in bfloat16; from the first byte repacked or posted to the last one arrived",
        f"the rule (direct from {direct_slice_bytes:,} bytes on) picks the faster way, or one within {TIE:.0%} of it, in {right} of "
        f"{len(results)} cells ({right / len(results):.0%}); strictly the faster in {strictly} ({strictly / len(results):.0%})",
        f"where it picks repacking, that is {min(gains):.2f} to {max(gains):.2f} times as fast, in the median {median(gains):.2f}",
    ]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--namespaces", "rate", metavar="RATE", help="Over a link of this rate, such as 1gbit, instead of loopback; wants root.")
@click.option("--repeats", type=click.IntRange(min=1), default=7, show_default=True, help="Turns; figures are their medians.")
@click.option("--direct-slice-bytes", type=click.IntRange(min=0), help="The rule's threshold.  [default: the config's]")
@click.option("--quick", is_flag=True, help="Few cells: shows that it runs.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Append the section to this file.")
def main(
    rate: str | None, repeats: int, direct_slice_bytes: int | None, quick: bool, json_path: Path | None, markdown: Path | None
) -> None:
    """Measure writes of KV into another cut: read where it lies, a descriptor for each run, against repacked first.

    Over a grid of slice sizes, numbers of blocks, and block sizes, by turns, with the two ways' bytes compared once. Where
    block sizes differ `direct` is what disaggd never does: every run of tokens of a head's keys, or values, by itself.
    """
    if rate is not None and os.geteuid() != 0:
        raise click.UsageError("--namespaces wants root")
    threshold = int(TransferConfig().direct_slice_bytes) if direct_slice_bytes is None else direct_slice_bytes
    load = LoadMeter()
    with paired(rate) as (sender, receiver):
        results = [measure(sender, receiver, kind, one, repeats, threshold) for kind, one in cells(quick)]
    report = Report(machine=describe_machine(), load=load.read(), direct_slice_bytes=threshold, results=results)
    where = f"{rate} link" if rate else "loopback"
    show(section(f"Direct and repacked, {where}", report.machine, report.load, [table(results)], notes(results, threshold)), markdown)
    write_json(json_path, report)


if __name__ == "__main__":
    main()
