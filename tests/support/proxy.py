"""`LinkProxy`: stands between the router and one node, passes bytes on, and does so badly when it is told to.

Runs on the loop that `listen` is called on. Knows nothing of what the bytes mean.
"""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable

import msgspec

CHUNK_BYTES = 65_536

Connect = Callable[[], Awaitable[socket.socket]]
"""A connection to the node; OSError if it cannot be had."""


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """How a link is."""

    is_cut: bool = False
    """Connections end, new ones as well."""
    is_stalled: bool = False
    """Connections stay, and nothing comes through."""
    delay_s: float = 0.0
    """Each chunk is as late as this, each way."""
    bytes_per_s: float | None = None


GOOD = Condition()


class LinkProxy:
    """One port of ours for one node's."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._condition = GOOD
        self._flows = asyncio.Event()
        self._flows.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def listen(self, port: int) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)

    def set(self, condition: Condition) -> None:
        """From now on."""
        self._condition = condition
        if condition.is_stalled:
            self._flows.clear()
        else:
            self._flows.set()
        if condition.is_cut:
            for task in self._tasks:
                task.cancel()

    async def close(self) -> None:
        """Every connection is gone when this returns."""
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*list(self._tasks), return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if not self._condition.is_cut:
                await self._carry(reader, writer)
            await _closed(writer)
        except asyncio.CancelledError:
            writer.transport.abort()  # cut, or closed: this task ends here
        finally:
            self._tasks.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until either end goes; what it said before is passed on."""
        try:
            far_reader, far_writer = await asyncio.open_connection(sock=await self._connect())
        except OSError:
            return
        ways = [asyncio.ensure_future(self._pump(reader, far_writer)), asyncio.ensure_future(self._pump(far_reader, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            await _closed(far_writer)
        except asyncio.CancelledError:
            far_writer.transport.abort()
            raise
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(CHUNK_BYTES):
                await self._pass(len(data))
                writer.write(data)
                await writer.drain()

    async def _pass(self, num_bytes: int) -> None:
        """What a chunk has to wait for."""
        await self._flows.wait()
        condition = self._condition
        wait_s = condition.delay_s + (num_bytes / condition.bytes_per_s if condition.bytes_per_s else 0.0)
        if wait_s:
            await asyncio.sleep(wait_s)
        await self._flows.wait()


async def _closed(writer: asyncio.StreamWriter) -> None:
    """Returns when what was written is on its way and the connection is gone."""
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
