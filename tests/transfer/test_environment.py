"""The UCX environment, and what must not start."""

from pathlib import Path

import pytest

from disaggd.errors import ConfigError
from disaggd.transfer.environment import has_device_down, has_nvidia_gpu, pinned_devices, transfer_environment


def make_device(pci: Path, name: str, vendor: str, kind: str) -> None:
    (pci / name).mkdir()
    (pci / name / "vendor").write_text(vendor + "\n")
    (pci / name / "class").write_text(kind + "\n")


def test_environment_pins_transport_and_devices(tmp_path: Path) -> None:
    environment = transfer_environment("eth1", user_timeout_s=2.5, pci=tmp_path)
    assert environment["UCX_TLS"] == "tcp"
    assert environment["UCX_NET_DEVICES"] == "eth1"
    assert environment["UCX_TCP_USER_TIMEOUT"] == "2500ms"


def test_node_on_a_gpu_has_what_nixl_insists_on_and_nothing_that_a_peer_reaches(tmp_path: Path) -> None:
    assert transfer_environment("lo", gpu=True, pci=tmp_path)["UCX_TLS"] == "tcp,cuda_copy"
    with pytest.raises(ConfigError, match="cannot be fenced"):
        transfer_environment("lo", transports="tcp,cuda_ipc", gpu=True)


def test_node_on_the_cpu_of_a_host_with_a_gpu_may_copy_too_or_nixl_would_not_start(tmp_path: Path) -> None:
    make_device(tmp_path, "0000:00:01.0", "0x10de", "0x020000")
    make_device(tmp_path, "0000:00:02.0", "0x1002", "0x030200")
    (tmp_path / "0000:00:03.0").mkdir()
    assert not has_nvidia_gpu(tmp_path), "a network card of theirs, a GPU of others, something unreadable"
    assert transfer_environment("lo", pci=tmp_path)["UCX_TLS"] == "tcp"
    make_device(tmp_path, "0000:00:04.0", "0x10de", "0x030200")
    assert transfer_environment("lo", pci=tmp_path)["UCX_TLS"] == "tcp,cuda_copy"
    assert not has_nvidia_gpu(tmp_path / "no PCI at all")


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


@pytest.mark.parametrize(
    ("states", "devices", "is_down"),
    [
        ({"eth0": "up"}, "eth0", False),
        ({"lo": "unknown"}, "lo", False),
        ({"eth0": "down"}, "eth0", True),
        ({"eth0": "lowerlayerdown"}, "eth0", True),
        ({"eth0": "up", "eth1": "down"}, "eth0,eth1", True),
        ({"eth0": "up"}, "eth1", False),
        ({"eth0": "up"}, "mlx5_0:1", False),
        ({}, "", False),
    ],
)
def test_a_device_that_is_there_and_down_is_told_from_one_that_is_not_there(
    tmp_path: Path, states: dict[str, str], devices: str, is_down: bool
) -> None:
    for name, text in states.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "operstate").write_text(text + "\n")
    assert has_device_down(devices, tmp_path) is is_down
