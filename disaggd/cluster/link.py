"""A link: one WebSocket between a router and an engine node. Frames in order, a hello, heartbeats, reconnects.

Runs on the asyncio thread. Knows what a frame looks like, not what it means: `on_up`, `on_frame` and `on_down` are
called on the same thread, in order, with exactly one `on_down` for each `on_up`; none of them may block.

```
router: dial()                                 engine node: serve_links()
   │  ── HTTP upgrade, over TLS if configured ─►  │
   │  ◄═ RouterHello … NodeHello, with proofs ═►  │   `handshake.py`: who is there, and do both know the secret
   │  ◄═══════════ frames, and a Ping every ═══►  │   `missed_heartbeats` silent intervals close the link
   │               `heartbeat_s` from each end    │
```
"""

import asyncio
import http
import logging
import os
import random
import ssl
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Never, TypeVar

import msgspec
from websockets.asyncio.client import connect
from websockets.asyncio.connection import Connection
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed, InvalidMessage, WebSocketException
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from disaggd.cluster.handshake import SECRET_FIELD, Greeting, UnexpectedFrame, meet_node, meet_router
from disaggd.cluster.hello import Frame, HelloRejected, NodeHello, Ping, RouterHello
from disaggd.cluster.link_settings import LinkSettings
from disaggd.cluster.protocol import ToNode, ToRouter
from disaggd.cluster.strangers import Strangers
from disaggd.config import NodeConfig
from disaggd.errors import HelloRefused, ResourceError
from disaggd.ids import NodeName
from disaggd.tls import days_left
from disaggd.tls import reason as tls_reason
from disaggd.troubles import Refusals, Repeated
from disaggd.units import Address
from disaggd.wire import Undecodable, WireDecoder

log = logging.getLogger(__name__)

LINK_PATH = "/link"
HEALTH_PATH = "/health"

UPGRADE_TIMEOUT_S = 5.0
"""For the HTTP request that becomes a link."""
CLOSE_TIMEOUT_S = 1.0
"""For the other end's farewell."""

_MAX_CLOSE_REASON_BYTES = 120  # a WebSocket close frame has room for 123
_MAX_GREETING_BYTES = 2**16  # what somebody who has proved nothing yet may make us hold
_FAREWELLS = (CloseCode.NORMAL_CLOSURE, CloseCode.GOING_AWAY)

# The library logs a traceback for every port scan and health probe; what matters of it is logged here instead.
_websockets_log = logging.getLogger(f"{__name__}.websockets")
_websockets_log.setLevel(logging.CRITICAL)

FAULT = "fault"
"""In place of a field: no difference ended the link, but what its owner did about a frame of it, which failed."""

_encode = msgspec.msgpack.Encoder().encode
decode_from_router = WireDecoder[ToNode](ToNode)
decode_from_node = WireDecoder[ToRouter](ToRouter)

Out = TypeVar("Out", bound=Frame)
In = TypeVar("In", bound=Frame)
Hello = TypeVar("Hello", RouterHello, NodeHello)


class LinkClosed(Exception):
    """Ends a link's tasks; the message says why."""

    def __init__(self, reason: str, *, is_farewell: bool = False, is_fault: bool = False) -> None:
        super().__init__(reason)
        self.is_farewell = is_farewell
        """An end in good order, which a peer may choose at any time."""
        self.is_fault = is_fault
        """Something of ours failed over it."""


class Link(Generic[Out, In, Hello]):
    """One end of a link that is up."""

    def __init__(
        self,
        socket: Connection,
        name: NodeName,
        peer: Hello,
        decode: Callable[[bytes], In],
        settings: LinkSettings,
    ) -> None:
        self.name = name
        """The other end's."""
        self.peer: Hello = peer
        """What the other end said of itself."""
        self._socket = socket
        self._decode = decode
        self._settings = settings
        self._outgoing: deque[bytes] = deque()
        self._buffered_bytes = 0
        self._wake_writer = asyncio.Event()
        self._end: LinkClosed | None = None
        self._silent_heartbeats = 0

    def send(self, frame: Out | Ping) -> None:
        """Queues one frame; never blocks. On a closed link it is dropped: `on_down` is the notice."""
        if self._end is not None:
            return
        message = _encode(frame)
        self._outgoing.append(message)
        self._buffered_bytes += len(message)
        self._wake_writer.set()
        if self._buffered_bytes > self._settings.max_buffered_bytes:
            self._cut(f"the peer reads too slowly: {self._buffered_bytes} bytes wait for it")

    def close(self, reason: str) -> None:
        """Ends the link once what was sent before is on its way. Idempotent."""
        if self._end is None:
            self._end = LinkClosed(reason, is_farewell=True)
            self._wake_writer.set()

    def _cut(self, reason: str) -> None:
        """Ends the link now: nothing more goes out."""
        self._end = self._end or LinkClosed(reason)
        self._socket.transport.abort()

    async def carry(
        self, on_up: Callable[["Link[Out, In, Hello]"], None], on_frame: Callable[[Any, In], None], on_down: Callable[[Any, str], None]
    ) -> LinkClosed:
        """Runs the link to its end, which it returns. Cancelling it closes the link; `on_down` is called in any case."""
        log.info("link to %s is up", self.name)
        end, level = LinkClosed("stopping", is_farewell=True), logging.INFO
        try:
            on_up(self)
            end = await self._run(on_frame)
            level = logging.INFO if end.is_farewell else logging.WARNING
        finally:
            self._end = self._end or end
            log.log(level, "link to %s is down: %s", self.name, end)
            try:
                on_down(self, str(end))
            finally:
                await _close(self._socket, CloseCode.GOING_AWAY if end.is_farewell else CloseCode.INTERNAL_ERROR, str(end))
        return end

    async def _run(self, on_frame: Callable[[Any, In], None]) -> LinkClosed:
        """Until the link ends; returns why."""
        end = LinkClosed("a frame could not be handled", is_fault=True)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read(on_frame))
                tasks.create_task(self._write())
                tasks.create_task(self._beat())
        except* LinkClosed as closed:
            end = next(error for error in closed.exceptions if isinstance(error, LinkClosed))
        except* Exception as faults:  # a callback's bug must not take the other links down
            log.exception("link to %s: %s", self.name, end, exc_info=faults)
        return end

    async def _read(self, on_frame: Callable[[Any, In], None]) -> None:
        while True:
            frame = await self._receive()
            self._silent_heartbeats = 0
            if not isinstance(frame, Ping):
                on_frame(self, frame)

    async def _receive(self) -> In:
        try:
            return self._decode(await _recv_bytes(self._socket))
        except ConnectionClosed as error:
            raise self._end or _closed(error) from error
        except Undecodable as error:
            raise LinkClosed(f"undecodable frame: {error}") from error

    async def _write(self) -> None:
        while True:
            await self._wake_writer.wait()
            self._wake_writer.clear()
            while self._outgoing:
                message = self._outgoing.popleft()
                self._buffered_bytes -= len(message)
                await self._put(message)
            if self._end is not None:
                raise self._end

    async def _put(self, message: bytes) -> None:
        try:
            await self._socket.send(message)
        except ConnectionClosed as error:
            raise self._end or _closed(error) from error

    async def _beat(self) -> None:
        """Counts intervals instead of reading a clock: a loop that stalled for seconds itself accuses nobody."""
        while True:
            await asyncio.sleep(self._settings.heartbeat_s)
            if self._silent_heartbeats >= self._settings.missed_heartbeats:
                self._cut(f"silent for {self._silent_heartbeats} heartbeats")
            self._silent_heartbeats += 1
            self.send(Ping())


RouterLink = Link[ToNode, ToRouter, NodeHello]
"""The router's end."""
NodeLink = Link[ToRouter, ToNode, RouterHello]
"""The engine node's end."""


# ── the engine node's side ───────────────────────────────────────────────────────────────────────────────────────────


class LinkServer:
    """The listener of an engine node: a link per router, and `GET /health`."""

    def __init__(
        self,
        hello: Callable[[RouterHello], NodeHello | HelloRejected],
        on_up: Callable[[NodeLink], None],
        on_frame: Callable[[NodeLink, ToNode], None],
        on_down: Callable[[NodeLink, str], None],
        on_refused: Callable[[str, int], None],
        settings: LinkSettings,
    ) -> None:
        self._hello = hello
        self._callbacks = (on_up, on_frame, on_down)
        self._settings = settings
        self._strangers = Strangers(settings.max_strangers)
        self._refusals = Refusals(log, on_refused)
        self._server: Server | None = None

    async def listen(self, address: Address) -> None:
        """Raises ResourceError if the port is taken."""
        if self._settings.accept_tls is not None:
            self._strangers.count_handshakes(self._settings.accept_tls, self._settings.hello_timeout_s)
        try:
            self._server = await serve(
                self._serve_one,
                address.host,
                address.port,
                process_request=self._admit,
                create_connection=self._strangers.connection_type,
                **_tls_options(self._settings.accept_tls, self._settings),
                **_SOCKET_OPTIONS,
            )
        except OSError as error:
            raise ResourceError(f"cannot listen on {address}: {_reason(error)}") from error

    async def close(self) -> None:
        """Stops listening and closes every link; returns when each `on_down` has been called."""
        if self._server is not None:
            self._server.close(reason="stopping")
            await self._server.wait_closed()

    def _admit(self, socket: ServerConnection, request: Request) -> Response | None:
        if request.path == HEALTH_PATH:
            return socket.respond(http.HTTPStatus.OK, "ok\n")
        if request.path != LINK_PATH:
            return socket.respond(http.HTTPStatus.NOT_FOUND, f"nothing here but {HEALTH_PATH} and {LINK_PATH}\n")
        return None

    async def _serve_one(self, socket: ServerConnection) -> None:
        try:
            hello = await self._greet(socket)
            if hello is not None:
                self._strangers.gone(socket)
                link: NodeLink = Link(socket, hello.router, hello, decode_from_router, self._settings)
                end = await link.carry(*self._callbacks)
                if end.is_fault:
                    self._refusals.count(FAULT)
        except Exception:
            self._refusals.count(FAULT)
            log.exception("a link's callback failed")  # the library would log it where nobody looks
            raise

    async def _greet(self, socket: ServerConnection) -> RouterHello | None:
        """The router's hello, answered; None if it was refused or never came."""
        peer = _remote(socket)
        try:
            async with asyncio.timeout(self._settings.hello_timeout_s):
                theirs, refusal = await meet_router(_greeting(socket, self._settings), self._hello)
        except (TimeoutError, ConnectionClosed, Undecodable, UnexpectedFrame) as error:
            self._refusals.note("no_hello", peer, f"no hello from {peer}: {_why(error, self._settings)}")
            return None
        if refusal is not None:
            self._refusals.note(refusal.field, peer, f"refused router {theirs.router:.63} at {peer}: {_differs(refusal)}")
            return None
        _lift_limit(socket, self._settings)
        _warn_of_expiry(socket, theirs.router)
        return theirs


async def serve_links(
    listen: Address,
    *,
    hello: Callable[[RouterHello], NodeHello | HelloRejected],
    on_up: Callable[[NodeLink], None],
    on_frame: Callable[[NodeLink, ToNode], None],
    on_down: Callable[[NodeLink, str], None],
    settings: LinkSettings,
    on_refused: Callable[[str, int], None] = lambda *_: None,
) -> LinkServer:
    """Listens for routers at `listen` until the server is closed. `hello` answers a router that knows the cluster's secret.

    `on_refused` is told the cause of each refusal, and how often that was one. Raises ResourceError if the port is taken.
    """
    server = LinkServer(hello, on_up, on_frame, on_down, on_refused, settings)
    await server.listen(listen)
    return server


# ── the router's side ────────────────────────────────────────────────────────────────────────────────────────────────


async def dial(
    node: NodeConfig,
    hello: RouterHello,
    *,
    on_up: Callable[[RouterLink], None],
    on_frame: Callable[[RouterLink, ToRouter], None],
    on_down: Callable[[RouterLink, str], None],
    settings: LinkSettings,
    accept: Callable[[NodeHello], None] = lambda _: None,
    on_refused: Callable[[str], None] = lambda _: None,
    on_trouble: Callable[[Exception, str], None] = lambda *_: None,
) -> Never:
    """Keeps a link to `node` for as long as it is not cancelled. `accept` may raise HelloRefused over the node's hello;
    `on_refused` is told the field over which either end refused the other, or `FAULT`; `on_trouble`, at each attempt, why there is no
    link.

    A node that is away is tried again soon, at most `reconnect_max_s` apart; one that refuses, or is refused, seldom.
    Each standing trouble is logged once; that a node is not there yet, or took its leave, is none for `patience_s`. No exception ends
    this: a router goes on with its other nodes, whatever one of them does.
    """
    troubles = Repeated(log)
    now = asyncio.get_running_loop().time
    missed_from = now() + settings.patience_s
    pause_s = settings.reconnect_min_s
    while True:
        try:
            link = await _connect(node, hello, accept, settings)
        except HelloRefused as error:
            on_refused(error.field)
            on_trouble(error, str(error))
            troubles.log(logging.WARNING, f"no link to {node.name} at {node.listen}: {error}")
            pause_s = settings.refused_s
        except ssl.SSLError as error:
            on_refused("tls")
            on_trouble(error, f"TLS: {tls_reason(error)}")
            troubles.log(logging.WARNING, f"no link to {node.name} at {node.listen}: TLS: {tls_reason(error)}")
            pause_s = settings.refused_s
        except (OSError, TimeoutError, WebSocketException, Undecodable, UnexpectedFrame) as error:
            if isinstance(error, OSError) and now() < missed_from:
                troubles.log(logging.INFO, f"waiting for {node.name} at {node.listen}")
            else:
                troubles.log(logging.WARNING, f"no link to {node.name} at {node.listen}, trying again: {_why(error, settings)}")
            on_trouble(error, _why(error, settings))
            pause_s = min(2 * pause_s, settings.reconnect_max_s)
        except Exception as error:  # noqa: BLE001  whatever it is, the other nodes stay linked
            on_refused(FAULT)
            on_trouble(error, repr(error))
            troubles.log(logging.ERROR, f"no link to {node.name} at {node.listen}, trying again: {error!r}", error)
            pause_s = settings.refused_s
        else:
            troubles.forget()
            pause_s = settings.reconnect_min_s
            missed_from = now()
            try:
                end = await link.carry(on_up, on_frame, on_down)
                if end.is_fault:
                    on_refused(FAULT)
                missed_from = now() + (settings.patience_s if end.is_farewell else 0.0)
            except Exception:
                on_refused(FAULT)
                log.exception("a callback of the link to %s failed", node.name)
        await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))


class _Dialled(connect):
    """Follows no redirect: what a router says to a node is for that address alone."""

    def process_redirect(self, exc: Exception) -> Exception:
        return exc


async def _connect(node: NodeConfig, hello: RouterHello, accept: Callable[[NodeHello], None], settings: LinkSettings) -> RouterLink:
    async with asyncio.timeout(settings.hello_timeout_s):
        scheme = "ws" if settings.dial_tls is None else "wss"
        tls = _tls_options(settings.dial_tls, settings)
        socket = await _Dialled(f"{scheme}://{node.listen}{LINK_PATH}", proxy=None, **tls, **_SOCKET_OPTIONS)
        try:
            theirs = await meet_node(_greeting(socket, settings), hello, node)
            accept(theirs)
        except BaseException as error:  # also cancellation and the timeout: no socket is left behind
            try:
                if isinstance(error, HelloRefused):
                    await _close(socket, CloseCode.POLICY_VIOLATION, f"{hello.router}: {error}")
            finally:
                socket.transport.abort()
            raise
    _lift_limit(socket, settings)
    _warn_of_expiry(socket, node.name)
    return Link(socket, node.name, theirs, decode_from_node, settings)


# ── both sides ───────────────────────────────────────────────────────────────────────────────────────────────────────

_SOCKET_OPTIONS: dict[str, Any] = {
    "compression": None,  # token ids barely compress; deflate would only cost the loop time
    "ping_interval": None,  # heartbeats are frames of our own
    "open_timeout": UPGRADE_TIMEOUT_S,
    "close_timeout": CLOSE_TIMEOUT_S,
    "max_size": _MAX_GREETING_BYTES,
    "max_queue": 64,
    "write_limit": 2**20,
    "logger": _websockets_log,
}


async def _recv_bytes(socket: Connection) -> bytes:
    message = await socket.recv(decode=False)
    assert isinstance(message, bytes)
    return message


async def _close(socket: Connection, code: CloseCode, reason: str) -> None:
    await socket.close(code, reason.encode()[:_MAX_CLOSE_REASON_BYTES].decode(errors="ignore"))


def _tls_options(context: ssl.SSLContext | None, settings: LinkSettings) -> dict[str, Any]:
    return {} if context is None else {"ssl": context, "ssl_handshake_timeout": settings.hello_timeout_s}


def _warn_of_expiry(socket: Connection, name: NodeName) -> None:
    if (days := days_left(socket.transport.get_extra_info("peercert"))) is not None:
        log.warning("the certificate of %s expires in %.1f days", name, days)


def _greeting(socket: Connection, settings: LinkSettings) -> Greeting:
    return Greeting(socket.send, lambda: _recv_bytes(socket), settings.secret)


def _lift_limit(socket: Connection, settings: LinkSettings) -> None:
    """The peer has proved who it is: from now on it may send whole frames."""
    socket.protocol.max_message_size = settings.max_frame_bytes


def _remote(socket: Connection) -> str:
    address = socket.remote_address
    return str(address[0]) if address else "a peer that left"


def _differs(refusal: HelloRejected) -> str:
    if refusal.field == SECRET_FIELD:
        return "wrong cluster secret"
    return f"{refusal.field} differs (ours {refusal.ours}, theirs {refusal.theirs})"


def _why(error: BaseException, settings: LinkSettings) -> str:
    if isinstance(error, ConnectionClosed):
        return str(_closed(error))
    if isinstance(error, TimeoutError) and error.errno is None:
        return f"no answer within {settings.hello_timeout_s:g} s"
    if isinstance(error, InvalidMessage) and settings.dial_tls is None:
        return f"{error} (does it expect TLS? [cluster] tls_cert)"
    if isinstance(error, ConnectionResetError) and settings.dial_tls is not None:
        return "connection reset (does it not speak TLS? [cluster] tls_cert)"
    return _reason(error) if isinstance(error, OSError) else str(error) or type(error).__name__


def _closed(error: ConnectionClosed) -> LinkClosed:
    """Says what the first close frame says; the other end's only echoes it."""
    is_theirs = error.sent is None or error.rcvd_then_sent is True
    first = error.rcvd if is_theirs else error.sent
    if first is None:
        return LinkClosed("connection lost")
    reason = first.reason or str(first.code)
    return LinkClosed(f"closed by the peer: {reason}" if is_theirs else reason, is_farewell=first.code in _FAREWELLS)


def _reason(error: OSError) -> str:
    """In the system's words: asyncio's own name the address again."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error) or type(error).__name__
