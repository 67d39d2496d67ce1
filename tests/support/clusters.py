"""A real cluster for process tests: every node a process of its own, KV over real NIXL on loopback.

Every wait has a deadline; `close` ends each child by its pid, and says which of them had to be killed.
"""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

START_S = 120.0
"""On a GPU, kernels are compiled and decode steps captured first."""
STOP_S = 15.0

Block = dict[str, object]


def wait_until(what: str, condition: Callable[[], bool], deadline_s: float, every_s: float = 0.02) -> None:
    """Poll `condition`; TimeoutError naming `what` when it does not hold within `deadline_s`."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {deadline_s} s: {what}")
        time.sleep(every_s)


def free_port(host: str = "127.0.0.1") -> int:
    """Below the ephemeral ports: a router that dials one of those, before its node listens, may get it for its own end."""
    ports = _of_this_worker(range(12_000, 18_000))
    while True:
        port = random.choice(ports)
        if can_listen(port, host):
            return port


def free_port_range(size: int = 100) -> str:
    """A range below the ephemeral ports and beyond those of `free_port`, all of it to be had now."""
    ports = _of_this_worker(range(18_000, 32_000))
    while True:
        first = random.choice(ports[:-size])
        if all(can_listen(port) for port in range(first, first + size)):
            return f"{first}-{first + size - 1}"


def _of_this_worker(ports: range) -> range:
    """Its share, where several processes of tests run at once: what one has chosen and not bound yet, another must not choose."""
    worker, count = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return ports[worker * len(ports) // count : (worker + 1) * len(ports) // count]


def can_listen(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a program that ends soon may have the port: nobody has it, and no connection of another's lingers there."""
    with contextlib.suppress(OSError), socket.socket() as probe:
        probe.bind((host, port))
        return True
    return False


@dataclass
class Node:
    """One process of the cluster; survives kills and restarts."""

    name: str
    role: str
    port: int
    host: str = "127.0.0.1"
    options: Block = field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    """A command to run it under, such as `ip netns exec NAME`."""
    process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid


class Cluster:
    """`prefill` + `decode` nodes and a router, from a TOML file in `directory`; logs lie beside it.

    `module` is what each of their processes runs.
    """

    def __init__(
        self,
        directory: Path,
        *,
        prefill: int = 1,
        decode: int = 1,
        nodes: Block | None = None,
        module: str = "disaggd",
        **sections: Block,
    ) -> None:
        self.directory = directory
        self.module = module
        self.sections = sections
        self.port_range = free_port_range()
        """Where KV travels, unless `sections` say otherwise."""
        self.nodes = {"router": Node("router", "router", free_port())}
        for role, count in (("prefill", prefill), ("decode", decode)):
            for i in range(count):
                name = f"{role[0]}{i}"
                self.nodes[name] = Node(name, role, free_port(), options=dict(nodes or {}))

    @property
    def config(self) -> Path:
        return self.directory / "config.toml"

    def config_of(self, name: str) -> Path:
        """The file that this node reads: one for all, unless a test has each see another part of the truth."""
        return self.config

    @property
    def url(self) -> str:
        router = self.nodes["router"]
        return f"http://{router.host}:{router.port}"

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Start every node and wait until the router is ready."""
        self.write_config()
        for name in self.nodes:
            self.start_node(name)
        self.wait_ready()

    def write_config(self) -> None:
        sections: dict[str, Block] = {
            "model": {"dtype": "float32"},
            "disaggregation": {"policy": "threshold", "max_local_prefill_tokens": 128, "self_measurement": False},
            "transfer": {"port_range": self.port_range},
        }
        for name, block in self.sections.items():
            sections.setdefault(name, {}).update(block)
        lines = [f"[{name}]\n" + _toml(block) for name, block in sections.items()]
        for node in self.nodes.values():
            lines.append("[[node]]\n" + _toml({"name": node.name, "role": node.role, "listen": f"{node.host}:{node.port}", **node.options}))
        self.config.write_text("\n".join(lines))

    def start_node(self, name: str) -> None:
        node = self.nodes[name]
        assert node.process is None or node.process.poll() is not None
        command = [*node.prefix, sys.executable, "-m", self.module, "--name", name, "--config", str(self.config_of(name))]
        with self.log(name).open("ab") as log:
            node.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

    def wait_ready(self) -> None:
        def ready() -> bool:
            for node in self.nodes.values():
                if node.process is not None and node.process.poll() is not None:
                    raise RuntimeError(f"{node.name} ended with {node.process.returncode}:\n{self.log(node.name).read_text()}")
            with contextlib.suppress(httpx.TransportError):
                return self.get("/ready").status_code == 200 and self.is_whole()
            return False

        wait_until("the cluster is ready", ready, START_S, every_s=0.1)

    def is_whole(self) -> bool:
        """Every node is linked and every pair may push; the router's own readiness gives up waiting for that."""
        shown = self.get("/v1/cluster").json()
        num_pairs = len(self.names("prefill")) * len(self.names("decode"))
        pairs = [pair["state"] for pair in shown["pairs"]]
        return (
            all(node["link"] == "up" for node in shown["nodes"])
            and pairs == ["ready"] * num_pairs
            and all(pair["state"] == "ready" for pair in shown["prefix_pairs"])
        )

    def names(self, role: str) -> list[str]:
        return [node.name for node in self.nodes.values() if node.role == role]

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal; after SIGKILL the process is reaped."""
        process = self.nodes[name].process
        assert process is not None
        process.send_signal(number)
        if number is signal.SIGKILL:
            process.wait(STOP_S)

    def is_running(self, name: str) -> bool:
        process = self.nodes[name].process
        return process is not None and process.poll() is None

    def close(self) -> None:
        """End every child; AssertionError naming those that SIGTERM alone did not end."""
        running = [node for node in self.nodes.values() if node.process is not None and node.process.poll() is None]
        for node in running:
            assert node.process is not None
            node.process.send_signal(signal.SIGCONT)
            node.process.terminate()
        stubborn = [node.name for node in running if not self._ended(node)]
        assert not stubborn, f"had to kill {stubborn}:\n" + "\n".join(self.tail(name) for name in stubborn)

    def _ended(self, node: Node) -> bool:
        assert node.process is not None
        try:
            node.process.wait(STOP_S)
            return True
        except subprocess.TimeoutExpired:
            node.process.kill()
            node.process.wait(STOP_S)
            return False

    def log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def tail(self, name: str, lines: int = 40) -> str:
        return "\n".join([f"── {name}", *self.log(name).read_text().splitlines()[-lines:]])

    # ── use ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=10)

    def complete(self, prompt: str | list[int], **options: Any) -> dict[str, Any]:
        """One whole completion; the reply's JSON. Fails the test on any other status than 200."""
        headers = options.pop("headers", {})
        body = {"model": "tiny", "prompt": prompt, "temperature": 0, **options}
        reply = httpx.post(self.url + "/v1/completions", json=body, headers=headers, timeout=120)
        assert reply.status_code == 200, reply.text
        return dict(reply.json())

    def receipt(self, request_id: str) -> dict[str, Any]:
        reply = self.get(f"/v1/requests/{request_id}")
        assert reply.status_code == 200, reply.text
        return dict(reply.json())

    def metric(self, name: str) -> dict[tuple[str, ...], float]:
        """Samples of one metric, by their label values in the order of label names."""
        families = text_string_to_metric_families(self.get("/metrics").text)
        return {
            tuple(sample.labels[label] for label in sorted(sample.labels)): sample.value
            for family in families
            for sample in family.samples
            if sample.name == name
        }

    def blocks(self, *states: str) -> float:
        """Blocks in any of `states`, over all nodes."""
        return sum(value for (_, state), value in self.metric("disaggd_kv_blocks").items() if state in states)

    def wait_idle(self, deadline_s: float = 5.0) -> None:
        """Until no block is used, granted, held or quarantined anywhere."""
        wait_until(
            "no block is used, granted, held or quarantined", lambda: self.blocks("used", "granted", "held", "quarantined") == 0, deadline_s
        )


def _toml(block: Block) -> str:
    return "".join(f"{key} = {_value(value)}\n" for key, value in block.items())


def _value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, int | float | list) else f'"{value}"'


@contextlib.contextmanager
def running(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, started; ended whatever happens. A failing test prints what the nodes said last."""
    try:
        cluster.start()
        yield cluster
    except BaseException:
        for name in cluster.nodes:
            if cluster.log(name).exists():
                print(cluster.tail(name))
        raise
    finally:
        cluster.close()


def is_root() -> bool:
    return os.geteuid() == 0
