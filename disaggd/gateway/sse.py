"""Server-sent events over one ASGI response. The response starts with the first event, so an error before it has a status."""

import asyncio
from collections.abc import Sequence

import msgspec
from starlette.types import Send

from disaggd.errors import RequestError
from disaggd.gateway.choice import Said
from disaggd.gateway.errors import error_object
from disaggd.gateway.generation import Usage
from disaggd.gateway.replies import DONE, Reply

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]


class EventStream:
    """An event per Delta, a send for those that came together: the system call is half of what an event costs.

    Several choices may share a stream: each event says which choice it is of.
    """

    def __init__(self, send: Send, reply: Reply, headers: dict[str, str]) -> None:
        self._send = send
        self._reply = reply
        self._headers = [*_HEADERS, *((name.encode(), value.encode()) for name, value in headers.items())]
        self._opened: set[int] = set()
        self._opening = asyncio.Lock()  # the first send may wait, and no other choice may overtake it
        self.started = False
        """The status line has gone out: from now on an error is an event."""

    async def add(self, index: int, said: Sequence[Said]) -> None:
        """Send what some Deltas said; waits while the client reads more slowly than the cluster writes."""
        events = b"".join([self._reply.event(index, one) for one in said])
        if index not in self._opened:
            events = await self._open(index) + events
        await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def done(self, usage: Usage | None) -> None:
        """End the stream well."""
        last = self._reply.usage_event(usage) if usage else b""
        await self._send({"type": "http.response.body", "body": last + DONE, "more_body": False})

    async def fail(self, error: RequestError) -> None:
        """End the stream with an error object, and no `[DONE]`."""
        event = b"data: " + msgspec.json.encode(error_object(error)) + b"\n\n"
        await self._send({"type": "http.response.body", "body": event, "more_body": False})

    async def _open(self, index: int) -> bytes:
        async with self._opening:
            if not self.started:
                await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})
                self.started = True
        self._opened.add(index)
        return self._reply.opening(index)
