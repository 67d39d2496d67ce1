"""`PortRange`: the ports that this host's NIXL agents listen on, one per agent. Knows no NIXL.

NIXL gives no way to learn an agent's port, hangs without an exception when a range of several is exhausted, and raises
when a range of one is taken. So each agent is given a range of one, and `Port` is its lease: a socket bound to the same
port at an address that only we use. Two processes that race for a port meet there, in the kernel, and the loser goes on
to the next. A fenced agent's port is kept from everybody else by keeping the lease, without a gap.
"""

import errno
import random
import socket
from collections.abc import Iterator

from disaggd.errors import ResourceError

GUARD_ADDRESS = "127.88.88.88"
"""Any loopback address that nothing listens on: the agent itself binds its device's address, so the two never collide."""


class PortsUnusable(ResourceError):
    """Not that they are taken: this process may open no socket, or bind none to them."""


class Port:
    """A leased port; `release` gives it back."""

    def __init__(self, number: int, guard: socket.socket) -> None:
        self.number = number
        self._guard = guard

    def release(self) -> None:
        self._guard.close()


class PortRange:
    """Ports `first` to `last`, leased in turn so that a port just given back is the last to be used again."""

    def __init__(self, first: int, last: int) -> None:
        self._ports = range(first, last + 1)
        # Nodes of one host start at different places, so that they seldom race.
        self._next = random.randrange(len(self._ports))

    def leases(self) -> Iterator[Port]:
        """Each port of the range that is free now, leased to the taker; ends after one round. Raises PortsUnusable."""
        for _ in self._ports:
            number = self._ports[self._next]
            self._next = (self._next + 1) % len(self._ports)
            if port := _lease(number):
                yield port

    def exhausted(self) -> ResourceError:
        """What to raise when no lease of the range would do."""
        return ResourceError(
            f"no free port for NIXL in {self._ports[0]}-{self._ports[-1]}: widen [transfer] port_range to four times the "
            "agents of this host (each rank of a node has one per peer node), or end what else listens there"
        )


def is_free(number: int) -> bool:
    """Whether nothing on this host is bound to the port, connections that linger in the kernel included. Raises PortsUnusable."""
    probe = _bound("", number)
    if probe is None:
        return False
    probe.close()
    return True


def _lease(number: int) -> Port | None:
    if not is_free(number):
        return None
    guard = _bound(GUARD_ADDRESS, number)
    return Port(number, guard) if guard else None


def _bound(address: str, number: int) -> socket.socket | None:
    """A socket bound to that port, None if it is taken. Raises PortsUnusable."""
    try:
        bound = socket.socket()
    except OSError as error:
        raise PortsUnusable(f"no socket can be opened: {error.strerror}") from error
    try:
        bound.bind((address, number))
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            return None
        raise PortsUnusable(f"port {number} of [transfer] port_range cannot be bound: {error.strerror}") from error
    return bound
