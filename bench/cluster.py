"""`disaggd up` for the length of a measurement. Knows the command line and the config file, nothing behind them."""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
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
    url = url_of(config_path)
    command = [sys.executable, "-m", "disaggd", "up", "--config", str(config_path)]
    with serving(command, f"{url}/ready", log) as pid:
        yield Running(url, pid, load_config(config_path).model.served_name)


def url_of(config_path: Path) -> str:
    """Where the cluster of this file answers."""
    return f"http://{load_config(config_path).nodes_of('router')[0].listen}"


Fields = Mapping[str, object]


def config_text(nodes: Iterable[Fields], **tables: Fields) -> str:
    """The TOML of a cluster on this host. A node that has no name gets its role's initial and a number, and every node a free port."""
    nodes = list(nodes)
    counts: Counter[object] = Counter()
    parts = [_table(f"[{name}]", fields) for name, fields in tables.items()]
    for fields, port in zip(nodes, free_ports(len(nodes)), strict=True):
        role = fields["role"]
        name = "router" if role == "router" else f"{str(role)[0]}{counts[role]}"
        counts[role] += 1
        parts.append(_table("[[node]]", {"name": name, "listen": f"127.0.0.1:{port}", **fields}))
    return "\n".join(parts)


def _table(header: str, fields: Fields) -> str:
    """Numbers, strings, booleans and flat lists are written alike in JSON and in TOML."""
    return "\n".join([header, *(f"{key} = {msgspec.json.encode(value).decode()}" for key, value in fields.items())]) + "\n"


def small_config(model: str = "builtin:tiny", *, prefill: bool = True) -> str:
    """A cluster of one router, one decode node and one prefill node or none."""
    roles = ["router", "prefill", "decode"] if prefill else ["router", "decode"]
    return config_text([{"role": role} for role in roles], model={"path": model})
