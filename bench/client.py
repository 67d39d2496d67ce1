"""One streamed request to an OpenAI endpoint, with the time of every event. Lean, so that the client is not what is measured.

Runs on the caller's asyncio loop: a protocol of its own per request, one decode of a few fields per event.
"""

import asyncio
import time
from typing import cast
from urllib.parse import urlsplit

import httptools
import msgspec


class Target(msgspec.Struct, frozen=True):
    """Where requests go."""

    host: str
    port: int
    path: str
    headers: dict[str, str]

    @classmethod
    def of(cls, url: str, path: str, api_key: str | None) -> "Target":
        """`url` as the `openai` client takes it, with or without `/v1`. Raises ValueError for other than http."""
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"{url!r} is not an http:// address")
        base = parts.path.rstrip("/").removesuffix("/v1")
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        return cls(parts.hostname, parts.port or 80, f"{base}/v1/{path}", headers)

    def request(self, body: bytes) -> bytes:
        """The bytes of one POST, on a connection of its own."""
        fields = {
            "host": f"{self.host}:{self.port}",
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            **self.headers,
        }
        lines = [f"POST {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        return "\r\n".join([*lines, "", ""]).encode() + body


class Outcome(msgspec.Struct, kw_only=True):
    """What came of one request. Times are seconds of `time.perf_counter`."""

    due_s: float
    """When it should have been sent."""
    sent_s: float = 0.0
    """When its connection was begun."""
    event_s: list[float] = []
    """Of every event that brought output."""
    ended_s: float = 0.0
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    """As the server counts them; None if it does not say."""
    error: str | None = None
    request_id: str | None = None
    """What the reply's `x-request-id` says."""

    @property
    def num_tokens(self) -> int:
        return len(self.event_s) if self.output_tokens is None else self.output_tokens

    @property
    def ttft_s(self) -> float:
        return self.event_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None if there was no other."""
        return (self.event_s[-1] - self.event_s[0]) / (self.num_tokens - 1) if self.num_tokens > 1 else None

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in zip(self.event_s, self.event_s[1:], strict=False)]


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    @property
    def is_output(self) -> bool:
        """It bears text, or stands for a token without any: part of a character. Openings and closings do not count."""
        if self.delta is not None:
            return bool(self.delta.content)
        return bool(self.text) or (self.text is not None and self.finish_reason is None)


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw | None = None


_decode = msgspec.json.Decoder(_Event).decode


async def fetch(target: Target, body: bytes, due_s: float, timeout_s: float) -> Outcome:
    """Send one request and read its stream to the end. Never raises for what the server does: see `Outcome.error`."""
    outcome = Outcome(due_s=due_s)
    loop = asyncio.get_running_loop()
    outcome.sent_s = time.perf_counter()
    transport: asyncio.BaseTransport | None = None
    try:
        async with asyncio.timeout(timeout_s):
            transport, stream = await loop.create_connection(lambda: _Stream(outcome, target.request(body)), target.host, target.port)
            await stream.ended
    except TimeoutError:
        outcome.error = f"no end within {timeout_s:g} s"
    except (OSError, httptools.HttpParserError, msgspec.MsgspecError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    finally:
        if transport is not None:
            transport.close()
    outcome.ended_s = time.perf_counter()
    if outcome.error is None and not outcome.event_s:
        outcome.error = "no output"
    return outcome


class _Stream(asyncio.Protocol):
    """Reads one reply. httptools calls the `on_…` methods from within `data_received`."""

    def __init__(self, outcome: Outcome, request: bytes) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._outcome = outcome
        self._request = request
        self._parser = httptools.HttpResponseParser(self)
        self._rest = b""
        self._now_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.WriteTransport, transport).write(self._request)  # uvloop's are not derived from asyncio's

    def data_received(self, data: bytes) -> None:
        self._now_s = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, msgspec.MsgspecError) as error:
            self._end(error)

    def connection_lost(self, error: Exception | None) -> None:
        self._end(error or ConnectionError("the connection was closed before the end"))

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-request-id":
            self._outcome.request_id = value.decode()

    def on_body(self, body: bytes) -> None:
        if b"\r" in body:
            body = body.replace(b"\r\n", b"\n")
        *events, self._rest = (self._rest + body).split(b"\n\n")
        if self._parser.get_status_code() == 200:
            for event in events:
                self._hear(event)

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status != 200:
            self._outcome.error = f"HTTP {status}: {self._rest[:300].decode(errors='replace')}"
        self._end(None)

    def _hear(self, event: bytes) -> None:
        if not event.startswith(b"data:") or event.endswith(b"[DONE]"):
            return
        said = _decode(event[5:])
        if said.error is not None:
            self._outcome.error = bytes(said.error).decode(errors="replace")
        if said.usage is not None:
            self._outcome.prompt_tokens, self._outcome.output_tokens = said.usage.prompt_tokens, said.usage.completion_tokens
        if any(choice.is_output for choice in said.choices):
            self._outcome.event_s.append(self._now_s)

    def _end(self, error: BaseException | None) -> None:
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)
