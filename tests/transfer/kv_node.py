# ruff: noqa: E402
"""A process with a small pool and a `TransferThread`, driven by a test over a pipe. Started by `conftest.py`.

argv: the pipe's file descriptor, first port, last port, layers, blocks, block bytes.
"""

import sys
import threading
import time
import zlib
from multiprocessing.connection import Connection

import numpy as np

# NIXL would import all of torch, 1.3 s, just to ask which CUDA it was built for.
sys.modules["torch"] = None  # type: ignore[assignment]

from disaggd.transfer.layout import KVGroup, KVSpec, PoolPlace
from disaggd.transfer.messages import TransferCommand
from disaggd.transfer.thread import TransferThread


class KVNode:
    """Answers the test's calls, and sends it every event of the transfer thread."""

    def __init__(self, connection: Connection, ports: tuple[int, int], layers: int, num_blocks: int, block_bytes: int) -> None:
        self._connection = connection
        self._sending = threading.Lock()  # two threads write one connection: events and answers
        self._pool = np.zeros((layers * num_blocks, block_bytes), dtype=np.uint8)
        group = KVGroup(layers=layers, kv_heads=1, head_bytes=block_bytes)
        kv = KVSpec(dtype="float32", block_size=1, head_dim=1, groups=(group,))
        self.thread = TransferThread(PoolPlace(self._pool.ctypes.data, num_blocks), self._pool.nbytes, kv, self.send, ports)

    def send(self, message: object) -> None:
        with self._sending:
            self._connection.send((time.monotonic(), message))

    def submit(self, *commands: TransferCommand) -> None:
        for command in commands:
            self.thread.submit(command)

    def fill(self, seed: int) -> None:
        """Noise, other in every block."""
        self._pool[:] = np.random.default_rng(seed).integers(0, 256, self._pool.shape, dtype=np.uint8)

    def checksums(self) -> list[int]:
        """One per descriptor: layer by layer, block by block."""
        return [zlib.crc32(block) for block in self._pool]

    def cpu_s(self) -> float:
        return time.process_time()

    def stats(self) -> object:
        return self.thread.stats()


def main() -> None:
    pipe, first, last, layers, num_blocks, block_bytes = map(int, sys.argv[1:])
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
