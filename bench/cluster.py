"""`disaggd up` for the length of a measurement. Knows the command line and the config file, nothing behind them."""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec

from disaggd.config import load_config

_START_S = 120.0
_STOP_S = 20.0


class Running(msgspec.Struct, frozen=True):
    """A cluster that answers."""

    url: str
    pid: int
    """Of `disaggd up`, whose children the nodes are."""
    model: str


@contextlib.contextmanager
def running(config_path: Path, log: Path) -> Iterator[Running]:
    """The cluster of a config file, ready; ended afterwards. RuntimeError with the end of the log if it does not start."""
    config = load_config(config_path)
    url = f"http://{config.nodes_of('router')[0].listen}"
    command = [sys.executable, "-m", "disaggd", "up", "--config", str(config_path)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        _wait_ready(url, process, log)
        yield Running(url, process.pid, config.model.served_name)
    finally:
        _end(process)


def small_config(model: str = "builtin:tiny", *, prefill: bool = True) -> str:
    """A cluster of one router, one decode node and one prefill node or none, on free ports."""
    roles = ["router", "prefill", "decode"] if prefill else ["router", "decode"]
    nodes = [
        f'[[node]]\nname = "{role[0]}0"\nrole = "{role}"\nlisten = "127.0.0.1:{port}"'
        for role, port in zip(roles, free_ports(len(roles)), strict=True)
    ]
    return "\n".join([f'[model]\npath = "{model}"', *nodes]) + "\n"


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def answers(url: str) -> bool:
    """Whether a GET of `url` is a 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:  # urllib's own errors are among them
        return False


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while not answers(f"{url}/ready"):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the cluster did not start:\n{log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
