"""`disaggd up` for the length of a measurement. Knows the command line and the config file, nothing behind them."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
from server_process import free_ports, serving

from disaggd.config import load_config


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
    with serving(command, f"{url}/ready", log) as pid:
        yield Running(url, pid, config.model.served_name)


def small_config(model: str = "builtin:tiny", *, prefill: bool = True) -> str:
    """A cluster of one router, one decode node and one prefill node or none, on free ports."""
    roles = ["router", "prefill", "decode"] if prefill else ["router", "decode"]
    nodes = [
        f'[[node]]\nname = "{role[0]}0"\nrole = "{role}"\nlisten = "127.0.0.1:{port}"'
        for role, port in zip(roles, free_ports(len(roles)), strict=True)
    ]
    return "\n".join([f'[model]\npath = "{model}"', *nodes]) + "\n"
