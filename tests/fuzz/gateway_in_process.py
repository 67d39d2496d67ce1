"""The whole HTTP application over ASGI, with and without API keys: whatever is asked, the answer is one that is documented."""

import asyncio
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

import disaggd
from disaggd.api_keys import ApiKey, digest_of
from disaggd.gateway.access import Access
from disaggd.gateway.app import create_app
from disaggd.gateway.limits import GatewayLimits
from disaggd.gateway.tokenizer import Tokenizer, read_tokenizer
from disaggd.observe.metrics import Metrics
from tests.fuzz.http_cases import KEY, Case, Header, cases, good_key
from tests.fuzz.surface import Surface
from tests.gateway.conftest import VOCAB_SIZE, ScriptedBackend

LIMIT_S = 60.0
"""Of one case, on a machine that is very busy."""
DOCUMENTED = {200, 307, 400, 401, 403, 404, 405, 413, 429, 503}
"""What may be answered where the cluster does its part."""
HERE = str(Path(disaggd.__file__).parent.parent).encode()
GOOD = Case("POST", b"/v1/completions", (good_key,), b'{"prompt": "hello", "max_tokens": 2}')


@cache
def tokenizer() -> Tokenizer:
    return read_tokenizer(Path(disaggd.__file__).parent / "model" / "builtin" / "tiny", VOCAB_SIZE)


class Watched(ScriptedBackend):
    """Counts the sequences that run."""

    num_open = 0

    async def generate(self, request: Any) -> Any:
        self.num_open += 1
        try:
            async for deltas in super().generate(request):
                yield deltas
        finally:
            self.num_open -= 1


def make_app(backend: ScriptedBackend, *, has_keys: bool) -> Starlette:
    metrics = Metrics(CollectorRegistry())
    keys = (ApiKey(name="admin", hash="sha256:" + digest_of(KEY).hex(), admin=True, max_requests=4, tokens_per_minute=10**6),)
    limits = GatewayLimits(max_body_bytes=200_000, max_prompts=4)
    return create_app(backend, tokenizer(), metrics, limits, Access(metrics, keys if has_keys else None))


class Answer:
    """What an application sent."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.headers: Sequence[Header] = ()
        self.body = b""
        self.is_whole = False

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            assert self.status is None
            self.status, self.headers = message["status"], message["headers"]
        else:
            assert self.status is not None and not self.is_whole
            self.body += message.get("body", b"")
            self.is_whole = not message.get("more_body", False)


async def ask(app: Starlette, case: Case) -> Answer:
    path, _, query = case.target.partition(b"?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": case.method,
        "scheme": "http",
        "path": unquote(path.decode("ascii")),
        "raw_path": path,
        "root_path": "",
        "query_string": query,
        "headers": [*case.headers, (b"content-length", b"%d" % len(case.body))],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    incoming = [{"type": "http.request", "body": case.body, "more_body": False}]
    answer, gone = Answer(), asyncio.Event()

    async def receive() -> Any:
        if incoming:
            return incoming.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async with asyncio.timeout(LIMIT_S):
        await app(scope, receive, answer.send)
    return answer


def check_answer(case: Case, status: int, headers: Sequence[Header], body: bytes) -> None:
    """Documented, an error object if it is an error, and no word of how we are made."""
    assert status in DOCUMENTED, (status, body[:500])
    assert not any(b"\r" in part or b"\n" in part for header in headers for part in header)
    assert b"Traceback (most recent call last)" not in body and HERE not in body
    if status >= 400 and case.method != "HEAD":
        error = json.loads(body)
        assert set(error) == {"error"} and set(error["error"]) == {"message", "type", "param", "code"}
        assert isinstance(error["error"]["message"], str) and isinstance(error["error"]["type"], str)


def check(asked: tuple[bool, Case]) -> None:
    """Afterwards no sequence runs, and a good request is answered."""
    has_keys, case = asked
    backend = Watched()
    app = make_app(backend, has_keys=has_keys)

    async def scenario() -> None:
        answer = await ask(app, case)
        assert answer.status is not None and answer.is_whole
        check_answer(case, answer.status, answer.headers, answer.body)
        assert backend.num_open == 0
        good = await ask(app, GOOD)
        assert good.status == 200 and json.loads(good.body)["usage"]["completion_tokens"] == 2
        assert not asyncio.all_tasks() - {asyncio.current_task()}

    asyncio.run(scenario())


GATEWAY = Surface("HTTP requests, in process", st.tuples(st.booleans(), cases()), check, quick=400, share=0.3)
