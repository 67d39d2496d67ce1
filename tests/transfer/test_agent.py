"""`AgentMaker`: the first agent must come, a later one may be late. Without NIXL."""

import pytest

from disaggd.errors import ResourceError
from disaggd.transfer import agent
from disaggd.transfer.agent import AgentMaker, NoAgent
from disaggd.transfer.pool import Region
from disaggd.transfer.ports import Port, PortRange, is_free

REGIONS = [Region(4096, 32)]


def test_only_after_the_first_agent_nixl_may_fail_for_a_while(port_range: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    ports = PortRange(*port_range)

    def fail(port: Port, regions: list[Region]) -> None:
        raise agent.nixlBackendError("NIXL_ERR_BACKEND")

    def stand_in(port: Port, regions: list[Region]) -> Port:
        return port

    make = AgentMaker(ports)
    monkeypatch.setattr(agent, "Agent", fail)
    with pytest.raises(ResourceError, match="NIXL_ERR_BACKEND"):
        make(REGIONS)
    monkeypatch.setattr(agent, "Agent", stand_in)
    make(REGIONS).release()  # type: ignore[attr-defined]
    monkeypatch.setattr(agent, "Agent", fail)
    with pytest.raises(NoAgent, match="NIXL_ERR_BACKEND"):
        make(REGIONS)
    assert all(is_free(port) for port in range(port_range[0], port_range[1] + 1)), "a port is still leased"


def test_the_first_agent_too_waits_for_a_device_that_is_down(port_range: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(port: Port, regions: list[Region]) -> None:
        raise agent.nixlBackendError("NIXL_ERR_BACKEND")

    monkeypatch.setattr(agent, "Agent", fail)
    with pytest.raises(NoAgent, match="NIXL_ERR_BACKEND"):
        AgentMaker(PortRange(*port_range), is_patient=lambda: True)(REGIONS)
