"""`DeviceStream`: how far the device that computes has come; `SideStream`: what it copies meanwhile.

A GPU computes and copies on after the call that asked for it has returned. Who needs to know asks, and nobody waits: blocks that
a launched step still writes are the engine's until it has (`engine.py`).
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from disaggd.transfer.messages import IsReady, at_once
from disaggd.transfer.pool import Indices


class DeviceStream:
    """What the compute thread asks of one device, in order. On a CPU everything is done when the call returns."""

    def __init__(self, where: torch.device) -> None:
        self._where = where
        self._is_gpu = where.type == "cuda"

    def enter(self) -> None:
        """To be called on each thread that touches the device, first of all: which one is current is a thread's own affair."""
        if self._is_gpu:
            torch.cuda.set_device(self._where)
            # That alone leaves a thread without a context if the device is the one it begins with; this makes it current.
            torch.cuda.synchronize(self._where)

    def mark(self) -> IsReady:
        """Whether what has been asked of the device so far is done. Compute thread; about 2 µs."""
        if not self._is_gpu:
            return at_once
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._where))
        return event.query


class SideStream:
    """Copies between a device and its host's pinned memory, in order, beside what the device computes. Of one thread at a time.

    They wait for nothing that computes: to be asked for once what they read is computed (`DeviceStream.mark`), and when no launched
    step writes where they write. On a CPU they are made when the call returns.
    """

    def __init__(self, where: torch.device) -> None:
        self._stream = torch.cuda.Stream(where) if where.type == "cuda" else None  # type: ignore[no-untyped-call]

    def copy(self, into: Tensor, targets: Indices, rows: Tensor, sources: Indices) -> IsReady:
        """`into[targets[i]] = rows[sources[i]]`; both [rows, …], contiguous and alike but for the number of rows. Whether it is done.

        One copy for each run of neighbours on both sides: a GPU has engines for these, so no kernel takes its processors from a
        step. A call costs the host about 10 µs, and a row of 256 KiB takes that long on the bus.
        """
        return self.run(lambda: _copy_runs(into, targets, rows, sources))

    def run(self, work: Callable[[], None]) -> IsReady:
        """Ask for what `work` asks of the device, in its turn. Whether it is done."""
        if self._stream is None:
            work()
            return at_once
        with torch.cuda.stream(self._stream):
            work()
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return event.query


def _copy_runs(into: Tensor, targets: Indices, rows: Tensor, sources: Indices) -> None:
    for target, source, count in runs(targets, sources):
        into[target : target + count].copy_(rows[source : source + count], non_blocking=True)


def runs(targets: Indices, sources: Indices) -> Iterator[tuple[int, int, int]]:
    """The fewest (first target, first source, count) that stand for all pairs: within each, both sides count up by one."""
    if not len(targets):
        return
    breaks = np.flatnonzero((np.diff(targets) != 1) | (np.diff(sources) != 1)) + 1
    for first, last in pairwise((0, *breaks.tolist(), len(targets))):
        yield int(targets[first]), int(sources[first]), last - first
