"""Where the cluster under test lives: prefill and decode nodes in two network namespaces, joined by a wire of ours to harm.

The router and its clients stay where we are. Nobody but a node's own host reaches its loopback, so what connects to a node enters
its namespace first: a socket belongs to where it was made, whoever uses it. Wants root, ip and tc.
"""

import asyncio
import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from bench.namespaces import DEVICE, Namespace, limit, linked
from tests.support.clusters import is_root
from tests.support.proxy import Connect

FAST, SLOW = "10gbit", "20mbit"
_NOBODY = "02:00:00:00:00:01"

Result = TypeVar("Result")


def has_namespaces() -> bool:
    return is_root() and shutil.which("ip") is not None and shutil.which("tc") is not None


class Wire:
    """The link that KV takes."""

    device = DEVICE

    def __init__(self, prefill: Namespace, decode: Namespace) -> None:
        self.prefill, self.decode = prefill, decode

    def slow(self) -> None:
        limit((self.prefill, self.decode), SLOW)

    def down(self) -> None:
        """As if it were pulled out: both ends know at once."""
        _sh(*self.prefill.prefix, "ip", "link", "set", DEVICE, "down")

    def silent(self) -> None:
        """What is sent reaches nobody, and nobody is told: each end believes that the other has a card which it does not have."""
        for here, there in ((self.prefill, self.decode), (self.decode, self.prefill)):
            _sh(*here.prefix, "ip", "neigh", "replace", there.address, "lladdr", _NOBODY, "dev", DEVICE, "nud", "permanent")

    def mend(self) -> None:
        """From whatever state."""
        _sh(*self.prefill.prefix, "ip", "link", "set", DEVICE, "up")
        for end in (self.prefill, self.decode):
            _sh(*end.prefix, "ip", "neigh", "flush", "dev", DEVICE, "nud", "permanent")
        limit((self.prefill, self.decode), FAST)


@contextlib.contextmanager
def wired() -> Iterator[Wire]:
    """The two namespaces; gone again afterwards."""
    with linked(FAST) as (prefill, decode):
        yield Wire(prefill, decode)


def connector(port: int, space: Namespace | None) -> Connect:
    """Connects to 127.0.0.1:`port` of `space`; None is where we are."""
    reach = partial(socket.create_connection, ("127.0.0.1", port), 5)

    async def connect() -> socket.socket:
        made = await (asyncio.to_thread(reach) if space is None else asyncio.to_thread(_in_space, space, reach))
        made.setblocking(False)
        return made

    return connect


def _in_space(space: Namespace, make: Callable[[], Result]) -> Result:
    """What `make` returns, called on a thread that has entered `space`: the thread ends with it, so nobody else gets lost there."""
    results: list[Result] = []
    errors: list[OSError] = []

    def run() -> None:
        try:
            _enter(space)
            results.append(make())
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _enter(space: Namespace) -> None:
    descriptor = os.open(f"/run/netns/{space.name}", os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, 0) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot enter {space.name}: {os.strerror(number)}")
    finally:
        os.close(descriptor)


def _sh(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
