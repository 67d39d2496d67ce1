"""`LateCopies`: stands where `KVStaging` stands, over arrays, and copies late. Knows no torch."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from disaggd.ids import BlockId
from disaggd.transfer.layout import KVSpec, PoolPlace
from disaggd.transfer.messages import IsReady
from disaggd.transfer.pool import Indices, Pool

Rows = NDArray[np.generic]
"""[descriptors, …]"""


@dataclass
class _Copy:
    into: Rows
    targets: Indices
    rows: Rows
    sources: Indices
    num_asked: int = 0
    is_made: bool = False


class LateCopies:
    """Copies are made one after another, as on a stream: by `make`, or each when it has been asked about `patience` times."""

    def __init__(self, pool: Rows, staged: Rows, kv: KVSpec, patience: int | None = None) -> None:
        self._rows, self._staged = pool, staged
        self._pool, self._landing = (Pool(PoolPlace(rows.ctypes.data, len(rows) // kv.num_layers), kv) for rows in (pool, staged))
        self._patience = patience
        self._waiting: deque[_Copy] = deque()

    @property
    def place(self) -> PoolPlace:
        return self._landing.place

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def copy_out(self, sources: Indices, targets: Indices) -> IsReady:
        return self._late(_Copy(self._staged, targets, self._rows, sources))

    def copy_in(self, landed: Sequence[BlockId], blocks: Sequence[BlockId]) -> IsReady:
        layers = range(self._pool.kv.num_layers)
        return self._late(_Copy(self._rows, self._pool.indices(layers, blocks), self._staged, self._landing.indices(layers, landed)))

    def make(self, count: int = 1) -> None:
        """Make the next so many copies, or those that there are."""
        for _ in range(min(count, len(self._waiting))):
            copy = self._waiting.popleft()
            copy.into[copy.targets] = copy.rows[copy.sources]
            copy.is_made = True

    def _late(self, copy: _Copy) -> IsReady:
        self._waiting.append(copy)

        def is_ready() -> bool:
            copy.num_asked += 1
            while self._patience is not None and self._waiting and self._waiting[0].num_asked >= self._patience:
                self.make()
            return copy.is_made

        return is_ready
