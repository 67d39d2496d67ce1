"""Agents that are being connected on threads of their own: what they leave behind, and what is seen of those that hang."""

import threading
import weakref
from typing import Any

import pytest

from disaggd.ids import AgentId, NodeName
from disaggd.transfer.connecting import Connections
from disaggd.transfer.outlet import Outlet
from tests.support.scripted_agent import ScriptedAgent


class Nixl:
    def add_remote_agent(self) -> None:
        raise RuntimeError("nobody has seen this yet")


class HeldAgent(ScriptedAgent):
    """Can be destroyed, as a real one, only when nothing holds on to NIXL's."""

    def __init__(self) -> None:
        super().__init__(AgentId("near"))
        self.nixl = Nixl()

    def destroy(self) -> None:
        super().destroy()
        gone = weakref.ref(self.nixl)
        del self.nixl
        assert gone() is None, "still referenced"


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


class FailingPeer(Peer):
    def connect(self) -> None:
        agent: Any = self.agent
        agent.nixl.add_remote_agent()


class FailingTwicePeer(FailingPeer):
    """What it came of holds on to the agent, too."""

    def connect(self) -> None:
        try:
            super().connect()
        except RuntimeError as error:
            raise RuntimeError("and that is new") from error


def settle(peer: Peer, connections: Connections) -> None:
    (connecting,) = (each for each in connections._under_way if each.pair is peer)
    connecting.wait(10)
    assert connecting.is_over


@pytest.mark.parametrize("failing", [FailingPeer, FailingTwicePeer])
def test_what_a_connection_has_failed_of_is_raised_and_holds_on_to_no_agent(
    caplog: pytest.LogCaptureFixture, failing: type[FailingPeer]
) -> None:
    agent, connections = HeldAgent(), Connections()
    peer = failing("d0", agent)
    connections.begin(peer)
    settle(peer, connections)
    (taken,) = connections.take()
    with pytest.raises(RuntimeError):
        taken.why_not()
    taken.destroy()
    assert agent.is_destroyed and not len(connections)
    assert "connecting to d0 has failed" in caplog.text and "nobody has seen this yet" in caplog.text


def test_so_is_what_an_abandoned_one_has_failed_of_once_its_agent_is_destroyed() -> None:
    agent, connections = HeldAgent(), Connections()
    peer = FailingPeer("d0", agent)
    connections.begin(peer)
    connections.abandon(NodeName("d0"))
    settle(peer, connections)
    assert connections.take() == []
    with pytest.raises(RuntimeError):
        connections.destroy_abandoned()
    assert agent.is_destroyed and agent.port.is_released and not len(connections)


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
