"""One end of a hand-off: a process with a pool and a `TransferThread`. Started by `handoff.py`, which calls its methods.

argv: the file descriptor of a pipe, and the device that holds the pool. The first message is a `Geometry`; then
`(method, arguments)`, each answered. Times are of CLOCK_MONOTONIC, which all processes of a host share, in every namespace.
"""

import queue
import socket
import sys
import time
from multiprocessing.connection import Connection
from typing import TypeVar

import msgspec
import numpy as np
from handoff_pool import Geometry, make_pool

from disaggd.ids import AgentId, BlockId, GrantToken, Incarnation, NodeName
from disaggd.transfer import messages as m
from disaggd.transfer.layout import whole_blocks
from disaggd.transfer.notification import FirstToken
from disaggd.transfer.thread import TransferThread

PEER = NodeName("peer")
INCARNATION = Incarnation("bench")
EVENT_TIMEOUT_S = 60.0
RAW_CHUNK_BYTES = 2**20
LEASE_S = 60.0
COPY_POLL_S = 50e-6

Event = TypeVar("Event", bound=m.TransferEvent)


class Pushed(msgspec.Struct, frozen=True):
    began_s: float
    computed_s: float
    """When the last layer was computed."""
    cpu_s: float
    """Of this process, the emulated compute included."""


class HandoffNode:
    """Either end; which methods are called makes it the sender or the receiver."""

    def __init__(self, geometry: Geometry, device: str) -> None:
        self._geometry = geometry
        self._pool = make_pool(geometry, device)
        self._events: queue.SimpleQueue[tuple[float, m.TransferEvent]] = queue.SimpleQueue()
        self._thread = TransferThread(
            self._pool.place,
            geometry.kv_bytes,
            geometry.kv,
            self._post,
            geometry.ports,
            on_start=self._pool.enter,
            staging=self._pool.staging,
        )
        self._thread.start()
        self._bytes = memoryview(np.ones(geometry.kv_bytes, dtype=np.uint8))
        """What the raw socket moves, in the host's memory wherever the pool is."""
        self._socket = socket.socket()
        self._cpu_s = time.process_time()

    def _post(self, event: m.TransferEvent) -> None:
        self._events.put((time.monotonic(), event))

    def _wait(self, kind: type[Event]) -> tuple[float, Event]:
        """The next event of that kind, those before it dropped. TimeoutError names it."""
        while True:
            try:
                at, event = self._events.get(timeout=EVENT_TIMEOUT_S)
            except queue.Empty:
                raise TimeoutError(f"no {kind.__name__} within {EVENT_TIMEOUT_S:.0f} s") from None
            if isinstance(event, kind):
                return at, event
            if isinstance(event, m.TransferFailed):
                raise event.error

    # ── the pair ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def open(self) -> m.PairOpened:
        self._thread.submit(m.OpenPair(PEER, INCARNATION, 1))
        return self._wait(m.PairOpened)[1]

    def connect(self, opened: m.PairOpened) -> None:
        self._thread.submit(m.ConnectPair(PEER, INCARNATION, opened.endpoints, self._geometry.kv))
        self._wait(m.PairConnected)

    def probed(self) -> None:
        self._wait(m.PairProbed)

    # ── NIXL ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def expect(self, token: bytes, agent_id: str, verify: bool) -> None:
        self._cpu_s = time.process_time()
        blocks = self._blocks if verify else ()
        self._thread.submit(m.Expect(GrantToken(token), PEER, AgentId(agent_id), self._geometry.num_blocks, verify=blocks))

    @property
    def _blocks(self) -> tuple[BlockId, ...]:
        return tuple(BlockId(block) for block in range(self._geometry.num_blocks))

    def landed(self) -> tuple[float, float]:
        """When the grant was whole and in the pool, and the processor seconds since `expect`."""
        at, event = self._wait(m.Landed)
        assert event.kv_bytes == self._geometry.kv_bytes
        is_there = self._pool.bring_in()
        if not is_there():
            while not is_there():
                time.sleep(COPY_POLL_S)
            at = time.monotonic()
        return at, time.process_time() - self._cpu_s

    def push(self, token: bytes, agent_id: str, layer_group: int, compute_s: float, busy: bool, verify: bool) -> Pushed:
        """Push the whole pool, each group of layers when it has been "computed"; returns when all of it is written."""
        grant, blocks = GrantToken(token), self._blocks
        self._pool.renew()
        cpu_s, began_s = time.process_time(), time.monotonic()
        self._thread.submit(m.BeginPush(grant, PEER, AgentId(agent_id), LEASE_S, verify))
        for first in range(0, self._geometry.layers, layer_group):
            layers = range(first, min(first + layer_group, self._geometry.layers))
            is_ready = self._pool.compute(layers, len(layers) * compute_s, busy)
            self._thread.submit(m.PushBlocks(grant, layers, whole_blocks(blocks, 1), blocks, is_ready))
        self._pool.wait()
        computed_s = time.monotonic()
        self._thread.submit(m.FinishPush(grant, FirstToken(1)))
        _, ended = self._wait(m.PushEnded)
        assert ended.clean and ended.finished, ended
        return Pushed(began_s, computed_s, time.process_time() - cpu_s)

    def digest(self) -> int:
        """Of the pool; the same at both ends when a push has landed."""
        return self._pool.digest()

    # ── what it is compared with ─────────────────────────────────────────────────────────────────────────────────────

    def raw_listen(self, host: str) -> int:
        self._listener = socket.create_server((host, 0))
        return int(self._listener.getsockname()[1])

    def raw_accept(self) -> None:
        self._socket, _ = self._listener.accept()

    def raw_connect(self, host: str, port: int) -> None:
        self._socket = socket.create_connection((host, port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def raw_send(self) -> float:
        """When it began; the pool's bytes in one call."""
        began_s = time.monotonic()
        self._socket.sendall(self._bytes)
        return began_s

    def raw_receive(self) -> float:
        """When the last byte was in the pool."""
        view, received = self._bytes, 0
        while received < len(view):
            num_bytes = self._socket.recv_into(view[received : received + RAW_CHUNK_BYTES])
            if not num_bytes:
                raise ConnectionError("the raw socket was closed")
            received += num_bytes
        return time.monotonic()

    def memcpy(self) -> float:
        """Seconds to copy the pool within its memory."""
        return self._pool.memcpy()

    def stop(self) -> None:
        self._thread.stop()


def main() -> None:
    with Connection(int(sys.argv[1])) as connection:
        node = HandoffNode(connection.recv(), sys.argv[2])
        connection.send(None)
        while call := connection.recv():
            name, arguments = call
            connection.send(getattr(node, name)(*arguments))
        node.stop()


if __name__ == "__main__":
    main()
