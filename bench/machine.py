"""The machine a figure was measured on: what it is, who else was using it, and the environment that processes measure in.

Reads /proc and asks git and torch for their names; changes nothing.
"""

import datetime
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from disaggd.config import NodeConfig
from disaggd.ids import NodeName
from disaggd.launch import compute_environment, reexec_with
from disaggd.units import Address

QUIET_CORES = 0.12
"""Processor time of others, in cores, up to which a run counts as undisturbed."""

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_ROOT = Path(__file__).parents[1]


class Machine(msgspec.Struct, frozen=True):
    """Enough to read a table by, months later."""

    date: str
    commit: str
    """Ends in `+` where the working tree differs from it."""
    processor: str
    cores: int
    accelerator: str | None
    kernel: str
    python: str
    torch: str | None
    command: str


class Load(msgspec.Struct, frozen=True):
    """Who used the processors while something was measured; in cores."""

    seconds: float
    own_cores: float
    foreign_cores: float
    loadavg: float
    """Of the last minute, at the end."""

    @property
    def is_quiet(self) -> bool:
        return self.foreign_cores <= QUIET_CORES

    def __str__(self) -> str:
        verdict = "quiet" if self.is_quiet else "DISTURBED: repeat before quoting"
        return f"{self.own_cores:.2f} cores ours, {self.foreign_cores:.2f} others', load {self.loadavg:.2f} ({verdict})"


def together(loads: Sequence[Load]) -> Load:
    """Of all that was measured, not of what lay between."""
    seconds = sum(load.seconds for load in loads)
    own = sum(load.seconds * load.own_cores for load in loads) / seconds
    foreign = sum(load.seconds * load.foreign_cores for load in loads) / seconds
    return Load(seconds, own, foreign, loads[-1].loadavg)


class LoadMeter:
    """From `start` to `read`: this process, its descendants and `also` (with theirs) against the whole machine."""

    def __init__(self, also: Iterable[int] = ()) -> None:
        self._roots = (os.getpid(), *also)
        self.start()

    def start(self) -> None:
        self._began = time.monotonic()
        self._busy_s, self._own_s = _busy_s(), trees_cpu_s(self._roots)

    def read(self) -> Load:
        seconds = max(time.monotonic() - self._began, 1e-9)
        busy, own = (_busy_s() - self._busy_s) / seconds, (trees_cpu_s(self._roots) - self._own_s) / seconds
        return Load(seconds, own, max(0.0, busy - own), os.getloadavg()[0])


def trees_cpu_s(roots: Iterable[int]) -> float:
    """Processor seconds of these processes and their descendants, those that ended and were waited for included."""
    used, parents = _process_table()
    wanted = set(roots)
    return sum(cpu_s for pid, cpu_s in used.items() if _descends(pid, wanted, parents))


def process_cpu_s(pid: int) -> float:
    """Processor seconds of one process so far, without its children."""
    fields = _stat_fields(Path(f"/proc/{pid}/stat"))
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def describe_machine() -> Machine:
    torch = sys.modules.get("torch")
    has_cuda = torch is not None and torch.cuda.is_available()
    return Machine(
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        commit=_commit(),
        processor=_processor(),
        cores=os.cpu_count() or 1,
        accelerator=torch.cuda.get_device_name() if torch is not None and has_cuda else None,
        kernel=platform.release(),
        python=platform.python_version(),
        torch=str(torch.__version__) if torch is not None else None,
        command=shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
    )


def measure_as_nodes_do(threads: int) -> None:
    """Re-executes this process once with the malloc and OpenMP environment that `disaggd` gives its compute nodes.

    So all that is compared in the process has the same. To be called before torch's first import does any work.
    """
    node = NodeConfig(name=NodeName("bench"), role="decode", listen=Address("127.0.0.1:1"), threads=threads)
    reexec_with(compute_environment(node))


def _commit() -> str:
    try:
        name = _git("rev-parse", "--short=10", "HEAD")
        return name + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(("git", *arguments), cwd=_ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    widest = next((name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags), "")
    return f"{names[0] if names else platform.machine()} ({widest})" if widest else names[0] if names else platform.machine()


def _busy_s() -> float:
    """Of all processors since boot, waiting for disks and for the hypervisor left out."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + softirq) / _TICKS_PER_S


def _process_table() -> tuple[dict[int, float], dict[int, int]]:
    """Processor seconds, with those of its ended children, and parent of every process there is now."""
    used: dict[int, float] = {}
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = _stat_fields(entry / "stat")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended since
        used[int(entry.name)] = sum(map(int, fields[11:15])) / _TICKS_PER_S
        parents[int(entry.name)] = int(fields[1])
    return used, parents


def _stat_fields(path: Path) -> list[str]:
    """What follows the command's name, which may hold spaces: state, parent, …"""
    return path.read_text().rpartition(")")[2].split()


def _descends(pid: int, roots: set[int], parents: dict[int, int]) -> bool:
    while pid not in roots:
        if pid not in parents:
            return False
        pid = parents[pid]
    return True
