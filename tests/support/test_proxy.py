"""A proxied link does what it is told: passes, stalls, resets, lags; and the end of either side is the other's."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from tests.support.clusters import free_port
from tests.support.proxy import GOOD, Condition, LinkProxy

DEADLINE_S = 20.0

Pair = tuple[LinkProxy, int]


@contextlib.asynccontextmanager
async def echo() -> AsyncIterator[Pair]:
    """A proxy in front of a server that says everything again, and the proxy's port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1000):
                writer.write(data)
                if data == b"bye":
                    break
        await gone(writer)

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    async def connect() -> socket.socket:
        made = await asyncio.to_thread(socket.create_connection, ("127.0.0.1", port), 5)
        made.setblocking(False)
        return made

    proxy, ours = LinkProxy(connect), free_port()
    await proxy.listen(ours)
    try:
        yield proxy, ours
    finally:
        await proxy.close()
        server.close()
        await server.wait_closed()


async def gone(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


def through(body: Callable[[LinkProxy, int, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> None:
    """Runs `body` with a connection that has said something and been answered."""

    async def run() -> None:
        async with asyncio.timeout(DEADLINE_S), echo() as (proxy, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            await body(proxy, port, reader, writer)
            await gone(writer)

    asyncio.run(run())


def test_the_end_of_one_side_is_the_end_of_the_other_and_its_last_words_arrive() -> None:
    async def body(proxy: LinkProxy, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"bye")
        assert await reader.read(1000) == b"bye"
        assert await reader.read(1000) == b""

    through(body)


def test_a_cut_ends_what_is_there_and_what_comes() -> None:
    async def body(proxy: LinkProxy, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        proxy.set(Condition(is_cut=True))
        assert await reader.read(1) == b""
        later, another = await asyncio.open_connection("127.0.0.1", port)
        assert await later.read(1) == b""
        await gone(another)
        proxy.set(GOOD)
        later, another = await asyncio.open_connection("127.0.0.1", port)
        another.write(b"again")
        assert await later.readexactly(5) == b"again"
        await gone(another)

    through(body)


def test_a_stall_keeps_everything_back_until_it_is_over() -> None:
    async def body(proxy: LinkProxy, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        proxy.set(Condition(is_stalled=True))
        writer.write(b"late")
        reading = asyncio.ensure_future(reader.readexactly(4))
        done, _ = await asyncio.wait([reading], timeout=0.2)
        assert not done
        proxy.set(GOOD)
        assert await reading == b"late"

    through(body)


def test_a_slow_link_lags() -> None:
    async def body(proxy: LinkProxy, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        proxy.set(Condition(delay_s=0.05, bytes_per_s=100.0))
        begun = time.monotonic()
        writer.write(b"ten bytes!")
        assert await reader.readexactly(10) == b"ten bytes!"
        assert time.monotonic() - begun >= 2 * (0.05 + 0.1)

    through(body)


def test_a_node_that_is_not_there_is_a_connection_that_ends() -> None:
    async def refuse() -> socket.socket:
        raise ConnectionRefusedError

    async def run() -> None:
        proxy, port = LinkProxy(refuse), free_port()
        await proxy.listen(port)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await reader.read(1) == b""
        await gone(writer)
        await proxy.close()

    asyncio.run(run())
