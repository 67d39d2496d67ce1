"""Agents that are being connected on threads of their own: what is seen of those that hang."""

import threading
from typing import Any

from disaggd.ids import AgentId, NodeName
from disaggd.transfer.connecting import Connections
from disaggd.transfer.outlet import Outlet
from tests.support.scripted_agent import ScriptedAgent


class Peer(Outlet):
    """Is connected to when the test says so."""

    def __init__(self, name: str, agent: Any = None) -> None:
        scripted: Any = ScriptedAgent(AgentId(name))
        super().__init__(NodeName(name), AgentId(name), agent or scripted, ())
        self._answered = threading.Event()

    def connect(self) -> None:
        assert self._answered.wait(10)

    def answer(self, connections: Connections) -> None:
        self._answered.set()
        settle(self, connections)


def settle(peer: Peer, connections: Connections) -> None:
    (connecting,) = (each for each in connections._under_way if each.pair is peer)
    connecting.wait(10)
    assert connecting.is_over


def test_the_pulse_stands_still_while_the_oldest_connection_is_under_way_and_no_longer() -> None:
    connections = Connections()
    first, second = Peer("d0"), Peer("d1")
    connections.begin(first)
    assert connections.take() == []
    began = connections.pulse.count
    connections.begin(second)
    connections.abandon(NodeName("d0"))
    assert connections.take() == []
    connections.destroy_abandoned()
    assert (connections.pulse.count, connections.pulse.is_resting) == (began, False), "nobody wants it, yet it may hang"
    first.answer(connections)
    connections.destroy_abandoned()
    assert (connections.pulse.count, connections.pulse.is_resting) == (began + 1, False)
    second.answer(connections)
    assert [connecting.pair for connecting in connections.take()] == [second]
    assert connections.pulse.is_resting
