"""Whoever reaches a node's port and is no router: cut soon, and never many of them. Over real loopback sockets."""

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import uvloop
from websockets.asyncio.client import connect
from websockets.frames import CloseCode

from disaggd.cluster import link
from disaggd.cluster.protocol import Abort
from disaggd.ids import SeqId
from tests.cluster.test_link import SETTINGS, End, dialling, logged, raw_router, run, serving
from tests.cluster.test_link_tls import over_tls
from tests.support.certificates import make_certificates


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """So much time has an HTTP request to become a link."""
    monkeypatch.setitem(link._SOCKET_OPTIONS, "open_timeout", 0.1)


async def end_of(reader: asyncio.StreamReader) -> None:
    """Until the node has closed the connection."""
    async with asyncio.timeout(4):
        with contextlib.suppress(ConnectionError):
            await reader.read()


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /link HTT", b"GET /link HTTP/1.1\r\nhost: node\r\nx-a: " + 7000 * b"a"],
    ids=["nothing", "a part of the request", "half of a header"],
)
@pytest.mark.usefixtures("soon")
def test_whoever_does_not_ask_for_a_link_is_cut(free_port: Callable[[], int], sent: bytes) -> None:
    async def scenario() -> None:
        port = free_port()
        async with serving(port, End()):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            await end_of(reader)
            writer.close()

    run(scenario())


@pytest.mark.usefixtures("soon")
def test_whoever_asks_byte_by_byte_has_no_more_time_for_it(free_port: Callable[[], int]) -> None:
    async def scenario() -> None:
        port = free_port()
        async with serving(port, End()):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            cut = asyncio.create_task(end_of(reader))
            while not cut.done():
                writer.write(b"G")
                await asyncio.sleep(0.001)
            writer.close()

    run(scenario())


def test_a_link_without_a_hello_is_cut(free_port: Callable[[], int], caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        port = free_port()
        async with (
            serving(port, End(), settings=replace(SETTINGS, hello_timeout_s=0.1)),
            connect(f"ws://127.0.0.1:{port}/link", proxy=None) as socket,
        ):
            await socket.wait_closed()
            assert "no hello" in await logged(caplog, "no hello")

    run(scenario())


def test_a_huge_hello_is_cut_but_a_huge_frame_of_a_router_is_not(free_port: Callable[[], int]) -> None:
    async def scenario() -> None:
        port, node = free_port(), End()
        async with serving(port, node):
            async with connect(f"ws://127.0.0.1:{port}/link", proxy=None) as socket:
                await socket.send(bytes(100_000))
                await socket.wait_closed()
                assert socket.close_code == CloseCode.MESSAGE_TOO_BIG
            assert node.ups == 0
            async with raw_router(port) as socket:
                large = Abort(SeqId(10_000_000 * "a"), 0)
                await socket.send(msgspec.msgpack.encode(large))
                assert await node.frames.get() == large

    run(scenario())


def test_more_strangers_than_a_few_are_cut_and_routers_are_none(free_port: Callable[[], int], caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        port, node = free_port(), End()
        async with serving(port, node, settings=replace(SETTINGS, max_strangers=3)), contextlib.AsyncExitStack() as routers:
            for _ in range(5):
                await routers.enter_async_context(raw_router(port))
            strangers = [await asyncio.open_connection("127.0.0.1", port) for _ in range(10)]
            cut = [asyncio.create_task(end_of(reader)) for reader, _ in strangers]
            for first in itertools.islice(asyncio.as_completed(cut), 7):
                await first
            await logged(caplog, "3 connections have not said hello")
            assert sum(task.done() for task in cut) == 7
            for _, writer in strangers:
                writer.close()
            await asyncio.wait(cut)
            async with raw_router(port):
                assert node.downs == 0

    run(scenario())
    assert len([record for record in caplog.records if "have not said hello" in record.getMessage()]) == 1


@pytest.mark.parametrize("run_loop", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_those_in_their_tls_handshake_are_strangers_too(
    free_port: Callable[[], int], tmp_path: Path, caplog: pytest.LogCaptureFixture, run_loop: Callable[..., None]
) -> None:
    made = make_certificates(tmp_path)

    async def scenario() -> None:
        port, node, router = free_port(), End(), End()
        accepting = replace(over_tls(made, "p0"), max_strangers=3, hello_timeout_s=60.0)
        async with asyncio.timeout(20), serving(port, node, settings=accepting) as server:
            async with dialling(port, End(), settings=over_tls(made, "router")):
                await node.up.get()
                strangers = [await asyncio.open_connection("127.0.0.1", port) for _ in range(10)]
                cut = [asyncio.create_task(end_of(reader)) for reader, _ in strangers]
                for first in itertools.islice(asyncio.as_completed(cut), 7):
                    await first
                await logged(caplog, "3 connections have not said hello")
                assert (sum(task.done() for task in cut), len(server._strangers), node.downs) == (7, 3, 0)
                for _, writer in strangers:
                    writer.write(b"no TLS at all\r\n\r\n")
                await asyncio.wait(cut)
                assert len(server._strangers) == 0
                for _, writer in strangers:
                    writer.close()
            async with dialling(port, router, settings=over_tls(made, "router")):
                await router.up.get()

    run_loop(scenario())


def test_a_tls_handshake_that_is_left_counts_no_longer_than_it_might_take(free_port: Callable[[], int], tmp_path: Path) -> None:
    made = make_certificates(tmp_path)

    async def scenario() -> None:
        port = free_port()
        async with serving(port, End(), settings=replace(over_tls(made, "p0"), hello_timeout_s=0.2)) as server:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            while len(server._strangers) == 0:  # noqa: ASYNC110  the server has no event for it
                await asyncio.sleep(0)
            writer.transport.abort()
            while len(server._strangers) > 0:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    run(scenario())
