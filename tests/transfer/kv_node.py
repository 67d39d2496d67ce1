# ruff: noqa: E402
"""A process with a small pool and a `TransferThread`, driven by a test over a pipe. Started by `conftest.py`.

argv: the pipe's file descriptor, first port, last port, layers, blocks, block bytes, and the device that holds the pool.
"""

import sys
import threading
import time
import zlib
from multiprocessing.connection import Connection

import msgspec
import numpy as np
from numpy.typing import NDArray

DEVICE = sys.argv[-1]
if DEVICE == "cpu":  # NIXL would import all of torch, 1.3 s, just to ask which CUDA it was built for.
    sys.modules["torch"] = None  # type: ignore[assignment]
else:
    import torch

    from disaggd.engine.stream import DeviceStream

from disaggd.transfer.layout import KVGroup, KVSpec, PoolPlace
from disaggd.transfer.messages import TransferCommand
from disaggd.transfer.thread import TransferThread


class HostMemory:
    def __init__(self, shape: tuple[int, int]) -> None:
        self._array = np.zeros(shape, dtype=np.uint8)
        self.place = PoolPlace(self._array.ctypes.data, 0)

    def enter(self) -> None:
        """Nothing is a thread's own here."""

    def read(self) -> NDArray[np.uint8]:
        return self._array

    def write(self, array: NDArray[np.uint8]) -> None:
        self._array[:] = array


class GpuMemory:
    def __init__(self, shape: tuple[int, int]) -> None:
        stream = DeviceStream(torch.device(DEVICE))
        stream.enter()
        self.enter = stream.enter
        self._tensor = torch.zeros(shape, dtype=torch.uint8, device=DEVICE)
        self.place = PoolPlace(self._tensor.data_ptr(), 0, self._tensor.device.index)

    def read(self) -> NDArray[np.uint8]:
        return self._tensor.cpu().numpy()

    def write(self, array: NDArray[np.uint8]) -> None:
        self._tensor.copy_(torch.from_numpy(array))
        torch.cuda.synchronize()


class KVNode:
    """Answers the test's calls, and sends it every event of the transfer thread."""

    def __init__(self, connection: Connection, ports: tuple[int, int], layers: int, num_blocks: int, block_bytes: int) -> None:
        self._connection = connection
        self._sending = threading.Lock()  # two threads write one connection: events and answers
        self._shape = (layers * num_blocks, block_bytes)
        self._memory = HostMemory(self._shape) if DEVICE == "cpu" else GpuMemory(self._shape)
        place = msgspec.structs.replace(self._memory.place, num_blocks=num_blocks)
        group = KVGroup(layers=layers, kv_heads=1, head_bytes=block_bytes)
        kv = KVSpec(dtype="float32", block_size=1, head_dim=1, groups=(group,))
        self.thread = TransferThread(place, layers * num_blocks * block_bytes, kv, self.send, ports, on_start=self._memory.enter)

    def send(self, message: object) -> None:
        with self._sending:
            self._connection.send((time.monotonic(), message))

    def submit(self, *commands: TransferCommand) -> None:
        for command in commands:
            self.thread.submit(command)

    def fill(self, seed: int) -> None:
        """Noise, other in every block."""
        self._memory.write(np.random.default_rng(seed).integers(0, 256, self._shape, dtype=np.uint8))

    def checksums(self) -> list[int]:
        """One per descriptor: layer by layer, block by block."""
        return [zlib.crc32(block) for block in self._memory.read()]

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
