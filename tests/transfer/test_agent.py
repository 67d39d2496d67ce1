"""`AgentMaker`: the first agent must come, a later one may be late. Without NIXL."""

import pytest

from disaggd.errors import ResourceError
from disaggd.transfer import agent
from disaggd.transfer.agent import AgentMaker, NoAgent
from disaggd.transfer.layout import KVGroup, KVSpec, PoolPlace
from disaggd.transfer.pool import Pool
from disaggd.transfer.ports import Port, PortRange, is_free

POOL = Pool(PoolPlace(4096, 4), KVSpec(dtype="float32", block_size=1, head_dim=1, groups=(KVGroup(layers=1, kv_heads=1, head_bytes=8),)))


def test_only_after_the_first_agent_nixl_may_fail_for_a_while(port_range: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    ports = PortRange(*port_range)

    def fail(port: Port, pool: Pool) -> None:
        raise agent.nixlBackendError("NIXL_ERR_BACKEND")

    def stand_in(port: Port, pool: Pool) -> Port:
        return port

    make = AgentMaker(ports, POOL)
    monkeypatch.setattr(agent, "Agent", fail)
    with pytest.raises(ResourceError, match="NIXL_ERR_BACKEND"):
        make()
    monkeypatch.setattr(agent, "Agent", stand_in)
    make().release()  # type: ignore[attr-defined]
    monkeypatch.setattr(agent, "Agent", fail)
    with pytest.raises(NoAgent, match="NIXL_ERR_BACKEND"):
        make()
    assert all(is_free(port) for port in range(port_range[0], port_range[1] + 1)), "a port is still leased"


def test_the_first_agent_too_waits_for_a_device_that_is_down(port_range: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(port: Port, pool: Pool) -> None:
        raise agent.nixlBackendError("NIXL_ERR_BACKEND")

    monkeypatch.setattr(agent, "Agent", fail)
    with pytest.raises(NoAgent, match="NIXL_ERR_BACKEND"):
        AgentMaker(PortRange(*port_range), POOL, is_patient=lambda: True)()
