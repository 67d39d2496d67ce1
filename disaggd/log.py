"""Logs: one line per event, `[p0] 15:04:05 warning: text`, on stderr; level and time in colour on a terminal.

disaggd tells what it does; libraries are heard from warnings on (torch tells its caches' statistics at every exit).

Also the progress bar of a long load, on a terminal only.
"""

import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

WARNING_STYLE = "33"
_LEVEL_STYLES = {"debug": "2", "warning": WARNING_STYLE, "error": "31", "critical": "1;31"}
_HEAD = re.compile(r"^(\d\d:\d\d:\d\d) ((debug|warning|error|critical):)?")

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


@contextmanager
def loading_progress(model: str) -> Iterator[Callable[[int, int], None]]:
    """Yields `progress(done_bytes, total_bytes)`, which moves a bar while the body loads `model`; without a terminal it does nothing."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total: None
        return
    columns = (TextColumn("[cyan]{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task(f"loading {escape(model)}", total=None, visible=False)  # shown once there is something to show
        yield lambda done, total: bars.update(bar, completed=done, total=total, visible=True)


class _Lines(logging.Formatter):
    """A message is one line whatever a client put into it; only tracebacks take more."""

    def __init__(self, node: str, *, coloured: bool) -> None:
        super().__init__("%(asctime)s %(level)s%(message)s", datefmt="%H:%M:%S")
        self._node = node
        self._coloured = coloured

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        record.level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        record.message = record.message.replace("\r", "\\r").replace("\n", "\\n")
        line = super().formatMessage(record)
        return f"[{self._node}] {paint(line) if self._coloured else line}"
