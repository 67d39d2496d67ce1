"""The pool of one end of a hand-off, and the computing that fills it: in the host's memory, or in a GPU's, with staging memory then.

Every push carries other bytes than the last: its sender changes each layer when it has been "computed", so that what
leaves too early arrives wrong, and `digest` tells.
"""

import sys
import time
import zlib
from collections.abc import Callable
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from disaggd.ids import BlockId
from disaggd.transfer.layout import KVGroup, KVSpec, PoolPlace
from disaggd.transfer.messages import IsReady, at_once
from disaggd.transfer.source import Staging

if "cuda" in sys.argv:
    import torch

    from disaggd.engine.kv_staging import KVStaging
    from disaggd.engine.stream import DeviceStream
else:  # NIXL would import all of torch, 1.3 s, just to ask which CUDA it was built for.
    sys.modules["torch"] = None  # type: ignore[assignment]


class Geometry(msgspec.Struct, frozen=True, kw_only=True):
    """The pool of one end."""

    layers: int
    num_blocks: int
    block_bytes: int
    """Of one layer."""
    ports: tuple[int, int]

    @property
    def layer_bytes(self) -> int:
        """Of all blocks."""
        return self.num_blocks * self.block_bytes

    @property
    def kv_bytes(self) -> int:
        return self.layers * self.layer_bytes

    @property
    def kv(self) -> KVSpec:
        group = KVGroup(layers=self.layers, kv_heads=1, head_bytes=self.block_bytes)
        return KVSpec(dtype="bfloat16", block_size=1, head_dim=1, groups=(group,))


class Pool(Protocol):
    place: PoolPlace
    enter: Callable[[], None]
    """For the transfer thread to begin with."""

    @property
    def staging(self) -> Staging | None:
        """Where peers write, with as many blocks, and what is pushed is copied to. None: the pool itself."""

    def bring_in(self) -> IsReady:
        """All blocks have landed: begin to copy them into the pool."""

    def renew(self) -> None:
        """Before a push: whatever `compute` does not change, changed."""

    def compute(self, layers: range, seconds: float, busy: bool) -> IsReady:
        """Begin to "compute" these layers, `seconds` long in all."""

    def wait(self) -> None:
        """Until all that was begun is computed."""

    def digest(self) -> int:
        """Of every byte, and of where it is."""

    def memcpy(self) -> float:
        """Seconds to copy the pool within its memory."""


def noise(geometry: Geometry) -> NDArray[np.int64]:
    """[layers · num_blocks, block_bytes / 8], other in every block."""
    shape = (geometry.layers * geometry.num_blocks, geometry.block_bytes // 8)
    block = np.random.default_rng(0).integers(-(2**62), 2**62, shape[1])
    return block + np.arange(shape[0])[:, None]


class HostPool:
    """In this process's memory; the layers change before the push, since changing them would take the time of a push."""

    def __init__(self, geometry: Geometry) -> None:
        self._words = noise(geometry)
        self._scratch = np.empty(0, dtype=np.int64)
        self._matrix = np.ones((192, 192), dtype=np.float32)  # a product takes about 0.2 ms, and lets go of the GIL
        self.place = PoolPlace(self._words.ctypes.data, geometry.num_blocks)
        self.enter: Callable[[], None] = lambda: None
        self.staging: Staging | None = None

    def bring_in(self) -> IsReady:
        """They are there."""
        return at_once

    def renew(self) -> None:
        self._words += 1

    def compute(self, layers: range, seconds: float, busy: bool) -> IsReady:
        """Matrix products for that long, or (`busy` false, another core's work) nothing."""
        until = time.monotonic() + seconds
        while busy and time.monotonic() < until:
            np.dot(self._matrix, self._matrix)
        time.sleep(max(0.0, until - time.monotonic()))
        return at_once

    def wait(self) -> None:
        """Nothing is behind."""

    def digest(self) -> int:
        return zlib.crc32(self._words.sum(axis=1).tobytes())

    def memcpy(self) -> float:
        if not self._scratch.size:
            self._scratch = np.zeros_like(self._words)
        began = time.perf_counter()
        np.copyto(self._scratch, self._words)
        return time.perf_counter() - began


class GpuPool:
    """In the memory of the first GPU; computing is a kernel that spins, then one that changes the layers."""

    _CALIBRATION_CYCLES = 10**8

    def __init__(self, geometry: Geometry) -> None:
        where = torch.device("cuda", 0)
        self._stream = DeviceStream(where)
        self._stream.enter()
        shape = (geometry.layers, geometry.num_blocks, geometry.block_bytes // 8)
        self._words = torch.from_numpy(noise(geometry)).view(shape).to(where)
        self._scratch = torch.empty_like(self._words)
        self._blocks = [BlockId(block) for block in range(geometry.num_blocks)]
        self._cycles_per_s = self._calibrate()
        self.place = PoolPlace(self._words.data_ptr(), geometry.num_blocks)
        self.enter = self._stream.enter
        self.staging = KVStaging(self._words, torch.zeros(shape, dtype=torch.int64, pin_memory=True), geometry.kv)

    def bring_in(self) -> IsReady:
        return self.staging.copy_in(self._blocks, self._blocks)

    def renew(self) -> None:
        """`compute` changes every layer."""

    def compute(self, layers: range, seconds: float, busy: bool) -> IsReady:
        """Returns at once: the push must wait by itself. `busy` or not, the host is free."""
        if seconds:
            torch.cuda._sleep(round(seconds * self._cycles_per_s))
        self._words[layers.start : layers.stop] += 1
        return self._stream.mark()

    def wait(self) -> None:
        torch.cuda.synchronize()

    def digest(self) -> int:
        """Summed on the GPU: what its kernels see there."""
        return zlib.crc32(self._words.sum(dim=2).cpu().numpy().tobytes())

    def memcpy(self) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        self._scratch.copy_(self._words)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    def _calibrate(self) -> float:
        """Cycles that `_sleep` spins in a second; the second time, when the clock is up."""
        for _ in range(2):
            began = time.perf_counter()
            torch.cuda._sleep(self._CALIBRATION_CYCLES)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - began
        return self._CALIBRATION_CYCLES / seconds


def make_pool(geometry: Geometry, device: str) -> Pool:
    return HostPool(geometry) if device == "cpu" else GpuPool(geometry)
