"""What int8 weights and bfloat16 cost in accuracy, against float32: see --help."""

import hashlib
import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import torch
import torch.nn.functional as F
from machine import Load, LoadMeter, Machine, describe_machine, measure_as_nodes_do
from models import BUILTIN, resolve
from report import Table, section, show, write_json
from torch import Tensor

from disaggd.gateway.tokenizer import read_tokenizer
from disaggd.model.batch import Batch
from disaggd.model.directory import ModelDirectory, open_directory
from disaggd.model.kv import allocate_kv
from disaggd.model.spec import Dtype, Weights
from disaggd.model.weights import load_weights
from disaggd.transfer.layout import kv_spec

WINDOW = 1024
"""Tokens that are scored at a time, each by those before it: as the model card's loss was measured."""

BLOCK_SIZE = 64
_EXACT = "float32"
_VARIANTS: dict[str, tuple[Dtype, Weights]] = {
    _EXACT: ("float32", "auto"),
    "float32, int8": ("float32", "int8"),
    "bfloat16": ("bfloat16", "auto"),
    "bfloat16, int8": ("bfloat16", "int8"),
}


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One row. Errors are of logits against float32's, as parts of the standard deviation of float32's."""

    model: str
    variant: str
    tokens: int
    nats_per_token: float | None
    """None where there is no text to know."""
    rms_error: float
    max_error: float
    same_top: float
    """The part of the positions whose likeliest token is float32's."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    machine: Machine
    load: Load
    results: list[Result]


class Scorer:
    """A model in one variant, and room for one window."""

    def __init__(self, directory: ModelDirectory, dtype: Dtype, weights: Weights) -> None:
        where = torch.device("cpu")
        self._transformer = load_weights(directory, directory.spec(dtype), where, weights=weights)
        self.kv = allocate_kv(kv_spec(self._transformer.spec, BLOCK_SIZE), WINDOW // BLOCK_SIZE, where)
        """Of the window, in order: block i has its tokens from i · BLOCK_SIZE on."""

    @torch.inference_mode()
    def logits(self, tokens: list[int], start: int = 0) -> Tensor:
        """Of tokens of one window, float32 [len(tokens), vocab_size]; those before the `start`-th were given before."""
        count = len(tokens)
        batch = Batch(
            tokens=torch.tensor(tokens),
            positions=torch.arange(start, start + count),
            slot_mapping=torch.arange(start, start + count),
            query_start=torch.tensor([0, count], dtype=torch.int32),
            context_lens=torch.tensor([start + count], dtype=torch.int32),
            block_tables=torch.arange(WINDOW // BLOCK_SIZE, dtype=torch.int32)[None],
            logit_rows=torch.arange(count),
        )
        return self._transformer.forward(batch, self.kv)


class Sums:
    """Of all windows, for one variant against what is exact. Logits are float32 [tokens, vocab_size]."""

    def __init__(self) -> None:
        self.nats = self.squares = self.variance = self.largest = 0.0
        self.same = self.tokens = 0

    def add(self, ours: Tensor, exact: Tensor, following: Tensor) -> None:
        error = ours - exact
        self.nats += F.cross_entropy(ours, following, reduction="sum").item()
        self.squares += error.square().mean().item() * len(ours)
        self.variance += exact.var().item() * len(ours)
        self.largest = max(self.largest, error.abs().max().item())
        self.same += int((ours.argmax(-1) == exact.argmax(-1)).sum())
        self.tokens += len(ours)

    def result(self, model: str, variant: str, *, is_text: bool) -> Result:
        deviation = math.sqrt(self.variance / self.tokens)
        return Result(
            model=model,
            variant=variant,
            tokens=self.tokens,
            nats_per_token=self.nats / self.tokens if is_text else None,
            rms_error=math.sqrt(self.squares / self.tokens) / deviation,
            max_error=self.largest / deviation,
            same_top=self.same / self.tokens,
        )


def held_out_windows(directory: ModelDirectory) -> list[list[int]]:
    """The files that the built-in model never saw, end to end, each followed by the separator: windows of WINDOW + 1 tokens."""
    tokenizer = read_tokenizer(directory.root, directory.spec().vocab_size)
    stream = [
        token for text in _held_out_files(directory.root / "FILES.txt") for token in (*tokenizer.encode(text, add_special_tokens=False), 0)
    ]
    return [stream[start : start + WINDOW + 1] for start in range(0, len(stream) - WINDOW, WINDOW)]


def _held_out_files(listed: Path) -> Iterator[str]:
    title, *lines = listed.read_text(encoding="utf-8").splitlines()
    for line in lines:
        sha256, use, path = line.split(maxsplit=2)
        if use != "held-out":
            continue
        file = Path(sysconfig.get_paths()["stdlib"]) / path
        if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
            raise click.ClickException(f"{file} is not the file that was held out; run this with the Python of: {title.lstrip('# ')}")
        yield file.read_text(encoding="utf-8")


def random_windows(directory: ModelDirectory, count: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(0)
    return torch.randint(1, directory.spec().vocab_size, (count, WINDOW + 1), generator=random).tolist()


def measure(name: str, directory: ModelDirectory, windows: list[list[int]], *, is_text: bool) -> list[Result]:
    exact = Scorer(directory, *_VARIANTS[_EXACT])
    return [_compare(name, variant, Scorer(directory, *kind), exact, windows, is_text=is_text) for variant, kind in _VARIANTS.items()]


def _compare(name: str, variant: str, scorer: Scorer, exact: Scorer, windows: list[list[int]], *, is_text: bool) -> Result:
    sums = Sums()
    for window in windows:
        sums.add(scorer.logits(window[:-1]), exact.logits(window[:-1]), torch.tensor(window[1:]))
    return sums.result(name, variant, is_text=is_text)


def table(results: list[Result], title: str = "Against float32") -> Table:
    rows = [
        (
            f"{one.model}, {one.variant}",
            "–" if one.nats_per_token is None else f"{one.nats_per_token:.4f}",
            "–" if one.nats_per_token is None else f"{math.exp(one.nats_per_token):.3f}",
            f"{one.rms_error:.2%}",
            f"{one.max_error:.1%}",
            f"{one.same_top:.2%}",
        )
        for one in results
    ]
    return Table(title, ("model", "nats/token", "perplexity", "rms error", "largest error", "same likeliest token"), tuple(rows))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--model", "models", multiple=True, help="Random weights to measure, too: S, P or M; may be given again.  [default: S]")
@click.option("--windows", type=click.IntRange(min=1), default=4, show_default=True, help=f"Of {WINDOW} random tokens, for those.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="OpenMP threads.")
@click.option("--quick", is_flag=True, help="Two windows of the built-in model alone.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Append the section to this file.")
def main(models: tuple[str, ...], windows: int, threads: int, quick: bool, json_path: Path | None, markdown: Path | None) -> None:
    """Measure what a model loses in bfloat16 and with int8 weights, on this CPU.

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
        f"{BUILTIN}: {results[0].tokens:,} tokens of held-out text; others: {windows * WINDOW:,} random tokens; windows of {WINDOW:,}",
        "errors of all logits, in standard deviations of float32's logits",
    ]
    show(section("Accuracy of bfloat16 and of int8 weights", report.machine, report.load, [table(results)], notes), markdown)
    write_json(json_path, report)


if __name__ == "__main__":
    main()
