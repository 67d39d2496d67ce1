"""The stock `openai` client against the gateway on a real uvicorn on loopback."""

import asyncio
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
import uvicorn
from prometheus_client import CollectorRegistry

from disaggd.api_keys import key_table, new_key, parse_keys
from disaggd.gateway.access import Access
from disaggd.gateway.app import create_app
from disaggd.gateway.backend import Delta, GenerationRequest
from disaggd.gateway.limits import GatewayLimits
from disaggd.observe.metrics import Metrics


@asynccontextmanager
async def served(app: Any) -> AsyncGenerator[openai.AsyncOpenAI, None]:
    """A client of `app`; the socket listens before the server starts, so nothing has to be waited for."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        config = uvicorn.Config(app, log_config=None, lifespan="off", ws="none")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            yield client
        server.should_exit = True
        await serving


@pytest.fixture
def drive(call: Any) -> Callable[[Callable[[openai.AsyncOpenAI], Awaitable[Any]]], Any]:
    def run(conversation: Callable[[openai.AsyncOpenAI], Awaitable[Any]]) -> Any:
        async def serve_and_run() -> Any:
            async with served(call.app) as client:
                return await conversation(client)

        return asyncio.run(serve_and_run())

    return run


def test_completions(drive: Any) -> None:
    async def talk(client: openai.AsyncOpenAI) -> Any:
        return await client.completions.create(
            model="tiny", prompt="def größer():", max_tokens=50, extra_body={"top_k": 5, "ignore_eos": True}
        )

    completion = drive(talk)
    assert completion.choices[0].text == "def größer():"
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.prompt_tokens == completion.usage.completion_tokens


def test_streamed_completions(drive: Any) -> None:
    async def talk(client: openai.AsyncOpenAI) -> Any:
        stream = await client.completions.create(
            model="tiny", prompt="def größer():", max_tokens=50, stream=True, stream_options={"include_usage": True}
        )
        return [chunk async for chunk in stream]

    *chunks, last = drive(talk)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "def größer():"
    assert last.usage.completion_tokens == len(chunks)


def test_chat(drive: Any) -> None:
    async def talk(client: openai.AsyncOpenAI) -> Any:
        return await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], max_completion_tokens=100)

    assert drive(talk).choices[0].message.content == "user\nhi\nassistant\n"


def test_streamed_chat(drive: Any) -> None:
    async def talk(client: openai.AsyncOpenAI) -> Any:
        messages: Any = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
        stream = await client.chat.completions.create(model="tiny", messages=messages, stream=True)
        return [chunk async for chunk in stream]

    first, *chunks = drive(talk)
    assert first.choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == "user\nhi\nassistant\n"
    assert chunks[-1].choices[0].finish_reason == "length"


def test_models_and_errors(drive: Any) -> None:
    async def talk(client: openai.AsyncOpenAI) -> Any:
        models = [model.id async for model in client.models.list()]
        with pytest.raises(openai.BadRequestError) as bad:
            await client.completions.create(model="tiny", prompt="x", temperature=3)
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="huge", prompt="x")
        return models, bad.value.param

    assert drive(talk) == (["tiny"], "temperature")


def test_a_failure_in_mid_stream_is_raised_by_the_client(drive: Any, backend: Any) -> None:
    async def breaking(request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        yield Delta((50,))
        yield Delta((), finish_reason="error")

    backend.script = breaking

    async def talk(client: openai.AsyncOpenAI) -> Any:
        stream = await client.completions.create(model="tiny", prompt="x", stream=True)
        return [chunk async for chunk in stream]

    with pytest.raises(openai.APIError, match="gave the sequence up"):
        drive(talk)


def test_a_client_that_hangs_up_aborts_its_sequence(drive: Any, backend: Any) -> None:
    aborted = asyncio.Event()

    async def endless(request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        try:
            yield Delta((50,))
            await asyncio.Event().wait()
        finally:
            aborted.set()

    backend.script = endless

    async def talk(client: openai.AsyncOpenAI) -> Any:
        stream = await client.completions.create(model="tiny", prompt="x", stream=True)
        await anext(aiter(stream))
        await stream.close()
        await asyncio.wait_for(aborted.wait(), timeout=5)

    drive(talk)
    assert len(backend.events) == 1


def test_a_key_and_its_limits_are_the_clients_own_exceptions(backend: Any, tokenizer: Any) -> None:
    key = new_key()
    metrics = Metrics(CollectorRegistry())
    access = Access(metrics, parse_keys(key_table("alice", key) + "tokens_per_minute = 10\n"))
    app = create_app(backend, tokenizer, metrics, GatewayLimits(), access)

    async def talk() -> None:
        async with served(app) as stranger:
            with pytest.raises(openai.AuthenticationError) as refused:
                await stranger.models.list()
            assert refused.value.code == "invalid_api_key"
            alice = stranger.with_options(api_key=key)
            assert [model.id for model in (await alice.models.list()).data] == ["tiny"]
            await alice.completions.create(model="tiny", prompt="def größer():", max_tokens=8)
            with pytest.raises(openai.RateLimitError) as limited:
                await alice.completions.create(model="tiny", prompt="def größer():", max_tokens=8)
            assert int(limited.value.response.headers["retry-after"]) > 0
            with pytest.raises(openai.PermissionDeniedError):
                await alice.get("/cluster", cast_to=object)

    asyncio.run(talk())
