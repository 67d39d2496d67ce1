"""What it costs in accuracy that a prompt's KV comes over the wire in 8 bits: see --help."""

from pathlib import Path

import click
import msgspec
import torch
from accuracy import BLOCK_SIZE, WINDOW, Result, Scorer, Sums, held_out_windows, random_windows, table
from machine import Load, LoadMeter, Machine, describe_machine, measure_as_nodes_do
from models import BUILTIN, resolve
from report import section, show, write_json

from disaggd import kernels
from disaggd.kernels import fp8
from disaggd.model.directory import ModelDirectory, open_directory
from disaggd.model.spec import Dtype

PROMPT = WINDOW // 2
"""Tokens of each window whose KV comes from elsewhere; the others are computed, and scored, behind them."""

DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")


class Report(msgspec.Struct, frozen=True, kw_only=True):
    machine: Machine
    load: Load
    results: list[Result]


def through_fp8(kv: torch.Tensor, num_blocks: int) -> None:
    """As a prefill node sends these blocks, and a decode node takes them in."""
    ops, ids = kernels.select(kv.device), torch.arange(num_blocks)
    layers, _, kv_heads, _, block_size, head_dim = kv.shape
    wire = torch.zeros(layers, num_blocks, kv_heads, fp8.head_bytes(block_size, head_dim), dtype=torch.uint8)
    ops.repack(wire, kv, ids, layers=range(layers), heads=range(kv_heads), start=0, num_tokens=num_blocks * block_size)
    ops.unpack_fp8(kv, wire, ids, ids)


def measure(name: str, directory: ModelDirectory, windows: list[list[int]], *, is_text: bool) -> list[Result]:
    scorers = {dtype: Scorer(directory, dtype, "auto") for dtype in DTYPES}
    sums = {(dtype, wire): Sums() for dtype in DTYPES for wire in ("as it is", "in fp8")}
    for window in windows:
        prompt, rest, following = window[:PROMPT], window[PROMPT:WINDOW], torch.tensor(window[PROMPT + 1 : WINDOW + 1])
        exact = None
        for dtype, scorer in scorers.items():
            scorer.logits(prompt)
            plain = scorer.logits(rest, PROMPT)
            exact = plain if exact is None else exact  # the first is float32
            through_fp8(scorer.kv, PROMPT // BLOCK_SIZE)
            sums[dtype, "as it is"].add(plain, exact, following)
            sums[dtype, "in fp8"].add(scorer.logits(rest, PROMPT), exact, following)
    return [total.result(name, f"{dtype}, KV {wire}", is_text=is_text) for (dtype, wire), total in sums.items()]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--model", "models", multiple=True, help="Random weights to measure, too: S, P or M; may be given again.  [default: S]")
@click.option("--windows", type=click.IntRange(min=1), default=4, show_default=True, help=f"Of {WINDOW} random tokens, for those.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="OpenMP threads.")
@click.option("--quick", is_flag=True, help="Two windows of the built-in model alone.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Append the section to this file.")
def main(models: tuple[str, ...], windows: int, threads: int, quick: bool, json_path: Path | None, markdown: Path | None) -> None:
    """Measure what `wire_dtype = "fp8"` loses, on this CPU: the KV of a prompt goes through the wire format, what follows is scored.

    The built-in model reads the files that were held out of its training: its loss, and how far its logits are from
    float32's. Models of random weights read random tokens: their logits alone say something.
    """
    measure_as_nodes_do(threads)
    load = LoadMeter()
    directory = open_directory(BUILTIN)
    text = held_out_windows(directory)
    results = measure(BUILTIN, directory, text[:2] if quick else text, is_text=True)
    for name in () if quick else models or ("S",):
        directory = open_directory(resolve(name))
        results += measure(name, directory, random_windows(directory, windows), is_text=False)
    report = Report(machine=describe_machine(), load=load.read(), results=results)
    notes = [
        f"{BUILTIN}: {results[0].tokens:,} tokens of held-out text; others: {windows * (WINDOW - PROMPT):,} random tokens; each behind a "
        f"prompt of {PROMPT:,} or more, of which the KV of the first {PROMPT:,} is sent",
        "errors of all logits, in standard deviations of float32's logits",
    ]
    made = table(results, "Against float32 with the KV as it is")
    show(section("Accuracy of KV that was sent in 8 bits", report.machine, report.load, [made], notes), markdown)
    write_json(json_path, report)


if __name__ == "__main__":
    main()
