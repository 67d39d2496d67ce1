"""Fixtures for every test. No test sleeps, and none reaches beyond loopback."""

import os
import socket
from collections.abc import Callable

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on a busy host more threads only wait for each other

settings.register_profile("disaggd", deadline=None, derandomize=True)
settings.load_profile("disaggd")


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Draws ports of 127.0.0.1 that nobody listens on; no port twice in one test."""
    drawn: set[int] = set()

    def draw() -> int:
        while True:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = int(probe.getsockname()[1])
            if port not in drawn:
                drawn.add(port)
                return port

    return draw
