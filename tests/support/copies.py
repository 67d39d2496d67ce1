"""`LateCopies`: stands where `KVStaging` stands, over arrays, and copies late. Knows no torch."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from disaggd.ids import BlockId
from disaggd.transfer.layout import KVSpec, PoolPlace
from disaggd.transfer.messages import IsReady
from disaggd.transfer.pool import Indices, Pool

Rows = NDArray[np.generic]
"""[descriptors, …]"""


@dataclass
class _Deed:
    do: Callable[[], object]
    num_asked: int = 0
    is_done: bool = False


class Late:
    """Does things one after another, as a stream does: by `make`, or each when it has been asked about `patience` times."""

    def __init__(self, patience: int | None = None) -> None:
        self._patience = patience
        self._waiting: deque[_Deed] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, do: Callable[[], object]) -> IsReady:
        """Whether it is done."""
        deed = _Deed(do)
        self._waiting.append(deed)
        return partial(self._ask, deed)

    def make(self, count: int = 1) -> None:
        """Do the next so many, or those that there are."""
        for _ in range(min(count, len(self._waiting))):
            deed = self._waiting.popleft()
            deed.do()
            deed.is_done = True

    def _ask(self, deed: _Deed) -> bool:
        deed.num_asked += 1
        while self._patience is not None and self._waiting and self._waiting[0].num_asked >= self._patience:
            self.make()
        return deed.is_done


class LateCopies:
    """`patience` is for whoever asks; without it the test makes the copies."""

    def __init__(self, pool: Rows, staged: Rows, kv: KVSpec, patience: int | None = None) -> None:
        self._rows, self._staged = pool, staged
        self._pool, self._landing = (Pool(PoolPlace(rows.ctypes.data, len(rows) // kv.num_layers), kv) for rows in (pool, staged))
        self._late = Late(patience)

    @property
    def place(self) -> PoolPlace:
        return self._landing.place

    @property
    def num_waiting(self) -> int:
        return len(self._late)

    def make(self, count: int = 1) -> None:
        self._late.make(count)

    def copy_out(self, sources: Indices, targets: Indices) -> IsReady:
        return self._late.add(partial(_copy, self._staged, targets, self._rows, sources))

    def copy_in(self, landed: Sequence[BlockId], blocks: Sequence[BlockId]) -> IsReady:
        layers = range(self._pool.kv.num_layers)
        sources, targets = self._landing.indices(layers, landed), self._pool.indices(layers, blocks)
        return self._late.add(partial(_copy, self._rows, targets, self._staged, sources))


def _copy(into: Rows, targets: Indices, rows: Rows, sources: Indices) -> None:
    into[targets] = rows[sources]
