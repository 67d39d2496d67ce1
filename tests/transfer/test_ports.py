"""Port leases: one holder each, never two, until released."""

import os
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from disaggd.errors import ResourceError
from disaggd.transfer import agent
from disaggd.transfer.agent import AgentMaker, NoAgent
from disaggd.transfer.ports import Port, PortRange, is_free

Lease = Callable[[PortRange], list[Port]]


@pytest.fixture
def lease_all() -> Iterator[Lease]:
    """Takes every lease that can be had, and gives them back after the test."""
    with ExitStack() as held:

        def lease(ports: PortRange) -> list[Port]:
            leased = list(ports.leases())
            for port in leased:
                held.callback(port.release)
            return leased

        yield lease


def test_each_port_is_leased_once_until_it_is_released(port_range: tuple[int, int], lease_all: Lease) -> None:
    held = lease_all(PortRange(*port_range))
    assert sorted(port.number for port in held) == list(range(port_range[0], port_range[1] + 1))
    another = PortRange(*port_range)
    assert lease_all(another) == []
    held[3].release()
    assert [port.number for port in lease_all(another)] == [held[3].number]


def test_port_that_somebody_else_listens_on_is_left_out(port_range: tuple[int, int], lease_all: Lease) -> None:
    first, last = port_range
    with socket.socket() as other:
        other.bind(("127.0.0.1", first + 1))
        other.listen()
        numbers = {port.number for port in lease_all(PortRange(first, last))}
    assert numbers == set(range(first, last + 1)) - {first + 1}


def test_leased_port_is_kept_from_others_but_open_to_its_agent(port_range: tuple[int, int], lease_all: Lease) -> None:
    port = lease_all(PortRange(*port_range))[0]
    assert not is_free(port.number)
    with socket.socket() as agent:
        agent.bind(("127.0.0.1", port.number))


def test_released_port_is_the_last_to_be_used_again(port_range: tuple[int, int]) -> None:
    ports = PortRange(*port_range)
    order = []
    for _ in range(16):
        port = next(ports.leases())
        order.append(port.number)
        port.release()
    assert sorted(order) == list(range(port_range[0], port_range[1] + 1))


def test_exhausted_range_names_the_setting() -> None:
    error = PortRange(18500, 18503).exhausted()
    assert isinstance(error, ResourceError)
    assert "18500-18503" in str(error) and "port_range" in str(error)


@contextmanager
def no_file_more() -> Iterator[None]:
    """This process may open none while the body runs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_files_to_open_no_agent_can_be_made_for_now(port_range: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that never made one is set up wrongly; any other goes on."""
    monkeypatch.setattr(agent, "Agent", lambda port, _: SimpleNamespace(port=port))
    make: Any = AgentMaker(PortRange(*port_range))
    with pytest.raises(ResourceError, match="no socket can be opened: Too many open files"), no_file_more():
        make([])
    make([]).port.release()
    with pytest.raises(NoAgent, match="no socket can be opened: Too many open files"), no_file_more():
        make([])
    make([]).port.release()
