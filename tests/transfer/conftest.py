"""`start_node`: real processes with small pools and real NIXL on loopback, in the host's memory and, where there is one, a GPU's."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from disaggd.transfer.environment import transfer_environment
from disaggd.transfer.messages import TransferCommand, TransferEvent
from tests.support.clusters import can_listen
from tests.support.endpoints import plain_kv

DEADLINE_S = 20.0
ROOT = Path(__file__).parents[2]

Event = TypeVar("Event", bound=TransferEvent)


class Node:
    """The test's end of a `kv_node.py` process. Everything that waits has a deadline."""

    def __init__(self, ports: tuple[int, int], layers: int, num_blocks: int, block_bytes: int, device: str) -> None:
        wanted = transfer_environment("lo", user_timeout_s=3.0, gpu=device.startswith("cuda"))
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, **wanted, "PYTHONPATH": path}
        self._connection, theirs = Pipe()
        numbers = [theirs.fileno(), *ports, layers, num_blocks, block_bytes]
        command = [sys.executable, str(Path(__file__).with_name("kv_node.py")), *map(str, numbers), device]
        self.process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()
        self.layers, self.num_blocks, self.block_bytes = layers, num_blocks, block_bytes
        self.kv = plain_kv(layers, block_bytes)
        self.events: list[TransferEvent] = []
        """Events that no `expect` has taken yet, in their order."""

    def call(self, name: str, *arguments: object) -> Any:
        self.ask(name, *arguments)
        return self.answer(name)

    def ask(self, name: str, *arguments: object) -> None:
        """Also of a process that is stopped: it reads that when it goes on. To be followed by `answer`."""
        self._connection.send((name, arguments))

    def answer(self, name: str) -> Any:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            message = self._receive(deadline)
            if message is None:
                raise TimeoutError(f"no answer to {name}")
            if isinstance(message, tuple):
                return message[1]
            self.events.append(message)

    def submit(self, *commands: TransferCommand) -> None:
        self.call("submit", *commands)

    def expect(self, kind: type[Event], within_s: float = DEADLINE_S) -> Event:
        """The next event of that kind, taken out of `events`."""
        event = self.find(kind, within_s)
        assert event is not None, f"no {kind.__name__} within {within_s} s; there were {self.events}"
        return event

    def find(self, kind: type[Event], within_s: float) -> Event | None:
        """As `expect`, but None if none comes in time."""
        deadline = time.monotonic() + within_s
        while True:
            for event in self.events:
                if isinstance(event, kind):
                    self.events.remove(event)
                    return event
            message = self._receive(deadline)
            if message is None:
                return None
            self.events.append(message)

    def signal(self, number: signal.Signals) -> None:
        """After SIGSTOP, not one of its threads runs any more when this returns."""
        self.process.send_signal(number)
        if number == signal.SIGSTOP:
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)

    def stop(self) -> int:
        """End the thread and the process: the exit code."""
        self._connection.send(None)
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()
        self._connection.close()

    def _receive(self, deadline: float) -> Any:
        if not self._connection.poll(max(0.0, deadline - time.monotonic())):
            return None
        return self._connection.recv()[1]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def make_node(port_range: tuple[int, int]) -> Iterator[Callable[..., Node]]:
    """Start a process with its own pool: by default 4 layers of 16 blocks of 4 KiB, in the host's memory.

    Staging memory has as many blocks; a grant's blocks there and in the pool have the same ids in these tests.
    """
    nodes: list[Node] = []

    def start(
        *, layers: int = 4, num_blocks: int = 16, block_bytes: int = 4096, ports: tuple[int, int] = port_range, device: str = "cpu"
    ) -> Node:
        nodes.append(Node(ports, layers, num_blocks, block_bytes, device))
        return nodes[-1]

    yield start
    for node in nodes:
        node.close()


@pytest.fixture(params=["cpu", "staged", pytest.param("cuda:0", marks=needs_gpu)])
def start_node(make_node: Callable[..., Node], request: pytest.FixtureRequest) -> Callable[..., Node]:
    """`make_node` with pools in the memory that the test is run for; `staged` is the host's, handled as a GPU's."""
    return partial(make_node, device=request.param)


@pytest.fixture
def port_range() -> tuple[int, int]:
    """Sixteen ports below the kernel's ephemeral ones, none of which lingers from another test, as they do for a minute."""
    while True:
        first = random.randrange(20000, 31000, 16)
        if all(can_listen(port) for port in range(first, first + 16)):
            return first, first + 15
