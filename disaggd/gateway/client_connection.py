"""One client's connection, within bounds: how long it may take to ask, what it may ask in, how slowly it may read.

uvicorn's protocol parses and answers; what it leaves to a proxy in front of it is added here. Runs on the asyncio thread. Knows
nothing of what is asked. The app may leave two things in the state of a request's scope: `request_id`, for the log, and `on_cut`, which
is told why before the connection of a client that does not read is reset.

    connected ─► HEAD ─► BODY ─► ASKED, the reply goes out; then idle, which uvicorn's own timer ends ─► HEAD ─► …

A client that shuts down its sending half counts as gone, as it does for most servers: of a client that vanished there is no other
sign than that, and what is computed for nobody has to end at once.
"""

import asyncio
import enum
import socket
import struct
import termios
from fcntl import ioctl
from functools import partial
from http import HTTPStatus
from typing import Any, cast

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from disaggd.errors import BodyTooLarge, HeadTooLarge, InvalidRequest, RequestError, TooSlow, Unavailable
from disaggd.gateway.cuts import Cuts
from disaggd.gateway.errors import error_object

_NO_LINGER = struct.pack("ii", 1, 0)
_INT = struct.Struct("i")
_FRAMING = 2
"""So many times its size a body may be on the wire: chunk sizes, and trailers, which nobody reads."""
_MAX_PIPELINED = 16
"""Further requests that may wait behind one: 256 KiB of them, read at once, would become 40 MB."""


class ConnectionLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What one client may take."""

    max_connections: int = 4096
    """Of all clients together."""
    max_head_bytes: int = 16 << 10
    max_headers: int = 100
    max_body_bytes: int = 4 << 20
    head_timeout_s: float = 10.0
    """From the connection, or the first byte of a further request, to the end of the request's head."""
    body_timeout_s: float = 30.0
    """From there to the request's end."""
    stall_s: float = 30.0
    """A client that leaves something unread is looked at in such intervals."""
    min_read_bytes_per_s: int = 256
    """Less is no headway: one token's event is about 200 bytes."""


class Stage(enum.Enum):
    """What of a request is here."""

    HEAD = enum.auto()
    """Nothing, or a part of its head."""
    BODY = enum.auto()
    """Its head."""
    ASKED = enum.auto()
    """All of it."""


class ClientConnection(HttpToolsProtocol):
    """uvicorn makes one for each connection (`bounded`)."""

    def __init__(self, limits: ConnectionLimits, cuts: Cuts, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._limits = limits
        self._cuts = cuts
        self._stage = Stage.HEAD
        self._stage_bytes = 0
        """That came in this stage, as far as one can tell: where a stage begins in the middle of what came, the rest is not counted."""
        self._refusal: RequestError | None = None
        """Why the parser was stopped."""
        self._late_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._unread_bytes = 0
        self._answered: RequestResponseCycle | None = None
        """The request whose turn it is; `cycle` is the last one that came, and `pipeline` holds those between."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=1, low=0)  # the socket's buffer is enough: what it does not take, waits
        if len(self.connections) > self._limits.max_connections:
            self._cuts.refused("too_many", self._name, self.loop.time())
            return self._refuse(Unavailable(f"{self._limits.max_connections} clients are connected already"))
        return self._time_stage()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._late_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        if self._answered is not None and self._answered is not self.cycle:  # uvicorn tells the last request only
            self._answered.disconnected = True
            self._answered.message_event.set()

    # ── what the client sends ────────────────────────────────────────────────────────────────────────────────────────

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        began_in = self._stage
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self._cuts.refused("malformed" if self._refusal is None else "too_large", self._name, self.loop.time())
            return self._refuse(self._refusal or InvalidRequest("this is not HTTP"))
        if self._stage is Stage.ASKED and not self._is_replying:
            self._enter(Stage.HEAD)  # not a request, nor a part of one: blank lines
        if self._stage is began_in:
            return self._count(len(data))
        return self._time_stage()

    def _parse(self, data: bytes) -> None:
        """Raises HttpParserError."""
        while True:
            try:
                return self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                if not self._asks_for_upgrade:
                    return None  # CONNECT: answered as it stands
                data = self._head_without_upgrade() + data[upgrade.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it

    @property
    def _asks_for_upgrade(self) -> bool:
        """To nothing that we speak, so the request is answered as if it did not (RFC 9110, 7.8): some clients ask with every first
        request. The parser would pass over its body; it is given the same head again, without that line."""
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def _head_without_upgrade(self) -> bytes:
        line = b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        return line + b"".join(b"%s: %s\r\n" % header for header in self.headers if header[0] != b"upgrade") + b"\r\n"

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= _MAX_PIPELINED:
            self._stop_parser(InvalidRequest(f"more than {_MAX_PIPELINED} requests wait on this connection"))
        super().on_message_begin()
        self._enter(Stage.HEAD)

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > self._limits.max_headers:
            self._stop_parser(HeadTooLarge(f"more than {self._limits.max_headers} headers"))

    def on_headers_complete(self) -> None:
        if self._asks_for_upgrade:
            return
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > self._limits.max_head_bytes:
            self._stop_parser(self._head_too_large())
        is_behind = self._is_replying
        super().on_headers_complete()
        self._enter(Stage.BODY)
        if not is_behind:
            self._answered = self.cycle

    def on_message_complete(self) -> None:
        if self._asks_for_upgrade:
            return
        super().on_message_complete()
        self._enter(Stage.ASKED)

    def on_response_complete(self) -> None:
        if self.pipeline:
            self._answered = self.pipeline[-1][0]
        super().on_response_complete()

    def _enter(self, stage: Stage) -> None:
        if stage is not self._stage:
            self._stage, self._stage_bytes = stage, 0

    def _count(self, num_bytes: int) -> None:
        """A part of a head, or of a body, that did not end with it."""
        self._stage_bytes += num_bytes
        if self._stage is Stage.HEAD and self._stage_bytes > self._limits.max_head_bytes:
            error: RequestError = self._head_too_large()
        elif self._stage is Stage.BODY and self._stage_bytes > _FRAMING * self._limits.max_body_bytes + self._limits.max_head_bytes:
            error = BodyTooLarge(f"the body takes more than {_FRAMING} times the {self._limits.max_body_bytes} bytes allowed")
        else:
            return
        self._cuts.refused("too_large", self._name, self.loop.time())
        self._refuse(error)

    def _head_too_large(self) -> RequestError:
        return HeadTooLarge(f"the request's head has more than {self._limits.max_head_bytes} bytes")

    def _stop_parser(self, error: RequestError) -> None:
        """Called by the parser, which turns what is raised into an error of its own."""
        self._refusal = error
        raise error

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _time_stage(self) -> None:
        """The client has so long for what it has to send now."""
        if self._late_timer is not None:
            self._late_timer.cancel()
            self._late_timer = None
        if self._stage is not Stage.ASKED:
            timeout_s = self._limits.head_timeout_s if self._stage is Stage.HEAD else self._limits.body_timeout_s
            self._late_timer = self.loop.call_later(timeout_s, self._late)

    def _late(self) -> None:
        if self.pipeline or (self._stage is Stage.HEAD and self._is_replying):  # behind another: its turn has not come
            return self._time_stage()
        is_head = self._stage is Stage.HEAD
        self._cuts.slow("head" if is_head else "body", self._name, self.loop.time())
        what, timeout_s = ("head", self._limits.head_timeout_s) if is_head else ("body", self._limits.body_timeout_s)
        return self._refuse(TooSlow(f"the request's {what} was not here within {timeout_s:g} s", code="request_timeout"))

    # ── what the client reads ────────────────────────────────────────────────────────────────────────────────────────

    def pause_writing(self) -> None:
        """The socket takes no more: from now on bytes wait."""
        super().pause_writing()
        self._time_reading()

    def resume_writing(self) -> None:
        """Nothing waits."""
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _time_reading(self) -> None:
        self._unread_bytes = self._count_unread()
        self._stall_timer = self.loop.call_later(self._limits.stall_s, self._check_reading)

    def _check_reading(self) -> None:
        """More than before is the work of other choices of the reply, which waited for the same moment: the next look tells."""
        read_bytes = self._unread_bytes - self._count_unread()
        if read_bytes < 0 or read_bytes >= self._limits.min_read_bytes_per_s * self._limits.stall_s:
            return self._time_reading()
        state: dict[str, Any] = {} if self._answered is None else self._answered.scope["state"]
        self._cuts.slow("stalled", self._name, self.loop.time(), state.get("request_id"))
        if (on_cut := state.get("on_cut")) is not None:
            on_cut(f"the client read less than {self._limits.min_read_bytes_per_s} bytes a second for {self._limits.stall_s:g} s")
        return self._reset()

    def _count_unread(self) -> int:
        """Here, and in the kernel: that says when a third of its buffer is free, which a slow client reads for minutes."""
        fd = self.transport.get_extra_info("socket").fileno()
        (in_kernel,) = _INT.unpack(ioctl(fd, termios.TIOCOUTQ, bytes(_INT.size)))  # SIOCOUTQ, of a socket: sent and not acknowledged too
        return self.transport.get_write_buffer_size() + cast(int, in_kernel)

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _refuse(self, error: RequestError) -> None:
        """Answer, unless that would fall into another answer, and close."""
        is_next = not (self.cycle.response_started or self.pipeline) if self._stage is Stage.BODY else not self._is_replying
        if is_next:
            self.transport.write(_response(error))
        self.transport.close()

    def _reset(self) -> None:
        """Closed as usual, the kernel would go on offering what its buffer holds, for minutes."""
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self.transport.abort()

    @property
    def _is_replying(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _name(self) -> str:
        return self.client[0] if self.client is not None else "a client that left"


def bounded(limits: ConnectionLimits, cuts: Cuts) -> type[asyncio.Protocol]:
    """What uvicorn is to make of each connection: its setting `http`."""
    return cast(type[asyncio.Protocol], partial(ClientConnection, limits, cuts))


def _response(error: RequestError) -> bytes:
    """Without the app: there is no request that it could be asked with."""
    body = msgspec.json.encode(error_object(error))
    head = [
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        *([f"retry-after: {error.retry_after_s}"] if isinstance(error, Unavailable) else []),
        "connection: close",
    ]
    return "\r\n".join([*head, "", ""]).encode() + body
