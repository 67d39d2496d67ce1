"""Numbers between host and device, in one copy each way that the host does not wait for. Runs on the compute thread.

On the CPU nothing is copied. On a GPU, copies go through pinned memory, which torch keeps for reuse and hands out again only once the copy
from it is done.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 16
"""Bytes at whose multiples each array begins: kernels are compiled for such addresses, and would be anew for others."""

Array = NDArray[np.generic]


class Layout:
    """Where arrays of given shapes and dtypes lie, one behind the other, in one stretch of bytes."""

    def __init__(self, like: Sequence[Array]) -> None:
        self._parts: list[tuple[int, Array]] = []
        self.num_bytes = 0
        for array in like:
            self._parts.append((self.num_bytes, array))
            self.num_bytes += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT

    def fill(self, stretch: Tensor, arrays: Sequence[Array]) -> None:
        """Copy the arrays into uint8 [num_bytes] of the host."""
        host = stretch.numpy()
        for (start, _), array in zip(self._parts, arrays, strict=True):
            host[start : start + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)

    def views(self, stretch: Tensor) -> list[Tensor]:
        """The arrays in uint8 [num_bytes] of any device, as tensors."""
        return [
            stretch[start : start + array.nbytes].view(torch.from_numpy(array[:0]).dtype).view(array.shape) for start, array in self._parts
        ]


def upload(arrays: Sequence[Array], where: torch.device) -> list[Tensor]:
    """The arrays as tensors on `where`."""
    if where.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    layout = Layout(arrays)
    return layout.views(on_host(layout, arrays, where).to(where, non_blocking=True))


def on_host(layout: Layout, arrays: Sequence[Array], where: torch.device) -> Tensor:
    """The arrays in memory of the host, laid out: uint8 [num_bytes]. Pinned, if it is a GPU that copies from there."""
    stretch = torch.empty(layout.num_bytes, dtype=torch.uint8, pin_memory=where.type == "cuda")
    layout.fill(stretch, arrays)
    return stretch


def download(tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Starts copying the tensors to the host; what it returns waits for the copies and gives them.

    The wait sleeps rather than spins: a step's tokens come 30 µs later for it, and the core is free for the other threads.
    """
    if not tensors[0].is_cuda:
        return lambda: list(tensors)
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True) for tensor in tensors]
    done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    done.record()

    def read() -> list[Tensor]:
        done.synchronize()
        return copies

    return read
