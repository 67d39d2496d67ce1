"""The two endpoints that generate text, and the walk of one request: body → prompts → sequences → reply.

Runs on the asyncio thread; only long texts are tokenized in a worker thread. Talks to the cluster through `Backend`.
"""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from disaggd.errors import ContextTooLong, InvalidRequest, RequestError
from disaggd.gateway.access import Access
from disaggd.gateway.backend import Backend, GenerationRequest
from disaggd.gateway.choice import Choice, Transcript
from disaggd.gateway.connection import read_object, while_connected
from disaggd.gateway.generation import Generation
from disaggd.gateway.headers import Call, read_headers
from disaggd.gateway.limits import GatewayLimits
from disaggd.gateway.openai import Options, read_chat, read_completion
from disaggd.gateway.replies import CHAT, COMPLETION, Format, Reply
from disaggd.gateway.sse import EventStream
from disaggd.gateway.tokenizer import Tokenizer
from disaggd.observe.metrics import Metrics
from disaggd.sampling import SamplingParams

_INLINE_CHARS = 4096
"""Longer texts are tokenized in a thread: 4,096 characters take about a millisecond."""

Tokens = list[int]

BodyReader = Callable[[dict[str, Any]], Awaitable[tuple[Options, list[Tokens]]]]
"""A body's options, and the tokens of each prompt."""


class TextEndpoints:
    """`/v1/completions` and `/v1/chat/completions` as ASGI applications."""

    def __init__(self, backend: Backend, tokenizer: Tokenizer, metrics: Metrics, limits: GatewayLimits, access: Access) -> None:
        self._backend = backend
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._limits = limits
        self._access = access

    async def completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._serve(scope, receive, send, COMPLETION, self._read_completion)

    async def chat_completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._serve(scope, receive, send, CHAT, self._read_chat)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, form: Format, read: BodyReader) -> None:
        """Raises RequestError until the reply has begun, and ClientGone when nobody waits for it."""
        request = Request(scope, receive)
        with self._metrics.open_request():
            call = read_headers(request, form.id_prefix)
            body = await read_object(request, self._limits.max_body_bytes)
            await while_connected(receive, self._answer(request, call, form, read, body, send))

    async def _read_completion(self, body: dict[str, Any]) -> tuple[Options, list[Tokens]]:
        asked = read_completion(body, self._backend.model_name, self._backend.vocab_size, self._limits)
        return asked.options, [
            await self._encode(prompt, asked.add_special_tokens) if isinstance(prompt, str) else prompt for prompt in asked.prompts
        ]

    async def _read_chat(self, body: dict[str, Any]) -> tuple[Options, list[Tokens]]:
        asked = read_chat(body, self._backend.model_name, self._backend.vocab_size)
        template = self._tokenizer.chat_template
        if template is None:
            raise InvalidRequest(f"model {self._backend.model_name!r} has no chat template; use /v1/completions", param="messages")
        text = template.render(asked.messages, asked.template_variables)
        return asked.options, [await self._encode(text, add_special_tokens=False)]

    async def _encode(self, text: str, add_special_tokens: bool) -> Tokens:
        least = self._tokenizer.least_tokens(text)
        if least > self._backend.max_model_len:  # megabytes that cannot fit would keep a core busy for seconds
            raise ContextTooLong(least, self._backend.max_model_len)
        if len(text) <= _INLINE_CHARS:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens=add_special_tokens)

    async def _answer(self, request: Request, call: Call, form: Format, read: BodyReader, body: dict[str, Any], send: Send) -> None:
        options, prompts = await read(body)
        model = self._backend.model_name
        generation = Generation(self._backend, self._metrics, call.arrived_s, self._sequences(call, options, prompts))
        request.state.on_cut = generation.cut
        reply = Reply(form, self._tokenizer, call.id, model, int(time.time()), usage_follows=options.include_usage)
        num_reserved = sum(len(tokens) + (options.max_tokens or 0) for tokens in prompts)
        with self._access.reserved(call.client, len(prompts), num_reserved, generation.num_tokens):
            if options.stream:
                await _stream(generation, EventStream(send, reply, {"x-request-id": call.id}), with_usage=options.include_usage)
            else:
                await _send_whole(generation, reply, call.id, send)

    def _sequences(self, call: Call, options: Options, prompts: list[Tokens]) -> list[tuple[GenerationRequest, Choice]]:
        """One for each prompt; the first has the call's own id."""
        return [
            (
                GenerationRequest(
                    id=f"{call.id}:{index}" if index else call.id,
                    tokens=tokens,
                    sampling=_settle(options, len(tokens), self._backend.max_model_len),
                    policy=call.policy,
                    cache_salt=call.client.salt(options.cache_salt),
                    priority=options.priority,
                    session=call.session,
                    key=call.client.name,
                ),
                Choice(index, self._tokenizer.detokenizer(tokens), options.stop),
            )
            for index, tokens in enumerate(prompts)
        ]


async def _stream(generation: Generation, stream: EventStream, *, with_usage: bool) -> None:
    try:
        await generation.run(stream.add)
    except RequestError as error:
        if not stream.started:
            raise
        await stream.fail(error)
    else:
        await stream.done(generation.usage() if with_usage else None)


async def _send_whole(generation: Generation, reply: Reply, request_id: str, send: Send) -> None:
    transcript = Transcript(len(generation))
    await generation.run(transcript.add)
    body = reply.whole(transcript.whole(), generation.usage())
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", request_id.encode()),
        *((b"x-disaggd", receipt.header().encode("ascii", "replace")) for receipt in generation.receipts()[:1]),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _settle(options: Options, num_prompt_tokens: int, limit: int) -> SamplingParams:
    """The sampling of one prompt: a limit that fits the context, and a seed."""
    if not num_prompt_tokens:
        raise InvalidRequest("prompt: must not be empty", param="prompt")
    if num_prompt_tokens > limit:
        raise ContextTooLong(num_prompt_tokens, limit)
    room = limit - num_prompt_tokens
    max_tokens = options.max_tokens or max(1, min(room, options.default_max_tokens or room))
    if max_tokens > room:
        raise InvalidRequest(
            f"the prompt has {num_prompt_tokens} tokens and max_tokens asks for {max_tokens} more, but the model's context holds {limit}",
            param="max_tokens",
            code="context_length_exceeded",
        )
    seed = options.sampling.seed if options.seeded else secrets.randbits(64)
    return msgspec.structs.replace(options.sampling, max_tokens=max_tokens, seed=seed)
