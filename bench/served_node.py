"""An engine node that notes when each turn of its compute thread ended. Started by `served.py`.

argv: the file for the notes, written when the node stops; then what `disaggd` takes. Times are of `time.perf_counter`, which
all processes of a host share.
"""

import sys
import time
from pathlib import Path
from typing import ClassVar

import msgspec

from disaggd import cli
from disaggd.roles import compute


class Turn(msgspec.Struct, frozen=True, array_like=True):
    ended_s: float
    running: int
    """Sequences that the next step computes."""


class NotingCompute(compute.Compute):
    """Between two ends lies all that a client waits for: the step, and whatever else kept the thread from the next."""

    turns: ClassVar[list[Turn]] = []

    def turn(self) -> None:
        super().turn()
        self.turns.append(Turn(time.perf_counter(), self._engine.gauges().running))


def read_turns(path: Path) -> list[Turn]:
    return msgspec.msgpack.decode(path.read_bytes(), type=list[Turn])


if __name__ == "__main__":
    notes = Path(sys.argv.pop(1))
    compute.Compute = NotingCompute  # type: ignore[misc]  # the thread takes it from there
    try:
        cli.main()
    finally:
        notes.write_bytes(msgspec.msgpack.encode(NotingCompute.turns))
