"""The HTTP server as a router runs it, over real sockets: what is no HTTP at all, and what is sent in odd pieces.

One server serves all cases of a run. A case is what one connection sends: requests one after the other, whole or with their bytes changed,
wrong lengths, broken chunks. The server may close a connection, and must answer whoever comes next.
"""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from disaggd.config import RouterConfig
from disaggd.observe.metrics import Metrics
from disaggd.roles.http_server import HttpServer, http_settings
from tests.fuzz.gateway_in_process import GOOD, HERE, Watched, make_app
from tests.fuzz.http_cases import Case, cases
from tests.fuzz.surface import Surface
from tests.support.clusters import wait_until

LIMIT_S = 60.0
"""Until a connection is over, on a machine that is very busy."""


@dataclass(frozen=True)
class Connection:
    """What one connection sends; `is_http`: the last of its requests asks that the connection be closed."""

    pieces: tuple[bytes, ...]
    is_http: bool = False

    def __repr__(self) -> str:
        return f"Connection({self.pieces!r:.2000}, {self.is_http})"


def spelt(case: Case, length: bytes | None = None, *, last: bool = False) -> bytes:
    lines = [b"%s %s HTTP/1.1" % (case.method.encode(), case.target), b"content-length: " + (length or b"%d" % len(case.body))]
    lines += [name + b": " + value for name, value in case.headers]
    if not any(name == b"host" for name, _ in case.headers):
        lines.append(b"host: router")
    if last:
        lines.append(b"connection: close")
    return b"\r\n".join(lines) + b"\r\n\r\n" + case.body


def chunked(case: Case, size: bytes) -> bytes:
    """In one chunk that says it is `size` long."""
    lines = [b"%s %s HTTP/1.1" % (case.method.encode(), case.target), b"host: router", b"transfer-encoding: chunked"]
    lines += [name + b": " + value for name, value in case.headers if name != b"host"]
    return b"\r\n".join(lines) + b"\r\n\r\n" + size + b"\r\n" + case.body + b"\r\n0\r\n\r\n"


_LENGTHS = st.sampled_from((b"-1", b"+5", b"0x5", b"5, 5", b"", b"18446744073709551616", b"0" * 5000 + b"2", b"3", b"abc", b"1_0"))
_SIZES = st.sampled_from((b"", b"-1", b"zz", b"5;ext=" + b"a" * 9000, b"ffffffffffffffffff", b"0", b"3", b" 3"))
_LINES = st.sampled_from(
    (
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.0\r\n\r\n",
        b"GET /health\r\n\r\n",
        b"\r\n\r\n\r\nGET /health HTTP/1.1\r\nhost: r\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: r\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\n\r\n",
        b"GET * HTTP/1.1\r\nhost: r\r\n\r\n",
        b"CONNECT r:1 HTTP/1.1\r\nhost: r\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: r\r\nx: a\r\n b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost : r\r\n\r\n",
        b"GET /health HTTP/1.1\r\n: r\r\n\r\n",
        b"GET /health HTTP/1.1\r\nx:" + b"a" * 100_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: r\r\n\r\n",
        b"GET /health HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket\r\nhost: r\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: r\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{}",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    )
)


@st.composite
def connections(draw: st.DrawFn) -> Connection:
    kind = draw(st.integers(0, 5))
    if kind < 2:  # pipelined, cut into pieces anywhere
        asked = draw(st.lists(cases(), min_size=1, max_size=3))
        raw = b"".join(spelt(case, last=case is asked[-1]) for case in asked)
        cuts = sorted(draw(st.lists(st.integers(0, len(raw)), max_size=3)))
        return Connection(tuple(raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)), is_http=True)
    if kind == 2:
        return Connection((spelt(draw(cases()), draw(_LENGTHS)),))
    if kind == 3:
        case = draw(cases())
        return Connection((chunked(case, draw(_SIZES | st.just(b"%x" % len(case.body)))),))
    if kind == 4:
        raw, at = spelt(draw(cases())), draw(st.integers(0, 200))
        return Connection((raw[:at] + draw(st.binary(min_size=1, max_size=8)) + raw[at + draw(st.integers(0, 8)) :],))
    return Connection((draw(_LINES | st.binary(max_size=60)),))


# ── the server ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Server:
    """A router's HTTP server on a port of its own, in a thread with a loop of its own; it ends with the process."""

    def __init__(self) -> None:
        self.backend = Watched()
        self._listener = socket.create_server(("127.0.0.1", 0))
        app, metrics = make_app(self.backend, has_keys=True), Metrics(CollectorRegistry())
        self._server = HttpServer(http_settings(app, None, RouterConfig(), metrics))
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._main, name="http", daemon=True).start()
        wait_until("the server has started", lambda: self._server.started, LIMIT_S)

    def _main(self) -> None:
        self._loop.run_until_complete(self._server.serve(sockets=[self._listener]))

    def send(self, pieces: tuple[bytes, ...], *, ends: bool) -> bytes:
        """Everything that comes back. `ends`: no more will come, and the server is told; else it has to close the connection."""
        received = b""
        with socket.create_connection(self._listener.getsockname(), timeout=LIMIT_S) as connection:
            try:
                for piece in pieces:
                    connection.sendall(piece)
                if ends:
                    connection.shutdown(socket.SHUT_WR)
                while chunk := connection.recv(65536):
                    received += chunk
            except OSError as error:
                if isinstance(error, TimeoutError):  # anything else is the server's right: it need not hear a bad request out
                    raise
        return received

    def wait_idle(self) -> None:
        wait_until("no sequence runs", lambda: not self.backend.num_open, LIMIT_S, every_s=0.002)


@cache
def server() -> Server:
    return Server()


def replies(raw: bytes) -> Iterator[tuple[int, bytes]]:
    """Status and body of each response that has a length."""
    while raw:
        head, _, rest = raw.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        yield int(head[9:12]), rest[:length]
        raw = rest[length:]


def check(sent: Connection) -> None:
    """What the application answers is documented; what the server refuses by itself is a 400 in plain words."""
    there = server()
    received = there.send(sent.pieces, ends=not sent.is_http)
    assert b"Traceback (most recent call last)" not in received and HERE not in received
    assert not received or received.startswith(b"HTTP/1.1 "), received[:200]
    assert b"HTTP/1.1 5" not in received.replace(b"HTTP/1.1 503", b"")
    there.wait_idle()
    [(status, body)] = replies(there.send((spelt(GOOD, last=True),), ends=False))
    assert status == 200 and json.loads(body)["usage"]["completion_tokens"] == 2


SOCKETS = Surface("HTTP connections, to the router's server", connections(), check, quick=200, share=0.16)
