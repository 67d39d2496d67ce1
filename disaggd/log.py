"""Logs: one line per event, `[p0] 15:04:05 warning: text`, on stderr; level and time in colour on a terminal.

disaggd tells what it does; libraries are heard from warnings on (torch tells its caches' statistics at every exit).

Also the progress bars of a long start, on a terminal only.
"""

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

WARNING_STYLE = "33"
_LEVEL_STYLES = {"debug": "2", "warning": WARNING_STYLE, "error": "31", "critical": "1;31"}
_HEAD = re.compile(r"^(\d\d:\d\d:\d\d) ((debug|warning|error|critical):)?")

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))} | {0x0A: "\\n", 0x0D: "\\r", 0x09: "\\t"}
"""A terminal obeys these."""

NODE_STYLES = ("36", "35", "32", "34", "96", "95", "92", "94")
"""Terminal styles that tell nodes apart: cyan, magenta, green, blue and their bright kin."""


def configure_logging(node: str, stream: TextIO | None = None) -> None:
    """Sends events to `stream` (stderr), each line beginning with the node's name. Call once, at start."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Lines(node, coloured=stream.isatty()))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("disaggd").setLevel(logging.INFO)


def styled(text: str, style: str) -> str:
    return f"\x1b[{style}m{text}\x1b[0m"


def paint(line: str) -> str:
    """`line` as `_Lines` wrote it, without its `[node]`, with its time dimmed and its level coloured."""

    def painted(match: re.Match[str]) -> str:
        level = styled(match[2], _LEVEL_STYLES[match[3]]) if match[3] else ""
        return f"{styled(match[1], '2')} {level}"

    return _HEAD.sub(painted, line)


class StartProgress:
    """How far a node's start is: a bar per stage on a terminal, nothing elsewhere."""

    def __init__(self, bars: Progress | None, model: str) -> None:
        self._bars = bars
        self._model = model
        self._tasks: dict[str, TaskID] = {}

    def loading(self, done_bytes: int, total_bytes: int) -> None:
        """Of the weights, so many bytes are loaded."""
        self._show(f"loading {escape(self._model)}", done_bytes, total_bytes, f"{decimal(done_bytes)} of {decimal(total_bytes)}")

    def capturing(self, done: int, total: int) -> None:
        """Of the decode steps that become CUDA graphs, so many are captured."""
        self._show("capturing decode steps", done, total, f"{done} of {total}")

    def _show(self, stage: str, done: int, total: int, amount: str) -> None:
        if self._bars is None:
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, amount=amount)
        self._bars.update(self._tasks[stage], completed=done, total=total, amount=amount)


@contextmanager
def start_progress(model: str) -> Iterator[StartProgress]:
    """Yields what is told how far the start of a node that serves `model` has got; its bars go when the body ends."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield StartProgress(None, model)
        return
    columns = (TextColumn("[cyan]{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        yield StartProgress(bars, model)


class _Lines(logging.Formatter):
    """A message is one line, and moves no cursor, whatever a client put into it; only tracebacks take more."""

    def __init__(self, node: str, *, coloured: bool) -> None:
        super().__init__("%(asctime)s %(level)s%(message)s", datefmt="%H:%M:%S")
        self._node = node
        self._coloured = coloured

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        record.level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        record.message = record.message.translate(_CONTROLS)
        line = super().formatMessage(record)
        return f"[{self._node}] {paint(line) if self._coloured else line}"
