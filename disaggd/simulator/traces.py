"""Request traces: when requests came, and how long they were. Reads two public formats, and fits them to a machine.

| format | columns | what else |
| --- | --- | --- |
| Azure LLM inference, `.csv` | `TIMESTAMP`, `ContextTokens`, `GeneratedTokens` | every prompt is its own |
| Mooncake, `.jsonl` | `timestamp` (ms), `input_length`, `output_length`, `hash_ids` | equal leading ids are a shared prefix |
"""

import csv
import datetime
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import msgspec

from disaggd.errors import ConfigError

MOONCAKE_BLOCK = 512
"""Tokens that one of the trace's hash ids stands for."""


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

    @property
    def block(self) -> int:
        """Tokens that one id of `Lengths.blocks` stands for."""
        return max(1, round(MOONCAKE_BLOCK * self.length))

    def of(self, row: Lengths) -> Lengths:
        num_input, num_output = max(1, round(row.num_input * self.length)), max(1, round(row.num_output * self.length))
        return Lengths(
            arrival_s=row.arrival_s * self.time,
            num_input=min(num_input, self.max_input or num_input),
            num_output=min(num_output, self.max_output or num_output),
            blocks=row.blocks,
        )


def read_trace(path: Path, num_requests: int | None, scale: Scale) -> list[Lengths]:
    """The first rows of the trace, from the first one's arrival on. Raises ConfigError naming the line that is none."""
    readers = {".csv": _azure, ".jsonl": _mooncake}
    if path.suffix not in readers:
        raise ConfigError(f"{path}: not a trace: expected an Azure trace (.csv) or a Mooncake trace (.jsonl)")
    try:
        rows = list(islice(readers[path.suffix](path), num_requests))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not rows:
        raise ConfigError(f"{path}: no rows")
    rows.sort(key=_arrival_s)
    start_s = rows[0].arrival_s
    return [scale.of(msgspec.structs.replace(row, arrival_s=row.arrival_s - start_s)) for row in rows]


def distinct_tokens(rows: Iterable[Lengths], block: int) -> int:
    """Prompt tokens of all rows, those that several have in common counted once: the working set. `block`: tokens of a prefix id."""
    shared: dict[int, int] = {}
    own = 0
    for row in rows:
        for index, name in enumerate(row.blocks):
            shared[name] = max(shared.get(name, 0), min(block, row.num_input - index * block))
        own += max(0, row.num_input - len(row.blocks) * block)
    return own + sum(max(0, count) for count in shared.values())


def _arrival_s(row: Lengths) -> float:
    return row.arrival_s


def _azure(path: Path) -> Iterator[Lengths]:
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                at = datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()  # seven decimals, Python reads six
                lengths = Lengths(arrival_s=at, num_input=int(row["ContextTokens"]), num_output=int(row["GeneratedTokens"]))
            except KeyError as error:
                raise ConfigError(f"{path}: no column {error}: expected TIMESTAMP, ContextTokens, GeneratedTokens") from error
            except (TypeError, ValueError) as error:
                raise ConfigError(f"{path}, line {number}: {error}") from error
            yield _checked(lengths, path, number)


class _MooncakeRow(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def _mooncake(path: Path) -> Iterator[Lengths]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = msgspec.json.decode(line, type=_MooncakeRow)
            except msgspec.DecodeError as error:
                raise ConfigError(f"{path}, line {number}: {error}") from error
            lengths = Lengths(arrival_s=row.timestamp / 1e3, num_input=row.input_length, num_output=row.output_length, blocks=row.hash_ids)
            yield _checked(lengths, path, number)


def _checked(row: Lengths, path: Path, number: int) -> Lengths:
    if row.num_input < 1 or row.num_output < 0:
        raise ConfigError(f"{path}, line {number}: {row.num_input} prompt and {row.num_output} output tokens cannot be")
    return row
