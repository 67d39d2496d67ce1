# ruff: noqa: E402
"""A process with a small pool and a `TransferThread`, driven by a test over a pipe. Started by `conftest.py`.

argv: the pipe's file descriptor, first port, last port, layers, blocks, block bytes, and where the pool lies: `cpu`, `staged` (the host's
memory too, but NIXL is shown staging memory only, as on a GPU, and copies are late) or a CUDA device.
"""

import sys
import threading
import time
import zlib
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

DEVICE = sys.argv[-1]
if DEVICE in ("cpu", "staged"):  # NIXL would import all of torch, 1.3 s, just to ask which CUDA it was built for.
    sys.modules["torch"] = None  # type: ignore[assignment]
else:
    import torch

    from disaggd.engine.kv_staging import KVStaging
    from disaggd.engine.stream import DeviceStream

from disaggd.ids import BlockId
from disaggd.transfer.layout import KVSpec, PoolPlace
from disaggd.transfer.messages import IsReady, TransferCommand
from disaggd.transfer.thread import TransferThread
from tests.support.copies import LateCopies
from tests.support.endpoints import plain_kv

LATE = 3
"""So often a copy is asked about before it is made."""


class Staging(Protocol):
    """What `KVStaging` and `LateCopies` are."""

    place: PoolPlace

    def copy_out(self, sources: NDArray[np.int32], targets: NDArray[np.int32]) -> IsReady: ...
    def copy_in(self, landed: Sequence[BlockId], blocks: Sequence[BlockId]) -> IsReady: ...


class HostMemory:
    """As many blocks of staging memory as there are blocks, if there is any."""

    def __init__(self, layers: int, num_blocks: int, block_bytes: int, kv: KVSpec) -> None:
        self._array = np.zeros((layers * num_blocks, block_bytes), dtype=np.uint8)
        self.place = PoolPlace(self._array.ctypes.data, num_blocks)
        self._staged = np.zeros_like(self._array)
        self.staging: Staging | None = LateCopies(self._array, self._staged, kv, patience=LATE) if DEVICE == "staged" else None

    def enter(self) -> None:
        """Nothing is a thread's own here."""

    def read(self) -> NDArray[np.uint8]:
        return self._array

    def write(self, array: NDArray[np.uint8]) -> None:
        self._array[:], self._staged[:] = array, ~array


class GpuMemory:
    def __init__(self, layers: int, num_blocks: int, block_bytes: int, kv: KVSpec) -> None:
        stream = DeviceStream(torch.device(DEVICE))
        stream.enter()
        self.enter = stream.enter
        shape = (layers, num_blocks, block_bytes)
        self._tensor = torch.zeros(shape, dtype=torch.uint8, device=DEVICE)
        self.place = PoolPlace(self._tensor.data_ptr(), num_blocks)
        self._host = torch.zeros(shape, dtype=torch.uint8, pin_memory=True)
        self.staging: Staging | None = KVStaging(self._tensor, self._host, kv)

    def read(self) -> NDArray[np.uint8]:
        return self._tensor.flatten(0, 1).cpu().numpy()

    def write(self, array: NDArray[np.uint8]) -> None:
        noise = torch.from_numpy(array).view(self._tensor.shape)
        self._tensor.copy_(noise)
        self._host.copy_(~noise)
        torch.cuda.synchronize()


class KVNode:
    """Answers the test's calls, and sends it every event of the transfer thread."""

    def __init__(self, connection: Connection, ports: tuple[int, int], layers: int, num_blocks: int, block_bytes: int) -> None:
        self._connection = connection
        self._sending = threading.Lock()  # two threads write one connection: events and answers
        self._shape = (layers * num_blocks, block_bytes)
        kv = plain_kv(layers, block_bytes)
        memory = (HostMemory if DEVICE in ("cpu", "staged") else GpuMemory)(layers, num_blocks, block_bytes, kv)
        self._memory = memory
        self.thread = TransferThread(
            memory.place, layers * num_blocks * block_bytes, kv, self.send, ports, on_start=memory.enter, staging=memory.staging
        )

    def send(self, message: object) -> None:
        with self._sending:
            self._connection.send((time.monotonic(), message))

    def submit(self, *commands: TransferCommand) -> None:
        for command in commands:
            self.thread.submit(command)

    def fill(self, seed: int) -> None:
        """Noise, other in every block; other noise in the staging memory."""
        self._memory.write(np.random.default_rng(seed).integers(0, 256, self._shape, dtype=np.uint8))

    def bring_in(self, blocks: Sequence[BlockId]) -> None:
        """What has landed in these blocks is in the pool's of the same ids when this returns: a decode node's part."""
        if self._memory.staging is None:
            return
        is_copied = self._memory.staging.copy_in(blocks, blocks)
        while not is_copied():
            time.sleep(1e-4)

    def checksums(self) -> list[int]:
        """Of the pool, one per descriptor: layer by layer, block by block."""
        return [zlib.crc32(block) for block in self._memory.read()]

    def num_strange(self, *seeds: int) -> int:
        """Bytes of the pool that are in none of these fillings at their place."""
        fillings = [np.random.default_rng(seed).integers(0, 256, self._shape, dtype=np.uint8) for seed in seeds]
        return int(np.logical_and.reduce([self._memory.read() != filling for filling in fillings]).sum())

    def cpu_s(self) -> float:
        return time.process_time()

    def stats(self) -> object:
        return self.thread.stats()


def main() -> None:
    pipe, first, last, layers, num_blocks, block_bytes = map(int, sys.argv[1:-1])
    with Connection(pipe) as connection:
        node = KVNode(connection, (first, last), layers, num_blocks, block_bytes)
        node.thread.start()
        while call := connection.recv():
            name, arguments = call
            node.send(("answer", getattr(node, name)(*arguments)))
        node.thread.stop()
        node.send(("answer", None))


if __name__ == "__main__":
    main()
