"""What drawing a token costs on a CPU, natively and in plain torch: see --help."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import msgspec
import torch
from machine import LoadMeter, describe_machine, measure_as_nodes_do
from report import Table, section, show, write_json
from samples import interleaved, medians
from torch import Tensor

from disaggd.kernels import REFERENCE, Ops, select
from disaggd.kernels.draws import Draws

WAYS = {"greedy": None, "temperature 1": (0, 1.0), "top-k 50, top-p 0.95": (50, 0.95), "top-p 0.95": (0, 0.95)}
"""top-k and top-p."""


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One row. Processor seconds per row of logits, medians."""

    vocab_size: int
    way: str
    seconds: float
    torch_seconds: float


def draws(rows: int, top_k: int, top_p: float) -> Draws:
    return Draws(
        temperatures=torch.ones(rows),
        top_k=torch.full((rows,), top_k, dtype=torch.int32),
        top_p=torch.full((rows,), top_p),
        floors=torch.full((rows,), -26.1),
        seeds=torch.arange(rows),
        positions=torch.arange(rows),
        any_top_k=top_k > 0,
        any_top_p=top_p < 1,
    )


def sampler(ops: Ops, logits: Tensor, filters: tuple[int, float] | None) -> Callable[[], object]:
    return partial(ops.greedy, logits) if filters is None else partial(ops.sample, logits, draws(len(logits), *filters))


def cpu_s(work: Callable[[], object], rows: int, times: int = 5) -> float:
    """Processor seconds per row, of this process's threads together."""
    began = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - began) / times / rows


def measure(vocab_size: int, way: str, rows: int, repeats: int) -> Figure:
    logits = 3 * torch.randn(rows, vocab_size)
    ours, theirs = (sampler(ops, logits, WAYS[way]) for ops in (select(logits.device), REFERENCE))
    found = medians(interleaved({"ours": partial(cpu_s, ours, rows), "torch": partial(cpu_s, theirs, rows)}, repeats))
    return Figure(vocab_size=vocab_size, way=way, seconds=found["ours"], torch_seconds=found["torch"])


def table(figures: list[Figure]) -> Table:
    rows = [
        (
            f"{one.vocab_size:,}, {one.way}",
            f"{one.seconds * 1e6:,.1f}",
            f"{one.torch_seconds * 1e6:,.1f}",
            f"{one.torch_seconds / one.seconds:.1f}×",
        )
        for one in figures
    ]
    return Table("A row of logits", ("vocabulary, way", "native µs", "torch µs", "ratio"), tuple(rows))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--rows", type=click.IntRange(min=1), default=8, show_default=True, help="Of one step.")
@click.option("--repeats", type=click.IntRange(min=1), default=15, show_default=True, help="Turns; figures are their medians.")
@click.option("--quick", is_flag=True, help="A small vocabulary: shows that it runs.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Append the section to this file.")
def main(threads: int, rows: int, repeats: int, quick: bool, json_path: Path | None, markdown: Path | None) -> None:
    """Time the native sampler against the torch sampler, by turns, for vocabularies from 4,096 entries to Qwen3's.

    Logits are normal with a deviation of 3, in the cache as a head leaves them.
    """
    measure_as_nodes_do(threads)
    torch.set_grad_enabled(False)
    load, sizes = LoadMeter(), (4096,) if quick else (4096, 16_384, 151_936)
    figures = [measure(size, way, rows, repeats) for size in sizes for way in WAYS]
    notes = [f"{rows} rows a step; processor time per row, medians of {repeats} turns"]
    title = f"Sampling: {threads} thread{'s' * (threads > 1)}"
    show(section(title, describe_machine(), load.read(), [table(figures)], notes), markdown)
    write_json(json_path, figures)


if __name__ == "__main__":
    main()
