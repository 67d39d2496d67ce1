"""Tables for people: on the terminal, and as a section of a file in `bench/results/`. Pure but for the two writers at the end."""

from collections.abc import Sequence
from pathlib import Path

import click
import msgspec
from machine import Load, Machine


class Table(msgspec.Struct, frozen=True):
    """The first column is text, the others are figures, rendered by the caller."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def render(table: Table) -> str:
    """A Markdown table whose columns line up, so that it reads as well on a terminal."""
    widths = [max(len(cell) for cell in column) for column in zip(table.header, *table.rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([line(table.header), f"|{rule}|", *map(line, table.rows)])


def section(title: str, machine: Machine, load: Load, tables: Sequence[Table], notes: Sequence[str] = ()) -> str:
    """What a file of results holds of one run."""
    where = f"{machine.processor}, {machine.cores} cores" + (f", {machine.accelerator}" if machine.accelerator else "")
    software = f"Python {machine.python}, " + (f"torch {machine.torch}, " if machine.torch else "") + f"Linux {machine.kernel}"
    facts = [f"{machine.date}, commit `{machine.commit}`", where, software, f"load: {load}", f"`{machine.command}`"]
    parts = [f"## {title}", "\n".join(f"- {fact}" for fact in (*facts, *notes))]
    parts += [f"### {table.title}\n\n{render(table)}" for table in tables]
    return "\n\n".join(parts) + "\n"


def show(text: str, markdown: Path | None) -> None:
    """Print a section, and append it to a file if one is named."""
    click.echo(text)
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        with markdown.open("a", encoding="utf-8") as file:
            file.write(("\n" if markdown.stat().st_size else "") + text)


def write_json(path: Path | None, found: object) -> None:
    """`found`: structs, numbers, lists and dicts."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
