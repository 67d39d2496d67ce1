"""What a node's process needs before its first import: malloc, OpenMP and UCX read their environment once, at load.

Runs on the main thread before anything else; re-executes the process once when the environment differs, so systemd,
`disaggd up` and a shell all get the same. Knows no torch and no NIXL.
"""

import os
import signal
import sys
from collections.abc import Callable, Mapping

from disaggd.config import Config, NodeConfig
from disaggd.errors import ResourceError
from disaggd.transfer.environment import pinned_devices, transfer_environment

# Large tensors come from a heap that is not given back after each step: without this, glibc maps and unmaps them anew.
# Measured on one thread of matmuls of 512 tokens: page faults 1,012,000 → 60,000, processor time 6.0 → 4.5 s.
# And in huge pages, where the kernel gives them to those who ask: a weight is read once a step, and a TLB miss every 4 KiB shows. 113 M
# parameters on two threads: one sequence 5.2-6.3 → 4.6 ms, eight 9.2-10.3 → 8.4.
_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}

# Between two kernels a thread looks for work some 20 µs before it sleeps: to wake it a hundred times a step costs more than the step of a
# small model. 113 M parameters on two threads: one sequence 8.5 → 6.8 ms, eight 12.3 → 10.4; looking ten times as long gains no more.
_OPENMP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}

# The ranks of a node are on one host, and what they say is nobody else's: NCCL, which knows no authentication, would listen on the first
# network interface that it finds. A lost rank is the node's to notice and to name: torch would end the process by a signal, without a word;
# one that was stopped for minutes, too, in which its watchdog did nothing. Nor does anybody read what torch records of each call.
NCCL = {
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_FR_BUFFER_SIZE": "0",
}

_STRAY = ("UCX_TCP_PORT_RANGE",)
"""Would override the port that each NIXL agent is given."""

Execve = Callable[[str, list[str], dict[str, str]], object]


def compute_environment(node: NodeConfig) -> dict[str, str]:
    """What a process that computes needs."""
    nccl = NCCL if node.is_gpu and node.tp > 1 else {}
    return {**_MALLOC, **_OPENMP, "OMP_NUM_THREADS": str(node.threads), **nccl}


def node_environment(config: Config, node: NodeConfig) -> dict[str, str]:
    """What `node`'s process needs: nothing for a router, which neither computes nor moves KV. Raises ConfigError."""
    if node.role == "router":
        return {}
    transfer = config.transfer
    devices = pinned_devices(transfer.devices, listen_is_loopback=node.listen.is_loopback)
    return compute_environment(node) | transfer_environment(
        devices, transports=transfer.transports, user_timeout_s=transfer.user_timeout_s, gpu=node.is_gpu
    )


def reexec_with(wanted: Mapping[str, str], environ: Mapping[str, str] = os.environ, execve: Execve = os.execve) -> None:
    """Returns if the process has the `wanted` environment; otherwise replaces it by itself, with that environment.

    It then finds what it wants, so there is no second time.
    """
    if not wanted or (wanted.items() <= dict(environ).items() and not any(name in environ for name in _STRAY)):
        return
    kept = {name: value for name, value in environ.items() if name not in _STRAY}
    sys.stdout.flush()
    sys.stderr.flush()
    execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**kept, **wanted})


def interrupts_raise() -> None:
    """From here on Ctrl-C is KeyboardInterrupt again: the imports, which can pass none on, are done (see `__main__`)."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pin(node: NodeConfig) -> None:
    """Keeps this process, and the threads it will start, on `node.cpus`. Raises ResourceError if the host lacks them."""
    if node.cpus is None:
        return
    try:
        os.sched_setaffinity(0, node.cpus)
    except OSError as error:
        usable = sorted(os.sched_getaffinity(0))
        raise ResourceError(f"node {node.name!r}: cannot run on cpus {list(node.cpus)}; this process may use {usable}") from error
