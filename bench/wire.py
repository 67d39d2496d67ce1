"""KV in 8 bits against KV as it is, over links of a given rate: see --help."""

import asyncio
import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import click
import msgspec
from client import Target, fetch
from cluster import Running, apart
from machine import Load, LoadMeter, Machine, describe_machine
from models import SHAPES, resolve
from namespaces import linked, reachable
from report import Table, section, show, write_json
from reshape import paired
from reshape_cells import Cell

from disaggd.config import WireDtype
from disaggd.transfer.layout import KVGroup, KVSpec, in_fp8
from disaggd.transfer.reshape import HeadCut

WIRES: tuple[WireDtype, ...] = ("auto", "fp8")
BLOCK_SIZE = 64

_BFLOAT16_BYTES = 2
_TIMEOUT_S = 180.0
_OUTPUT_TOKENS = 4


class Wire(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt's KV over one link, nothing computed meanwhile: medians."""

    wire: WireDtype
    kv_bytes: int
    seconds: float
    """From the first block read, or repacked, to the last one arrived."""
    cpu_s: float
    """Of the sender."""
    samples_s: list[float]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One request to a cluster whose prefill and decode node are on either side of a link."""

    wire: WireDtype
    is_cached: bool
    """The prefill node had the prompt's KV, from the request before, so that it was all wire; the decode node keeps none."""
    kv_bytes: int
    first_s: float
    second_s: float
    """From sending the request."""
    prefill_s: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    machine: Machine
    load: Load
    wires: list[Wire]
    answers: list[Answer]


def spec(model: str) -> KVSpec:
    shape = SHAPES[model]
    head_bytes = 2 * BLOCK_SIZE * shape.head_dim * _BFLOAT16_BYTES
    group = KVGroup(layers=shape.layers, kv_heads=shape.kv_heads, head_bytes=head_bytes)
    return KVSpec(dtype="bfloat16", block_size=BLOCK_SIZE, head_dim=shape.head_dim, groups=(group,))


# ── the wire alone ───────────────────────────────────────────────────────────────────────────────────────────────────


def measure_wire(model: str, num_tokens: int, rate: str | None, repeats: int) -> list[Wire]:
    """By turns: all of the prompt, a write for each layer, from a pool into another or into memory in fp8. Without a rate on loopback."""
    kv = spec(model)
    found: dict[WireDtype, list[tuple[float, float]]] = {wire: [] for wire in WIRES}
    cells = {wire: _cell(kv, kv if wire == "auto" else in_fp8(kv), num_tokens) for wire in WIRES}
    with paired(rate) as (sender, receiver):
        for _ in range(repeats):
            for wire, cell in cells.items():
                opened = receiver.call("open", cell)
                sender.call("connect", cell, opened)
                for is_measured in (False, True):  # a node's staging memory has been touched before
                    receiver.ask("landed", kv.num_layers)
                    began_s, cpu_s = sender.call("write", "direct" if wire == "auto" else "repacked", opened.agent_id)
                    took_s = float(receiver.answer() - began_s)
                    if is_measured:
                        found[wire].append((took_s, cpu_s))
                for node in (sender, receiver):
                    node.call("close")
    return [
        Wire(
            wire=wire,
            kv_bytes=cells[wire].target.blocks_for(num_tokens) * cells[wire].target.bytes_per_block,
            seconds=median(took_s for took_s, _ in taken),
            cpu_s=median(cpu_s for _, cpu_s in taken),
            samples_s=[took_s for took_s, _ in taken],
        )
        for wire, taken in found.items()
    ]


def _cell(source: KVSpec, target: KVSpec, num_tokens: int) -> Cell:
    heads = range(source.groups[0].kv_heads)
    return Cell(
        source=source,
        target=target,
        cut=HeadCut(0, 0, heads),
        num_sources=1,
        num_targets=1,
        num_tokens=num_tokens,
        scattered=False,
    )


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def measure_answers(model: str, num_tokens: int, rate: str, turns: int, requests: int) -> Iterator[Answer]:
    """Clusters by turns; each prompt is sent twice, and the first one left out.

    All nodes have all cores: one request has one of them busy at a time.
    """
    for turn in range(turns):
        for wire in WIRES:
            with ExitStack() as stack:
                prefill, decode = stack.enter_context(reachable(stack.enter_context(linked(rate))))
                directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                cpus = sorted(os.sched_getaffinity(0))
                tables = {
                    "model": {"path": resolve(model), "dtype": "bfloat16", "name": model},
                    "disaggregation": {"policy": "always", "self_measurement": False, "prefix_push": "never"},
                    "transfer": {"wire_dtype": wire},
                }
                engine = {"cpus": cpus, "threads": len(cpus), "kv_cache": "1GiB", "block_size": BLOCK_SIZE}
                nodes = (
                    {"role": "router", "cpus": cpus},
                    {"role": "prefill", **engine},
                    {"role": "decode", "prefix_cache": False, **engine},
                )
                cluster = stack.enter_context(apart(nodes, tables, {"prefill": prefill, "decode": decode}, directory))
                for number in range(requests + 1):
                    answers = [_answer(cluster, wire, num_tokens, 100 * turn + number, is_cached) for is_cached in (False, True)]
                    if number:
                        yield from answers


def _answer(cluster: Running, wire: WireDtype, num_tokens: int, seed: int, is_cached: bool) -> Answer:
    draw = random.Random(seed)
    body = {
        "model": cluster.model,
        "prompt": [draw.randrange(1, 1000) for _ in range(num_tokens)],
        "max_tokens": _OUTPUT_TOKENS,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
    }
    target = Target.of(cluster.url, "completions", None)
    outcome = asyncio.run(fetch(target, msgspec.json.encode(body), time.perf_counter(), _TIMEOUT_S))
    if outcome.error is not None or len(outcome.event_s) < 2 or outcome.request_id is None:
        raise RuntimeError(f"a request failed: {outcome.error}, {len(outcome.event_s)} events")
    receipt = cluster.receipt(outcome.request_id)
    if receipt.decision != "remote" or receipt.spans_ms.prefill is None:
        raise RuntimeError(f"the prompt was not prefilled elsewhere: {receipt.reason}")
    if is_cached != (receipt.cached_tokens.prefill > 0) or receipt.cached_tokens.decode:
        raise RuntimeError(f"cached tokens: {receipt.cached_tokens}")
    return Answer(
        wire=wire,
        is_cached=is_cached,
        kv_bytes=receipt.kv_bytes,
        first_s=outcome.event_s[0] - outcome.sent_s,
        second_s=outcome.event_s[1] - outcome.sent_s,
        prefill_s=receipt.spans_ms.prefill / 1e3,
    )


# ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────────────


def tables(wires: list[Wire], answers: list[Answer], wire_rate: str | None, answer_rate: str) -> list[Table]:
    found = []
    if wires:
        plain = wires[0]
        rows = [
            (
                _name(one.wire),
                f"{one.kv_bytes / 1e6:,.1f}",
                f"{one.kv_bytes / plain.kv_bytes:.1%}",
                f"{one.seconds * 1e3:,.0f}",
                f"{plain.seconds / one.seconds:.2f}×",
                f"{one.cpu_s * 1e3:,.0f}",
            )
            for one in wires
        ]
        header = ("KV", "MB", "of bfloat16's", "on the wire, ms", "faster", "sender's CPU, ms")
        found.append(Table(f"The wire alone, {wire_rate or 'loopback'}", header, tuple(rows)))
    if answers:
        of = {
            (is_cached, wire): [one for one in answers if (one.is_cached, one.wire) == (is_cached, wire)]
            for is_cached in (False, True)
            for wire in WIRES
        }
        plain_s = {is_cached: median(one.second_s for one in of[is_cached, "auto"]) for is_cached in (False, True)}
        rows = [
            (
                "cached at the prefill node" if is_cached else "computed",
                _name(wire),
                f"{median(one.kv_bytes for one in taken) / 1e6:,.1f}",
                f"{median(one.prefill_s for one in taken):.2f}",
                f"{median(one.first_s for one in taken):.2f}",
                f"{median(one.second_s for one in taken):.2f}",
                f"{min(one.second_s for one in taken):.2f} to {max(one.second_s for one in taken):.2f}",
                f"{plain_s[is_cached] / median(one.second_s for one in taken):.2f}×",
            )
            for (is_cached, wire), taken in of.items()
        ]
        header = ("prompt", "KV", "MB", "prefill, s", "first token, s", "second token, s", "of the requests", "sooner")
        found.append(Table(f"Answers, prefill and decode nodes on either side of {answer_rate}", header, tuple(rows)))
    return found


def _name(wire: WireDtype) -> str:
    return "as it is, bfloat16" if wire == "auto" else "fp8"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--model", type=click.Choice(list(SHAPES)), default="M", show_default=True, help="Whose KV it is.")
@click.option("--tokens", "num_tokens", type=click.IntRange(min=1), default=2048, show_default=True, help="Of the prompt.")
@click.option("--wire-rate", default="1gbit", show_default=True, help="Of the link that KV alone goes over.")
@click.option("--answer-rate", default="100mbit", show_default=True, help="Of the link of the cluster that answers.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Turns on the wire; figures are their medians.")
@click.option("--turns", type=click.IntRange(min=0), default=2, show_default=True, help="Clusters of each kind; 0: the wire alone.")
@click.option("--requests", type=click.IntRange(min=1), default=3, show_default=True, help="Prompts to each cluster, one after another.")
@click.option("--quick", is_flag=True, help="A small prompt over loopback, no clusters, no root: shows that it runs, not what is saved.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Append the section to this file.")
def main(
    model: str,
    num_tokens: int,
    wire_rate: str | None,
    answer_rate: str,
    repeats: int,
    turns: int,
    requests: int,
    quick: bool,
    json_path: Path | None,
    markdown: Path | None,
) -> None:
    """Measure what `[transfer] wire_dtype = "fp8"` saves between two network namespaces; wants root.

    A prompt's KV over a link by itself, in bytes and in time; then whole clusters whose prefill and decode nodes have a slow link
    between them, and when their clients have the second token, which needs the KV: of prompts that are computed, behind which the wire
    hides as far as computing takes, and of the same once more, which the prefill node has cached.
    """
    if quick:
        model, num_tokens, wire_rate, repeats, turns = "S", 512, None, 1, 0
    elif os.geteuid() != 0:
        raise click.UsageError("namespaces want root")
    load = LoadMeter()
    wires = measure_wire(model, num_tokens, wire_rate, repeats)
    answers = list(measure_answers(model, num_tokens, answer_rate, turns, requests))
    report = Report(machine=describe_machine(), load=load.read(), wires=wires, answers=answers)
    notes = [f"{model}, {num_tokens:,} tokens, bfloat16, blocks of {BLOCK_SIZE}; random weights and prompts; every node has all cores"]
    title = "KV in 8 bits on slow links"
    show(section(title, report.machine, report.load, tables(wires, answers, wire_rate, answer_rate), notes), markdown)
    write_json(json_path, report)


if __name__ == "__main__":
    main()
