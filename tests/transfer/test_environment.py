"""The UCX environment, and what must not start."""

import pytest

from disaggd.errors import ConfigError
from disaggd.transfer.environment import pinned_devices, transfer_environment


def test_environment_pins_transport_and_devices() -> None:
    environment = transfer_environment("eth1", user_timeout_s=2.5)
    assert environment["UCX_TLS"] == "tcp"
    assert environment["UCX_NET_DEVICES"] == "eth1"
    assert environment["UCX_TCP_USER_TIMEOUT"] == "2500ms"


def test_gpu_memory_is_copied_to_and_from_tcp_and_reached_by_nobody_else() -> None:
    assert transfer_environment("lo", gpu=True)["UCX_TLS"] == "tcp,cuda_copy"
    with pytest.raises(ConfigError, match="cannot be fenced"):
        transfer_environment("lo", transports="tcp,cuda_ipc", gpu=True)


def test_environment_names_no_port_range() -> None:
    """UCX would take it in place of the one port that each agent is given."""
    assert "UCX_TCP_PORT_RANGE" not in transfer_environment("lo")


def test_transport_that_cannot_be_fenced_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"transports = 'all'.*valid: tcp"):
        transfer_environment("lo", transports="all")


def test_loopback_node_is_pinned_to_loopback() -> None:
    assert pinned_devices("", listen_is_loopback=True) == "lo"
    assert pinned_devices("eth1", listen_is_loopback=True) == "eth1"


@pytest.mark.parametrize(("devices", "listen_is_loopback"), [("", False), ("all", False), ("all", True)])
def test_unpinned_node_is_refused(devices: str, listen_is_loopback: bool) -> None:
    with pytest.raises(ConfigError, match="name the network devices"):
        pinned_devices(devices, listen_is_loopback=listen_is_loopback)
