"""A backend that says what a test scripts, and a client that talks to the app without a socket."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

import disaggd.model
from disaggd.gateway.app import create_app
from disaggd.gateway.backend import Delta, Deltas, GenerationRequest
from disaggd.gateway.limits import GatewayLimits
from disaggd.gateway.tokenizer import Tokenizer, read_tokenizer
from disaggd.observe.metrics import Metrics
from disaggd.observe.receipts import CachedTokens, Receipt

VOCAB_SIZE = 4096

Script = Callable[[GenerationRequest], AsyncGenerator[Delta, None]]


async def echo(request: GenerationRequest) -> AsyncGenerator[Delta, None]:
    """The prompt again, a token at a time, as far as `max_tokens` allows."""
    tokens = request.tokens[: request.sampling.max_tokens]
    for token in tokens[:-1]:
        yield Delta((token,))
    yield Delta((tokens[-1],), finish_reason="length")


class ScriptedBackend:
    """Plays `script` for every request, and remembers what it was asked."""

    model_name = "tiny"
    max_model_len = 256
    vocab_size = VOCAB_SIZE

    def __init__(self) -> None:
        self.script: Script = echo
        self.requests: list[GenerationRequest] = []
        self.events: list[str] = []
        self.trouble: str | None = None

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Deltas, None]:
        self.requests.append(request)
        try:
            async for delta in self.script(request):
                yield [delta]
        except (GeneratorExit, asyncio.CancelledError):
            self.events.append(f"aborted {request.id}")
            raise

    def stopped(self, request: GenerationRequest) -> None:
        self.events.append(f"stopped {request.id}")

    def cut(self, request: GenerationRequest, why: str) -> None:
        self.events.append(f"cut {request.id}: {why}")

    def why_not_ready(self) -> str | None:
        return self.trouble

    async def blocks(self) -> dict[str, object]:
        return {"nodes": [{"name": "d0", "state": "answered"}], "blocks": []}

    async def check(self) -> dict[str, object]:
        return {"ok": True, "ways": []}

    def cluster(self) -> dict[str, object]:
        return {"nodes": [{"name": "d0", "role": "decode"}]}

    def receipt(self, request_id: str, key: str | None) -> Receipt | None:
        found = [request for request in self.requests if request.id == request_id and key in (None, request.key)]
        if not found:
            return None
        return Receipt(
            id=request_id,
            key=found[-1].key,
            model=self.model_name,
            decision="remote",
            reason="threshold",
            prefill_node="p0",
            decode_node="d0",
            prompt_tokens=5,
            cached_tokens=CachedTokens(decode=0, prefill=3),
            kv_bytes=12_600_000,
        )

    def receipts(self, limit: int, key: str | None) -> list[Receipt]:
        found = (self.receipt(request.id, key) for request in reversed(self.requests))
        return [receipt for receipt in found if receipt is not None][:limit]

    def trace(self, seconds: float | None) -> Iterator[bytes]:
        yield b'{"traceEvents": ['
        yield b"null" if seconds is None else str(seconds).encode()
        yield b"]}"


class Caller:
    """Requests over ASGI, each in an event loop of its own."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def __call__(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
                return await client.request(method, path, **options)

        return asyncio.run(call())

    def complete(self, prompt: object, **fields: Any) -> httpx.Response:
        return self("POST", "/v1/completions", json={"prompt": prompt, **fields})

    def chat(self, content: object, **fields: Any) -> httpx.Response:
        return self("POST", "/v1/chat/completions", json={"messages": [{"role": "user", "content": content}], **fields})


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return read_tokenizer(Path(disaggd.model.__file__).parent / "builtin" / "tiny", VOCAB_SIZE)


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def call(backend: ScriptedBackend, tokenizer: Tokenizer, registry: CollectorRegistry) -> Iterator[Caller]:
    limits = GatewayLimits(max_body_bytes=200_000, max_prompts=4)
    yield Caller(create_app(backend, tokenizer, Metrics(registry), limits))
