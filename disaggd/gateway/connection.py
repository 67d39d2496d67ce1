"""One HTTP exchange: its body within bounds, its client's going noticed. Knows nothing of what is asked."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.types import Receive

from disaggd.errors import BodyTooLarge, InvalidRequest

Result = TypeVar("Result")


class ClientGone(Exception):
    """Nobody waits for the reply any more."""


async def read_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """The body as a JSON object. Raises BodyTooLarge before more than `max_bytes` are held, or InvalidRequest."""
    body = await _read(request, max_bytes)
    try:
        value = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {type(value).__name__}")
    return value


async def _read(request: Request, max_bytes: int) -> bytearray:
    """Refused by its Content-Length if it has one, else as soon as too much has come."""
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise BodyTooLarge(f"the body has {declared} bytes, but at most {max_bytes} are allowed")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise BodyTooLarge(f"the body has more than the {max_bytes} bytes allowed")
    return body


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`. When the client goes first, `work` is cancelled, has unwound, and ClientGone is raised.

    Only after the whole body was read: from then on `receive` has nothing to say but that the client went.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        await _end(working)
        await _end(watching)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(task: asyncio.Future[Any]) -> None:
    """Cancel a task and see it through; how it ended is looked at elsewhere, or no longer matters."""
    task.cancel()
    await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()
