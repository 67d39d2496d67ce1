"""`disaggd up`: every node of the file that lives on this host, as child processes under one terminal.

Runs on one asyncio thread. A child that ends before the routers are ready, or then before it has ever listened, ends everything; any
other death is told and the node restarted. Production uses systemd for this. Knows nothing of what the nodes do.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import site
import socket
import ssl
import sys
import time
from asyncio.subprocess import PIPE, STDOUT, Process
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, TextIO

import msgspec

import disaggd
from disaggd.config import Config, NodeConfig, Role
from disaggd.errors import EXIT_INTERRUPTED, ConfigError, ResourceError
from disaggd.ids import NodeName
from disaggd.log import NODE_STYLES, WARNING_STYLE, paint, styled
from disaggd.tls import blind_context
from disaggd.units import Address

STOP_GRACE_S = 10.0
"""Between SIGTERM and SIGKILL, beside the time that nodes may take to drain."""
LAST_GRACE_S = 2.0
"""The same after a second signal: routers need a second (LAST_WORDS_S) to tell every client that its stream ends."""
MAX_RESTARTS = 5
RESTART_WINDOW_S = 60.0
RESTART_PAUSE_S = 0.5
ANSWER_TIMEOUT_S = 2.0
"""For what a router of ours is asked."""
LAST_LINES_TIMEOUT_S = 1.0
"""For what a child wrote last; a grandchild may hold the pipe open for ever."""
READY_POLL_S = 0.1
LOADING_PATIENCE_S = 120.0
"""For nodes that still load when the routers are ready, which wait for none of them longer than STARTING_S."""
LINKING_PATIENCE_S = 5.0
"""For routers' links to nodes that have loaded, and for the ways of KV between these."""

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def local_nodes(nodes: Iterable[NodeConfig]) -> tuple[NodeConfig, ...]:
    """Those whose `listen` address is this host's. Raises ConfigError if there are none."""
    local = tuple(node for node in nodes if is_local(node))
    if not local:
        raise ConfigError("no node of the file listens on an address of this host")
    return local


def is_local(node: NodeConfig) -> bool:
    """Whether this host has the address that `node` listens on."""
    return _can_bind(node.listen.host, 0)


def check_ports(nodes: Iterable[NodeConfig]) -> None:
    """Raises ResourceError for a node whose port is taken: another cluster's router would answer for ours."""
    for node in nodes:
        if not _can_bind(node.listen.host, node.listen.port):
            raise ResourceError(f"node {node.name!r}: {node.listen} is in use by another process")


def _can_bind(host: str, port: int) -> bool:
    """Whether nobody listens there. Whoever is about to is not kept from it, where both set SO_REUSEADDR as servers do."""
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                return True
    return False


class LinkedNode(msgspec.Struct, frozen=True):
    """An engine node, as a router's `GET /v1/cluster` shows it."""

    name: str
    role: Role
    listen: str
    link: Literal["up", "down", "loading"]
    """`loading` is what `up` itself knows of its children."""


class LinkedPair(msgspec.Struct, frozen=True):
    """A prefill node's KV path to a decode node."""

    prefill: str
    decode: str
    state: str


class ClusterView(msgspec.Struct, frozen=True):
    """What one router has of the cluster."""

    nodes: tuple[LinkedNode, ...] = ()
    pairs: tuple[LinkedPair, ...] = ()

    @property
    def missing(self) -> list[str]:
        """What the file names and the router does not have, each with the reason."""
        why = {"down": "no link to {}", "loading": "still loading"}
        nodes = [f"{node.name} ({why[node.link].format(node.listen)})" for node in self.nodes if node.link != "up"]
        return nodes + [f"{pair.prefill} → {pair.decode} (KV path {pair.state})" for pair in self.pairs if pair.state != "ready"]

    def with_loading(self, loading: set[NodeName]) -> "ClusterView":
        """With those that still load shown as such."""
        nodes = tuple(
            msgspec.structs.replace(node, link="loading") if node.link == "down" and node.name in loading else node for node in self.nodes
        )
        return msgspec.structs.replace(self, nodes=nodes)

    def is_settled(self, ours: set[NodeName]) -> bool:
        """Whether nothing is about to come up: the links of `ours`, and the ways of KV."""
        is_linked = not any(node.link == "down" and node.name in ours for node in self.nodes)
        return is_linked and not any(pair.state in ("opening", "probing", "checking") for pair in self.pairs)

    def count(self, role: Role) -> str:
        """`2 decode`, or `1 of 2 decode`."""
        links = [node.link for node in self.nodes if node.role == role]
        up = links.count("up")
        return f"{up} {role}" if up == len(links) else f"{up} of {len(links)} {role}"


OnReady = Callable[[NodeConfig, ClusterView | None], None]
"""Called for each router of this host, once all of them are ready; None: it shows the cluster to nobody without a key."""


class Supervisor:
    """The children, from the first start to the last exit."""

    def __init__(
        self,
        nodes: tuple[NodeConfig, ...],
        command: Callable[[NodeConfig], list[str]],
        on_ready: OnReady,
        *,
        tls: bool = False,
        has_keys: bool = False,
        out: TextIO | None = None,
        grace_s: float = STOP_GRACE_S,
        last_grace_s: float = LAST_GRACE_S,
        restart_pause_s: float = RESTART_PAUSE_S,
    ) -> None:
        self._nodes = nodes
        self._command = command
        self._on_ready = on_ready
        self._tls = blind_context() if tls else None
        """Routers serve HTTPS."""
        self._has_keys = has_keys
        """Routers show the cluster to nobody without an API key, and we have none."""
        self._out = out or sys.stderr
        self._grace_s = grace_s
        self._last_grace_s = last_grace_s
        self._restart_pause_s = restart_pause_s
        self._children: dict[NodeName, Process] = {}
        self._styles = {node.name: NODE_STYLES[index % len(NODE_STYLES)] for index, node in enumerate(nodes)}
        self._stop = asyncio.Event()
        self._interrupts = 0
        self._ending: list[NodeConfig] = []
        """Those that were told to end."""
        self._exit_code = 0
        self._started: set[NodeName] = set()
        """Those that are restarted when they die: none before the routers are ready, then those that have listened, at last all."""

    async def run(self) -> int:
        """Starts the nodes, keeps them, and ends them all on SIGINT or SIGTERM: once they are drained; at once on a second signal,
        with a last word to clients; without on a third.

        Returns the exit code.
        """
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._interrupt, EXIT_INTERRUPTED)
        loop.add_signal_handler(signal.SIGTERM, self._interrupt, 0)
        async with asyncio.TaskGroup() as tasks:
            for node in self._nodes:
                tasks.create_task(self._keep(node))
            announcement = tasks.create_task(self._announce())
            await self._stop.wait()
            announcement.cancel()
            await self._end_children()
        return self._exit_code

    def _interrupt(self, exit_code: int) -> None:
        self._interrupts += 1
        self._end(exit_code)
        if self._interrupts == 2:
            self._signal(self._ending, signal.SIGTERM)  # their second: it ends them at once
            asyncio.get_running_loop().call_later(self._last_grace_s, self._signal, self._nodes, signal.SIGKILL)
        elif self._interrupts > 2:
            self._signal(self._nodes, signal.SIGKILL)

    def _end(self, exit_code: int) -> None:
        """The first reason to end is the one that counts."""
        if not self._stop.is_set():
            self._exit_code = exit_code
            self._stop.set()

    # ── one child ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _keep(self, node: NodeConfig) -> None:
        """Runs `node`, again and again, until everything ends."""
        deaths: deque[float] = deque(maxlen=MAX_RESTARTS)
        while not self._stop.is_set():
            code = await self._run_once(node)
            if self._stop.is_set():
                return
            if node.name not in self._started:
                self._say(node, f"error: could not start ({_ending(code)}); ending the other nodes")
                self._end(_exit_code(code))
                return
            now = time.monotonic()
            if len(deaths) == MAX_RESTARTS and now - deaths[0] < RESTART_WINDOW_S:
                self._say(node, f"error: died again ({_ending(code)}), {MAX_RESTARTS + 1} times in a minute; ending the other nodes")
                self._end(_exit_code(code))
                return
            deaths.append(now)
            self._say(node, f"{f'error: died ({_ending(code)})' if code else 'ended in good order'}; restarting it")
            await self._stops_within(self._restart_pause_s)

    async def _run_once(self, node: NodeConfig) -> int:
        parent = os.getpid()
        child = await asyncio.create_subprocess_exec(
            *self._command(node),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=PIPE,
            stderr=STDOUT,
            env=_child_environment(),
            start_new_session=True,
            preexec_fn=lambda: _die_with(parent),
        )
        self._children[node.name] = child
        if self._stop.is_set():
            child.kill()  # `_end_children` may have passed already
        assert child.stdout is not None
        relay = asyncio.create_task(self._relay(node, child.stdout))
        code = await child.wait()
        await asyncio.wait({relay}, timeout=LAST_LINES_TIMEOUT_S)
        relay.cancel()
        return code

    async def _relay(self, node: NodeConfig, output: asyncio.StreamReader) -> None:
        rest = b""
        while chunk := await output.read(2**16):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._write(node, line.decode(errors="replace"))
        if rest:
            self._write(node, rest.decode(errors="replace"))

    # ── all children ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _announce(self) -> None:
        routers = [node for node in self._nodes if node.role == "router"]
        for router in routers:
            while await _get(router.listen, "/ready", self._tls) is None:
                if await self._stops_within(READY_POLL_S):
                    return
        self._started.update(router.name for router in routers)
        loading = await self._still_loading() if routers else set()
        self._started.update(node.name for node in self._nodes)
        for router in routers:
            view = None if self._has_keys else await self._settled_view(router, loading)
            if not self._stop.is_set():
                self._on_ready(router, view)

    async def _still_loading(self) -> set[NodeName]:
        """Returns when every engine node listens, which it does once it has loaded; or who does not in LOADING_PATIENCE_S."""
        deadline = time.monotonic() + LOADING_PATIENCE_S
        engines = {node.name: node.listen for node in self._nodes if node.role != "router"}
        while loading := {name for name in engines.keys() - self._started if _can_bind(engines[name].host, engines[name].port)}:
            self._started |= engines.keys() - loading
            if time.monotonic() >= deadline or await self._stops_within(READY_POLL_S):
                break
        return loading

    async def _settled_view(self, router: NodeConfig, loading: set[NodeName]) -> ClusterView | None:
        """What `router` shows once it has linked those of ours that have loaded, or has not in LINKING_PATIENCE_S."""
        deadline = time.monotonic() + LINKING_PATIENCE_S
        ours = {node.name for node in self._nodes} - loading
        while (view := await _view(router.listen, self._tls)) is not None and not view.is_settled(ours):
            if time.monotonic() >= deadline or await self._stops_within(READY_POLL_S):
                break
        return None if view is None else view.with_loading(loading)

    async def _end_children(self) -> None:
        """Routers first: they take nothing new and end when their requests have, for which they need the engine nodes. What outlives
        its grace is killed."""
        routers = [node for node in self._nodes if node.role == "router"]
        engines = [node for node in self._nodes if node.role != "router"]
        for nodes in (routers, engines):
            self._ending += nodes
            self._signal(nodes, signal.SIGTERM)
            alive = [asyncio.create_task(child.wait()) for child in self._of(nodes)]
            if alive and (await asyncio.wait(alive, timeout=self._grace_s))[1]:
                self._signal(nodes, signal.SIGKILL)

    def _of(self, nodes: Iterable[NodeConfig]) -> list[Process]:
        return [self._children[node.name] for node in nodes if node.name in self._children]

    def _signal(self, nodes: Iterable[NodeConfig], number: signal.Signals) -> None:
        for child in self._of(nodes):
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(number)

    async def _stops_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop.wait()
        return self._stop.is_set()

    # ── what the terminal shows ──────────────────────────────────────────────────────────────────────────────────────

    def _say(self, node: NodeConfig, message: str) -> None:
        self._write(node, f"{time.strftime('%H:%M:%S')} {message}")

    def _write(self, node: NodeConfig, line: str) -> None:
        """A node's own log lines begin with its name already; what its libraries write does not."""
        prefix = f"[{node.name}]"
        line = line.removeprefix(prefix + " ")
        if self._out.isatty():
            prefix, line = styled(prefix, self._styles[node.name]), paint(line)
        self._out.write(f"{prefix} {line}\n")
        self._out.flush()


def node_command(config_path: Path) -> Callable[[NodeConfig], list[str]]:
    """How a child is started: as this very package, with the same interpreter.

    -P keeps the working directory off its path, where a folder called disaggd would be taken for the package.
    """
    return lambda node: [sys.executable, "-P", "-m", "disaggd", "--role", node.role, "--name", node.name, "--config", str(config_path)]


def _child_environment() -> dict[str, str]:
    """Ours; where the package is not installed, but run from its checkout, also the way to it."""
    home = str(Path(disaggd.__file__).parent.parent)
    if home in site.getsitepackages() or home == site.getusersitepackages():
        return dict(os.environ)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))}


def banner(config: Config, router: NodeConfig, view: ClusterView | None) -> str:
    """What to do with a cluster that is ready, and what it lacks as far as that is shown."""
    if view is None:
        view = ClusterView(tuple(LinkedNode(node.name, node.role, node.listen, "up") for node in config.nodes))
    host = "127.0.0.1" if router.listen.is_wildcard else router.listen.rpartition(":")[0]
    head = f"Ready, but {styled('without ' + ', '.join(view.missing), WARNING_STYLE)}" if view.missing else "Ready"
    access = "" if config.router.tls_cert is None else " --cacert …"
    access += "" if config.router.api_keys is None else " -H 'authorization: Bearer …'"
    counts = ", ".join((f"{len(config.nodes_of('router'))} router", view.count("prefill"), view.count("decode")))
    body = f'{{"model": "{config.model.served_name}", "prompt": "def fibonacci(n):", "max_tokens": 64, "temperature": 0.5, "stream": true}}'
    return (
        f"\n{head}: {config.model.served_name} on {counts}. Ctrl-C ends all of them, their requests first; a second one at once. Try:\n\n"
        f"  curl -N {config.router.scheme}://{host}:{router.listen.port}/v1/completions -H 'content-type: application/json'{access} "
        f"-d '{body}'\n"
    )


async def _view(router: Address, tls: ssl.SSLContext | None) -> ClusterView | None:
    """The cluster as `router` sees it; None if it does not tell, or has just died."""
    body = await _get(router, "/v1/cluster", tls)
    return None if body is None else msgspec.json.decode(body, type=ClusterView)


async def _get(router: Address, path: str, tls: ssl.SSLContext | None) -> bytes | None:
    """The body of `router`'s answer to `GET path`; None unless it is a 200."""
    host = "127.0.0.1" if router.is_wildcard else router.host
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, router.port, ssl=tls)
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nHost: {router}\r\nConnection: close\r\n\r\n".encode())
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
                return body if b" 200 " in head.partition(b"\r\n")[0] else None
            finally:
                writer.close()
    return None


def _die_with(parent: int) -> None:
    """In the child, before exec: it is killed when `up` dies, however that dies."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _exit_code(code: int) -> int:
    """As a shell would tell it; ending early without an error is one too."""
    return 128 - code if code < 0 else code or 1


def _ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
