"""What a load client asks for: prompts, output lengths and arrival times, drawn or replayed. Pure but for reading traces.

Everything is drawn from one seed, so that two servers get the same requests.
"""

import csv
import datetime
import random
from collections.abc import Iterator
from itertools import accumulate, islice
from pathlib import Path

import msgspec

MOONCAKE_BLOCK = 512
"""Tokens that one of the trace's hash ids stands for."""


class Planned(msgspec.Struct, frozen=True):
    """One request to send."""

    arrival_s: float
    """After the run's begin; a closed loop does not look at it."""
    prompt: list[int]
    max_tokens: int


class Lengths(msgspec.Struct, frozen=True, kw_only=True):
    """One row of a trace, or of a made-up one."""

    arrival_s: float = 0.0
    num_input: int
    num_output: int
    blocks: tuple[int, ...] = ()
    """Equal leading ids are a shared prefix."""


class Scale(msgspec.Struct, frozen=True, kw_only=True):
    """How a trace is fitted to a smaller machine."""

    time: float = 1.0
    length: float = 1.0
    max_input: int | None = None
    max_output: int | None = None

    def of(self, row: Lengths) -> Lengths:
        num_input, num_output = max(1, round(row.num_input * self.length)), max(1, round(row.num_output * self.length))
        return Lengths(
            arrival_s=row.arrival_s * self.time,
            num_input=min(num_input, self.max_input or num_input),
            num_output=min(num_output, self.max_output or num_output),
            blocks=row.blocks,
        )


def fixed(num_requests: int, num_input: int, num_output: int) -> list[Lengths]:
    return [Lengths(num_input=num_input, num_output=num_output)] * num_requests


def read_trace(path: Path, num_requests: int | None, scale: Scale) -> list[Lengths]:
    """The first rows of an Azure LLM trace (.csv) or a Mooncake trace (.jsonl), from the first one's arrival on."""
    rows = list(islice(_azure(path) if path.suffix == ".csv" else _mooncake(path), num_requests))
    if not rows:
        raise ValueError(f"{path}: no rows")
    start_s = rows[0].arrival_s
    return [scale.of(msgspec.structs.replace(row, arrival_s=row.arrival_s - start_s)) for row in rows]


def poisson(rows: list[Lengths], rate: float, seed: int) -> list[Lengths]:
    """The same rows, arriving at random, `rate` a second."""
    draw = random.Random(seed)
    arrivals = accumulate(draw.expovariate(rate) for _ in rows)
    return [msgspec.structs.replace(row, arrival_s=at) for row, at in zip(rows, arrivals, strict=True)]


def plan(rows: list[Lengths], vocab_size: int, length_scale: float, seed: int) -> list[Planned]:
    """Prompts of random tokens; rows that share leading blocks share them."""
    draw = random.Random(seed)
    block_size = max(1, round(MOONCAKE_BLOCK * length_scale))

    def prompt(row: Lengths) -> list[int]:
        if not row.blocks:
            return _tokens(draw, row.num_input, vocab_size)
        shared = [token for block in row.blocks for token in _tokens(random.Random(f"{seed}-{block}"), block_size, vocab_size)]
        return (shared + _tokens(draw, max(0, row.num_input - len(shared)), vocab_size))[: row.num_input]

    return [Planned(row.arrival_s, prompt(row), row.num_output) for row in rows]


def _tokens(draw: random.Random, count: int, vocab_size: int) -> list[int]:
    """Never 0, which ends a text in many vocabularies."""
    return [draw.randrange(1, vocab_size) for _ in range(count)]


def _azure(path: Path) -> Iterator[Lengths]:
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            at = datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()  # seven decimals, Python reads six
            yield Lengths(arrival_s=at, num_input=int(row["ContextTokens"]), num_output=int(row["GeneratedTokens"]))


class _MooncakeRow(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def _mooncake(path: Path) -> Iterator[Lengths]:
    with path.open("rb") as file:
        for line in file:
            row = msgspec.json.decode(line, type=_MooncakeRow)
            yield Lengths(arrival_s=row.timestamp / 1e3, num_input=row.input_length, num_output=row.output_length, blocks=row.hash_ids)
