"""A client's connection, over real sockets: what takes too long, is too much, or is not read ends; all others are served meanwhile."""

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
import uvicorn
import uvloop
from prometheus_client import CollectorRegistry

from disaggd.gateway.backend import Delta, GenerationRequest
from disaggd.gateway.client_connection import ConnectionLimits, Stage, bounded
from disaggd.gateway.cuts import Cuts
from disaggd.observe.metrics import Metrics

PATIENT = ConnectionLimits(head_timeout_s=60.0, body_timeout_s=60.0, stall_s=60.0, max_body_bytes=200_000)
SOON_S = 0.2
LATE_S = 20.0
"""For everything that has to happen at some time, on a machine that has other things to do."""

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Front:
    """A server on loopback, and clients that behave as they are told."""

    def __init__(self, port: int, server: uvicorn.Server, cuts: CollectorRegistry) -> None:
        self.port = port
        self.server = server
        self._cuts = cuts
        self._writers: list[asyncio.StreamWriter] = []

    async def connect(self, *sent: bytes) -> Streams:
        """Its receive buffer is small: a reply that is not read waits at the server."""
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", self.port))
        reader, writer = await asyncio.open_connection(sock=client, limit=1024)
        self._writers.append(writer)
        writer.writelines(sent)
        return reader, writer

    async def ask(self, *sent: bytes) -> tuple[int, dict[str, Any]]:
        reader, _ = await self.connect(*sent)
        return await read_reply(reader)

    def cut(self, why: str) -> float:
        """Slow clients, and refused connections, of that reason."""
        names = ("disaggd_slow_clients_total", "disaggd_refused_connections_total")
        return sum(self._cuts.get_sample_value(name, {"why": why}) or 0.0 for name in names)

    def leave(self) -> None:
        for writer in self._writers:
            writer.transport.abort()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LATE_S):
        while not condition():  # noqa: ASYNC110  the server has no event for it
            await asyncio.sleep(0.01)


async def read_reply(reader: asyncio.StreamReader) -> tuple[int, dict[str, Any]]:
    """The status and the whole body of one reply."""
    async with asyncio.timeout(LATE_S):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
        body = await reader.readexactly(int(fields["content-length"]))
    return int(head.split()[1]), msgspec.json.decode(body)


async def read_status(reader: asyncio.StreamReader) -> int:
    """The same of a reply whose body need not be JSON."""
    async with asyncio.timeout(LATE_S):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        await reader.readexactly(int(head.partition("content-length: ")[2].split()[0]))
    return int(head.split()[1])


async def is_closed(reader: asyncio.StreamReader) -> bool:
    """Until the server has closed the connection; what it sent before is passed over."""
    async with asyncio.timeout(LATE_S):
        with contextlib.suppress(ConnectionError):
            while await reader.read(65536):
                pass
    return True


def head(num_bytes: int, *lines: str) -> bytes:
    return "\r\n".join(["POST /v1/completions HTTP/1.1", "host: router", f"content-length: {num_bytes}", *lines, "", ""]).encode()


def post(**body: Any) -> bytes:
    raw = msgspec.json.encode({"prompt": "one two", **body})
    return head(len(raw)) + raw


GET = b"GET /health HTTP/1.1\r\nhost: router\r\n\r\n"
MUCH = 3000
"""Deltas, of 600 KB of events, or 60 KB of text."""
NOT_MUCH = 200
STREAM = post(stream=True, max_tokens=MUCH)


@contextlib.asynccontextmanager
async def serving(
    call: Any, limits: ConnectionLimits = PATIENT, keep_alive_s: int = 60, send_buffer_bytes: int = 4096
) -> AsyncIterator[Front]:
    cuts = CollectorRegistry()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    settings = uvicorn.Config(
        call.app,
        http=bounded(limits, Cuts(Metrics(cuts))),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_keep_alive=keep_alive_s,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(settings)
    serve = asyncio.create_task(server.serve(sockets=[listener]))
    front = Front(listener.getsockname()[1], server, cuts)
    try:
        yield front
    finally:
        front.leave()
        server.should_exit = True
        await serve


def limits(**changes: Any) -> ConnectionLimits:
    return msgspec.structs.replace(PATIENT, **changes)


async def chatter(request: GenerationRequest) -> AsyncGenerator[Delta, None]:
    """As many deltas as asked for, as fast as they are read: `MUCH` are more than the sockets hold."""
    for index in range(request.sampling.max_tokens):
        yield Delta(20 * (50,), finish_reason="length" if index == request.sampling.max_tokens - 1 else None)
        await asyncio.sleep(0)  # others have their turn


# ── what it sends ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/comp",
        head(50, "x-a: b")[:-2],
    ],
    ids=["nothing", "half a request line", "half of the headers"],
)
def test_a_client_that_sends_no_whole_head_is_cut(call: Any, sent: bytes) -> None:
    async def scenario() -> None:
        async with serving(call, limits(head_timeout_s=SOON_S)) as front:
            reader, _ = await front.connect(sent)
            status, body = await read_reply(reader)
            assert (status, body["error"]["code"]) == (408, "request_timeout")
            assert await is_closed(reader)
            assert front.cut("head") == 1

    uvloop.run(scenario())


def test_blank_lines_keep_no_connection(call: Any) -> None:
    async def scenario() -> None:
        async with serving(call, limits(head_timeout_s=SOON_S)) as front:
            reader, writer = await front.connect(GET)
            assert (await read_reply(reader))[0] == 200
            writer.write(b"\r\n\r\n")
            assert await is_closed(reader)
            assert front.cut("head") == 1

    uvloop.run(scenario())


def test_a_head_that_comes_byte_by_byte_has_no_more_time_for_it(call: Any) -> None:
    async def scenario() -> None:
        async with serving(call, limits(head_timeout_s=SOON_S)) as front:
            reader, writer = await front.connect()
            reply = asyncio.create_task(read_reply(reader))
            for byte in head(5000, "x-slow: " + 8000 * "a"):
                writer.write(bytes([byte]))
                await asyncio.sleep(0.005)
                if reply.done():
                    break
            assert (await reply)[0] == 408
            assert front.cut("head") == 1

    uvloop.run(scenario())


def test_a_body_that_stops_is_cut_and_its_request_is_over(call: Any, backend: Any, registry: Any) -> None:
    async def scenario() -> None:
        async with serving(call, limits(body_timeout_s=SOON_S)) as front:
            assert (await front.ask(head(100) + b'{"prompt"'))[0] == 408
            await until(lambda: not front.server.server_state.tasks)
            assert front.cut("body") == 1

    uvloop.run(scenario())
    assert backend.requests == []
    assert registry.get_sample_value("disaggd_open_requests") == 0


def test_a_body_that_goes_on_after_the_reply_does_not_keep_the_connection(call: Any) -> None:
    async def scenario() -> None:
        async with serving(call, limits(body_timeout_s=SOON_S)) as front:
            reader, writer = await front.connect(head(10_000_000))
            assert (await read_reply(reader))[0] == 413
            closed = asyncio.create_task(is_closed(reader))
            while not closed.done():
                writer.write(b"x")
                await asyncio.sleep(0.005)
            assert front.cut("body") == 1

    uvloop.run(scenario())


@pytest.mark.parametrize(
    ("sent", "status", "why"),
    [
        (head(0, "x-large: " + 20_000 * "a"), 431, "too_large"),
        (head(0, *(f"x-{i}: b" for i in range(101))), 431, "too_large"),
        (b"GET /" + 20_000 * b"a" + b" HTTP/1.1\r\n\r\n", 431, "too_large"),
        (b"GET /" + 40_000 * b"a", 431, "too_large"),
        (b"hello\r\n\r\n", 400, "malformed"),
    ],
    ids=["a long header", "many headers", "a long path", "a long path without an end", "no HTTP"],
)
def test_what_cannot_be_a_request_is_refused(call: Any, sent: bytes, status: int, why: str) -> None:
    async def scenario() -> None:
        async with serving(call) as front:
            reader, writer = await front.connect(sent[:17_000])
            reply = asyncio.create_task(read_reply(reader))
            await asyncio.sleep(0.01)  # the rest comes by itself
            writer.write(sent[17_000:])
            got, body = await reply
            assert (got, body["error"]["type"]) == (status, "invalid_request_error")
            assert await is_closed(reader)
            assert front.cut(why) == 1

    uvloop.run(scenario())


def test_trailers_without_an_end_are_cut(call: Any) -> None:
    async def scenario() -> None:
        async with serving(call) as front:
            start = b"POST /v1/completions HTTP/1.1\r\nhost: router\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx-trailer: "
            _, writer = await front.connect(start)
            with contextlib.suppress(ConnectionError):
                while not writer.transport.is_closing():
                    writer.write(100_000 * b"a")
                    await writer.drain()
            assert front.cut("too_large") == 1

    uvloop.run(scenario())


def test_a_head_of_the_usual_size_in_any_pieces_is_read(call: Any) -> None:
    async def scenario() -> None:
        async with serving(call) as front:
            body = msgspec.json.encode({"prompt": "one two"})
            whole = head(len(body), *(f"x-{i}: {100 * 'b'}" for i in range(90))) + body
            for at in (1, 100, 9000, len(whole) - 1):
                reader, writer = await front.connect(whole[:at])
                await asyncio.sleep(0.01)
                writer.write(whole[at:])
                assert (await read_reply(reader))[0] == 200

    uvloop.run(scenario())


UPGRADES = ["connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA"]
"""What the JDK's client adds to every request over plain HTTP."""


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("at", ["one piece", "body later"])
def test_a_request_that_asks_for_an_upgrade_is_answered_as_if_it_did_not(call: Any, backend: Any, at: str, framing: str) -> None:
    async def scenario() -> None:
        async with serving(call) as front:
            body = msgspec.json.encode({"prompt": "one two"})
            start = head(len(body), *UPGRADES)
            if framing == "chunked":
                start = start.replace(b"content-length: %d" % len(body), b"transfer-encoding: chunked")
                body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
            behind = head(0, *UPGRADES).replace(b"POST /v1/completions", b"GET /health") + GET + start + body
            if at == "one piece":
                reader, writer = await front.connect(start + body + behind)
            else:
                reader, writer = await front.connect(start)
                await until(lambda: [one._stage for one in front.server.server_state.connections] == [Stage.BODY])  # type: ignore[union-attr]
                writer.write(body + behind)
            for _ in range(4):
                assert (await read_status(reader)) == 200
            assert len(backend.requests) == 2
            assert [request.tokens for request in backend.requests] == 2 * [backend.requests[0].tokens]
            assert front.cut("malformed") == 0

    uvloop.run(scenario())


def test_requests_follow_each_other_on_one_connection_whatever_comes_with_them(call: Any) -> None:
    """Each has its own time and its own bytes: large bodies do not count as the next one's head."""

    async def scenario() -> None:
        async with serving(call) as front:
            large = post(prompt=list(range(200)), stop=[100 * "x"] * 16)
            reader, writer = await front.connect()
            for _ in range(30):
                writer.write(large)
                assert (await read_reply(reader))[0] == 200
            writer.write(10 * large)
            assert [(await read_reply(reader))[0] for _ in range(10)] == 10 * [200]

    uvloop.run(scenario())


def test_a_heap_of_requests_at_once_is_not_kept(call: Any) -> None:
    async def scenario() -> None:
        async with serving(call) as front:
            reader, _ = await front.connect(1000 * GET)
            assert await is_closed(reader)
            assert front.cut("too_large") == 1

    uvloop.run(scenario())


def test_a_request_behind_a_long_reply_is_not_late(call: Any, backend: Any) -> None:
    """It is not read before its turn."""

    async def scenario() -> None:
        go_on = asyncio.Event()

        async def script(request: GenerationRequest) -> AsyncGenerator[Delta, None]:
            await go_on.wait()
            yield Delta((50,), finish_reason="length")

        backend.script = script
        async with serving(call, limits(body_timeout_s=SOON_S)) as front:
            reader, _ = await front.connect(post(max_tokens=1), post(max_tokens=1)[:-3])
            await until(lambda: any(connection.pipeline for connection in front.server.server_state.connections))
            await asyncio.sleep(3 * SOON_S)
            go_on.set()
            assert (await read_reply(reader))[0] == 200
            assert (await read_reply(reader))[0] == 408

    uvloop.run(scenario())


def test_a_client_that_goes_with_requests_in_line_leaves_nothing_behind(call: Any, backend: Any) -> None:
    async def forever(request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        await asyncio.Event().wait()
        yield Delta((50,))

    async def scenario() -> None:
        backend.script = forever
        async with serving(call) as front:
            _, writer = await front.connect(post(), post(), post())
            await until(lambda: len(backend.requests) == 1)
            writer.transport.abort()
            await until(lambda: not front.server.server_state.tasks)

    uvloop.run(scenario())
    assert len(backend.events) == 1


def test_one_client_too_many_is_told_so_and_the_others_are_served(call: Any) -> None:
    async def scenario() -> None:
        async with serving(call, limits(max_connections=2)) as front:
            (first, writer), _ = await front.connect(GET), await front.connect(GET)
            assert (await read_reply(first))[0] == 200
            status, body = await front.ask(GET)
            assert (status, body["error"]["code"]) == (503, "unavailable")
            assert front.cut("too_many") == 1
            writer.write(GET)
            assert (await read_reply(first))[0] == 200
            writer.close()
            await until(lambda: len(front.server.server_state.connections) == 1)
            assert (await front.ask(GET))[0] == 200

    uvloop.run(scenario())


def test_an_idle_connection_is_closed(call: Any) -> None:
    async def scenario() -> None:
        async with serving(call, keep_alive_s=1) as front:
            reader, _ = await front.connect(GET)
            assert (await read_reply(reader))[0] == 200
            assert await is_closed(reader)

    uvloop.run(scenario())


# ── what it reads ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_read_is_cut_and_its_sequence_aborted(
    call: Any, backend: Any, registry: Any, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    async def scenario() -> None:
        backend.script, backend.max_model_len = chatter, 2 * MUCH
        async with serving(call, limits(stall_s=SOON_S)) as front:
            _, writer = await front.connect(post(stream=stream, max_tokens=MUCH))
            await until(lambda: front.cut("stalled") == 1)
            client = writer.get_extra_info("socket")
            await until(lambda: client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET)
            await until(lambda: not front.server.server_state.connections and not front.server.server_state.tasks)

    uvloop.run(scenario())
    (request,) = backend.requests
    assert backend.events[0] == f"cut {request.id}: the client read less than 256 bytes a second for 0.2 s"
    assert f"cut a client that does not read: 127.0.0.1 (request {request.id})" in caplog.messages
    assert len(backend.events) == 1 + stream, "a whole reply had nothing left to abort"
    assert registry.get_sample_value("disaggd_open_requests") == 0


def test_a_client_that_reads_a_byte_at_a_time_is_cut(call: Any, backend: Any) -> None:
    async def scenario() -> None:
        backend.script, backend.max_model_len = chatter, 2 * MUCH
        async with serving(call, limits(stall_s=SOON_S)) as front:
            reader, _ = await front.connect(STREAM)
            async with asyncio.timeout(LATE_S):
                while not front.cut("stalled"):
                    assert await reader.read(1)
                    await asyncio.sleep(0.02)

    uvloop.run(scenario())
    assert [event.split()[0] for event in backend.events] == ["cut", "aborted"]


def test_a_client_that_reads_slowly_but_steadily_gets_everything(call: Any, backend: Any) -> None:
    async def scenario() -> bytes:
        backend.script, backend.max_model_len = chatter, 2 * MUCH
        got = b""
        async with serving(call, limits(stall_s=1.0)) as front:
            reader, _ = await front.connect(post(stream=True, max_tokens=NOT_MUCH))
            async with asyncio.timeout(LATE_S):
                while not got.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
                    got += await reader.read(1024)
                    await asyncio.sleep(0.05)
            assert front.cut("stalled") == 0
        return got

    assert uvloop.run(scenario()).count(b"data: ") == NOT_MUCH + 1


@pytest.mark.parametrize(("bytes_per_s", "is_cut"), [(40_000, False), (5_000, True)])
def test_a_client_is_cut_by_what_it_reads_and_not_by_when_the_kernel_says_so(
    call: Any, backend: Any, bytes_per_s: int, is_cut: bool
) -> None:
    """The kernel has room again when a third of its buffer is free: after some looks, at the quicker of these rates."""
    stall_s, looks = 1.2, 3

    async def scenario() -> None:
        backend.script, backend.max_model_len = chatter, 2 * MUCH
        async with serving(call, limits(stall_s=stall_s, min_read_bytes_per_s=15_000), send_buffer_bytes=128 * 1024) as front:
            reader, _ = await front.connect(STREAM)
            began, num_read = time.monotonic(), 0
            while not front.cut("stalled") and time.monotonic() < began + (LATE_S if is_cut else looks * stall_s):
                while num_read < bytes_per_s * (time.monotonic() - began):
                    num_read += len(await reader.read(1024))
                await asyncio.sleep(0.02)
            assert front.cut("stalled") == is_cut

    uvloop.run(scenario())


def test_a_reply_that_is_over_but_not_read_does_not_keep_the_connection(call: Any, backend: Any) -> None:
    """The keep-alive timer closes it; but a closed connection still waits for what it has to send."""

    async def scenario() -> None:
        backend.script, backend.max_model_len = chatter, 2 * MUCH
        async with serving(call, limits(stall_s=1.3), keep_alive_s=1) as front:
            await front.connect(post(max_tokens=MUCH))
            await until(lambda: front.cut("stalled") == 1)
            await until(lambda: not front.server.server_state.connections)

    uvloop.run(scenario())
