"""`disaggd up` for the length of a measurement. Knows the command line, the config file and what a router says of itself."""

import contextlib
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
from client import Outcome
from namespaces import DEVICE, End
from server_process import free_ports, get, serving

from disaggd.config import load_config
from disaggd.observe.receipts import Receipt
from disaggd.supervisor import ClusterView

Fields = Mapping[str, object]
"""A table of the config file."""

_WHOLE_S = 60.0


class Running(msgspec.Struct, frozen=True):
    """A cluster that answers."""

    url: str
    pids: tuple[int, ...]
    """Its processes; their descendants are not named."""
    model: str

    def receipt(self, request_id: str) -> Receipt:
        """What became of a request."""
        return msgspec.json.decode(get(f"{self.url}/v1/requests/{request_id}"), type=Receipt)

    def receipts(self, outcomes: Iterable[Outcome]) -> list[Receipt | None]:
        """Of each request; None for one that was refused, and has none."""
        return [None if one.request_id is None or one.error is not None else self.receipt(one.request_id) for one in outcomes]


@contextlib.contextmanager
def running(config_path: Path, log: Path) -> Iterator[Running]:
    """The cluster of a config file, whole: every node linked, every KV path ready. RuntimeError with the end of the log if it is not."""
    url = url_of(config_path)
    command = [sys.executable, "-m", "disaggd", "up", "--config", str(config_path)]
    with serving(command, f"{url}/ready", log) as pid:
        _wait_whole(url)
        yield Running(url, (pid,), load_config(config_path).model.served_name)


@contextlib.contextmanager
def apart(nodes: Sequence[Fields], tables: Mapping[str, Fields], ends: Mapping[str, End], directory: Path) -> Iterator[Running]:
    """A router here, and each other node in the namespace that `ends` has for its role; KV goes over the link between these."""
    listening = [{**node, "listen": f"{ends[str(node['role'])].control}:8101"} if node["role"] in ends else node for node in nodes]
    config_path = directory / "config.toml"
    kv_path: dict[str, Fields] = {"transfer": {"devices": DEVICE}, "cluster": {"secret": secrets.token_hex()}}
    whole = {name: {**tables.get(name, {}), **kv_path.get(name, {})} for name in {**tables, **kv_path}}
    config_path.write_text(config_text(listening, **whole))
    config, url = load_config(config_path), url_of(config_path)
    with contextlib.ExitStack() as stack:
        pids = []
        for node in (*config.nodes_of("prefill", "decode"), *config.nodes_of("router")):
            prefix = ends[node.role].namespace.prefix if node.role in ends else ()
            command = [*prefix, sys.executable, "-m", "disaggd", "--name", node.name, "--config", str(config_path)]
            ready = f"{url}/ready" if node.role == "router" else None
            pids.append(stack.enter_context(serving(command, ready, directory / f"{node.name}.log")))
        _wait_whole(url)
        yield Running(url, tuple(pids), config.model.served_name)


def _wait_whole(url: str) -> None:
    """A router is ready as soon as it can serve: co-located, until a prefill node's KV path is open."""
    deadline = time.monotonic() + _WHOLE_S
    while missing := msgspec.json.decode(get(f"{url}/v1/cluster"), type=ClusterView).missing:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the cluster still lacks {', '.join(missing)}")
        time.sleep(0.1)


def url_of(config_path: Path) -> str:
    """Where the cluster of this file answers."""
    return f"http://{load_config(config_path).nodes_of('router')[0].listen}"


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


def split(cpus: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """This machine's processors in two: all but the last, and the last; both have the one where there is no other."""
    return (tuple(cpus), tuple(cpus)) if len(cpus) == 1 else (tuple(cpus[:-1]), (cpus[-1],))


def one_each(cpus: Sequence[int], **engine: object) -> tuple[Fields, ...]:
    """A router, a prefill and a decode node, the last two apart.

    The router is with the prefill node, whose work can wait for a millisecond; clients should be there too.
    """
    prefill, decode = split(cpus)
    return (
        {"role": "router", "cpus": prefill},
        {"role": "prefill", "cpus": prefill, "threads": len(prefill), **engine},
        {"role": "decode", "cpus": decode, "threads": len(decode), **engine},
    )


def small_config(model: str = "builtin:tiny", *, prefill: bool = True) -> str:
    """A cluster of one router, one decode node and one prefill node or none."""
    roles = ["router", "prefill", "decode"] if prefill else ["router", "decode"]
    return config_text([{"role": role} for role in roles], model={"path": model})
