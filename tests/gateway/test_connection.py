"""What the gateway does when its client goes: everything it began is over before the exchange is."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest

from disaggd.gateway.backend import Delta, GenerationRequest
from disaggd.gateway.connection import ClientGone, while_connected

BODY = {"type": "http.request", "body": b"", "more_body": False}
GONE = {"type": "http.disconnect"}


async def exchange(app: Any, body: object, leave: asyncio.Event, *, cut_body: bool = False) -> list[Any]:
    """One POST to /v1/completions whose client goes once `leave` is set; what the app sent until then."""
    sent: list[Any] = []
    incoming = [{"type": "http.request", "body": msgspec.json.encode(body), "more_body": cut_body}]

    async def receive() -> Any:
        if incoming:
            return incoming.pop()
        await leave.wait()
        return GONE

    async def send(message: Any) -> None:
        sent.append(message)

    path = "/v1/completions"
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "headers": []}
    await app(scope, receive, send)
    return sent


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_while_waiting_aborts_its_sequences(call: Any, backend: Any, registry: Any, stream: bool) -> None:
    async def run() -> list[Any]:
        leave, waiting = asyncio.Event(), []

        async def script(request: GenerationRequest) -> AsyncGenerator[Delta, None]:
            waiting.append(request.id)
            if len(waiting) == 2:
                leave.set()
            await asyncio.Event().wait()
            yield Delta((1,))

        backend.script = script
        return await exchange(call.app, {"prompt": ["a", "b"], "stream": stream}, leave)

    assert asyncio.run(run()) == []
    assert len(backend.events) == 2
    assert registry.get_sample_value("disaggd_http_requests_total", {"route": "/v1/completions", "status": "499"}) == 1
    assert registry.get_sample_value("disaggd_open_requests") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_in_the_middle_aborts_its_sequence(call: Any, backend: Any, stream: bool) -> None:
    async def run() -> list[Any]:
        leave = asyncio.Event()

        async def script(request: GenerationRequest) -> AsyncGenerator[Delta, None]:
            yield Delta((50,))
            yield Delta((51,))
            leave.set()
            await asyncio.Event().wait()

        backend.script = script
        return await exchange(call.app, {"prompt": "a", "stream": stream}, leave)

    sent = asyncio.run(run())
    assert len(sent) == (3 if stream else 0)
    assert len(backend.events) == 1


def test_a_client_that_goes_before_its_body_is_whole_starts_nothing(call: Any, backend: Any) -> None:
    async def run() -> list[Any]:
        leave = asyncio.Event()
        leave.set()
        return await exchange(call.app, {"prompt": "a"}, leave, cut_body=True)

    assert asyncio.run(run()) == []
    assert backend.requests == []


def test_the_work_has_unwound_when_the_client_is_declared_gone() -> None:
    log: list[str] = []

    async def receive() -> Any:
        return GONE

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(5):
                await asyncio.sleep(0)
            log.append("unwound")

    async def run() -> None:
        with pytest.raises(ClientGone):
            await while_connected(receive, work())

    asyncio.run(run())
    assert log == ["unwound"]


def test_the_result_is_passed_on_and_the_watch_ends() -> None:
    async def receive() -> Any:
        await asyncio.Event().wait()

    async def work() -> int:
        await asyncio.sleep(0)
        return 5

    async def run() -> tuple[int, int]:
        return await while_connected(receive, work()), len(asyncio.all_tasks())

    assert asyncio.run(run()) == (5, 1)


def test_an_error_of_the_work_is_passed_on() -> None:
    async def receive() -> Any:
        await asyncio.Event().wait()

    async def work() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        asyncio.run(while_connected(receive, work()))
