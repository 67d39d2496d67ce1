"""The UCX environment of a process that moves KV, set by the launcher before the first NIXL agent is made.

Knows no NIXL. The port range is not here: each agent is told its one port when it is made (`ports.py`), and a
`UCX_TCP_PORT_RANGE` in the environment would override that.
"""

from pathlib import Path

from disaggd.errors import ConfigError

FENCEABLE_TRANSPORTS = frozenset({"tcp"})
"""Where destroying an agent was measured to stop the peer's writes (0 bytes after it). CMA went on writing: 128 MiB. CUDA IPC
is of its kind: the peer writes through a mapping of our memory, which outlives our agent."""

GPU_COPIES = "cuda_copy"
"""Copies within a process, to and from its own GPU memory. It reaches no other process, so it needs no fence; and KV does without it,
since NIXL is shown the host's memory only."""

PCI_DEVICES = Path("/sys/bus/pci/devices")
_NVIDIA = "0x10de"
_GPU_CLASSES = ("0x0300", "0x0302")

NET_DEVICES = Path("/sys/class/net")
_OFF = ("down", "lowerlayerdown", "notpresent", "dormant")
"""What the kernel calls an interface that carries nothing: switched off, or without a carrier."""

KEEPALIVE_IDLE_S = 3
KEEPALIVE_INTERVAL_S = 1


def pinned_devices(devices: str, *, listen_is_loopback: bool) -> str:
    """The devices that UCX may use: `devices`, or `lo` where none is named and the node listens on loopback only.

    Whoever reaches a UCX port can read and write the process's memory, and unpinned UCX listens on every interface.
    Raises `ConfigError` for a node that would.
    """
    if devices and devices != "all":
        return devices
    if listen_is_loopback and not devices:
        return "lo"
    raise ConfigError(
        f'[transfer] devices = {devices!r}: name the network devices that carry KV (for instance devices = "eth1"); '
        "anyone who reaches a device that NIXL listens on can read and write this process's memory"
    )


def has_device_down(devices: str, net: Path = NET_DEVICES) -> bool:
    """Whether one of `devices` is a network interface of this host that is down just now. UCX knows only those that are up."""
    return any(_first_line(net / device / "operstate") in _OFF for device in devices.split(",") if device)


def has_nvidia_gpu(pci: Path = PCI_DEVICES) -> bool:
    """Whether NIXL will find one: it looks here, whether or not CUDA can use it."""
    return any(
        _first_line(device / "vendor") == _NVIDIA and _first_line(device / "class").startswith(_GPU_CLASSES) for device in pci.glob("*")
    )


def _first_line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def transfer_environment(
    devices: str, *, transports: str = "tcp", user_timeout_s: float = 5.0, gpu: bool = False, pci: Path = PCI_DEVICES
) -> dict[str, str]:
    """The variables that must be set before the first agent is made. `gpu`: the node computes on one.

    `devices` are UCX device names (`lo`, `eth1`, `eth1,eth2`). A write to a peer whose kernel acknowledges nothing for
    `user_timeout_s` fails; one to a peer that is merely stopped does not (no setting makes it: measured for 120 s).
    Raises `ConfigError` for transports that cannot be fenced.
    """
    if transports not in FENCEABLE_TRANSPORTS:
        valid = ", ".join(sorted(FENCEABLE_TRANSPORTS))
        raise ConfigError(f"[transfer] transports = {transports!r}: a peer's late writes cannot be fenced there; valid: {valid}")
    return {
        # On a host with a GPU NIXL starts nobody without it, not even a node on the CPU.
        "UCX_TLS": f"{transports},{GPU_COPIES}" if gpu or has_nvidia_gpu(pci) else transports,
        "UCX_NET_DEVICES": devices,
        "UCX_TCP_USER_TIMEOUT": f"{round(user_timeout_s * 1000)}ms",
        "UCX_TCP_KEEPIDLE": f"{KEEPALIVE_IDLE_S}s",
        "UCX_TCP_KEEPINTVL": f"{KEEPALIVE_INTERVAL_S}s",
        # 2.96 GB/s with these against 1.7-2.1 without, 256 MiB over loopback.
        "UCX_TCP_RX_SEG_SIZE": "1m",
        "UCX_TCP_TX_SEG_SIZE": "256k",
        "NIXL_LOG_LEVEL": "WARN",
    }
