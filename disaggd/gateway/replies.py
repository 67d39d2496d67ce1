"""What choices said → OpenAI's JSON, whole or as server-sent events. Pure; knows nothing of sending.

`/v1/completions` and `/v1/chat/completions` differ by a `Format`, a row of data. An event of plain text is two constant
halves around one JSON string, because a router writes tens of thousands of them per second.
"""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from disaggd.gateway.choice import LoggedToken, Said
from disaggd.gateway.generation import Usage
from disaggd.gateway.tokenizer import Tokenizer

_encode = msgspec.json.encode

DONE = b"data: [DONE]\n\n"


class Format(msgspec.Struct, frozen=True, kw_only=True):
    """How one endpoint spells its replies."""

    id_prefix: str
    whole_object: str
    chunk_object: str
    opening: bytes | None
    """The members of a choice's first event, before it has said anything."""
    before_text: bytes
    after_text: bytes
    whole_text: Callable[[str], dict[str, object]]
    logprobs: Callable[[Sequence[LoggedToken], Tokenizer], dict[str, object]]


class Reply:
    """The envelope of one request's reply, or of all its events. `created` is in Unix seconds."""

    def __init__(self, form: Format, tokenizer: Tokenizer, request_id: str, model: str, created: int, *, usage_follows: bool) -> None:
        self._form = form
        self._tokenizer = tokenizer
        self._envelope = {"id": request_id, "created": created, "model": model}
        chunk = _encode({**self._envelope, "object": form.chunk_object})
        self._head = b"data: " + chunk[:-1] + b',"choices":[{"index":'
        self._tail = b'}],"usage":null}\n\n' if usage_follows else b"}]}\n\n"
        self._plain_end = form.after_text + b',"logprobs":null,"finish_reason":null' + self._tail
        self._starts: dict[int, bytes] = {}

    def opening(self, index: int) -> bytes:
        """The events that precede a choice's first text."""
        if self._form.opening is None:
            return b""
        return self._head + b"%d," % index + self._form.opening + self._tail

    def event(self, index: int, said: Said) -> bytes:
        """What one Delta said."""
        start = self._starts.get(index) or self._start(index)
        if said.finish_reason is None and said.logged is None:
            return start + _encode(said.text) + self._plain_end
        logprobs = _encode(self._logprobs(said))
        finish = _encode(said.finish_reason)
        end = self._form.after_text + b',"logprobs":' + logprobs + b',"finish_reason":' + finish + self._tail
        return start + _encode(said.text) + end

    def usage_event(self, usage: Usage) -> bytes:
        """The last event before `[DONE]` when the client asked for usage."""
        return b"data: " + _encode({**self._envelope, "object": self._form.chunk_object, "choices": [], "usage": _usage(usage)}) + b"\n\n"

    def whole(self, choices: Sequence[Said], usage: Usage) -> bytes:
        """The body of a reply that is not streamed."""
        listed = [
            {
                "index": index,
                **self._form.whole_text(said.text),
                "logprobs": self._logprobs(said),
                "finish_reason": said.finish_reason,
            }
            for index, said in enumerate(choices)
        ]
        return _encode({**self._envelope, "object": self._form.whole_object, "choices": listed, "usage": _usage(usage)})

    def _start(self, index: int) -> bytes:
        start = self._starts[index] = self._head + b"%d," % index + self._form.before_text
        return start

    def _logprobs(self, said: Said) -> dict[str, object] | None:
        return None if said.logged is None else self._form.logprobs(said.logged, self._tokenizer)


def _usage(usage: Usage) -> dict[str, object]:
    details = {} if usage.cached_tokens is None else {"prompt_tokens_details": {"cached_tokens": usage.cached_tokens}}
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        **details,
    }


def _label(raw: bytes) -> str:
    """A token's text; part of a character is spelt `bytes:\\xe2\\x82`, as OpenAI does, so that no two tokens look alike."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    """JSON knows no infinity, and clients want a number: OpenAI's own stand-in for a probability of zero."""
    return max(logprob, -9999.0)


def _completion_logprobs(logged: Sequence[LoggedToken], tokenizer: Tokenizer) -> dict[str, object]:
    """Parallel lists; the chosen token is always among its likeliest."""

    def label(token: int) -> str:
        return _label(tokenizer.token_bytes(token))

    return {
        "tokens": [label(one.token) for one in logged],
        "token_logprobs": [_finite(one.logprob.logprob) for one in logged],
        "top_logprobs": [
            {label(token): _finite(logprob) for token, logprob in (*one.logprob.top, (one.token, one.logprob.logprob))} for one in logged
        ],
        "text_offset": [one.offset for one in logged],
    }


def _chat_logprobs(logged: Sequence[LoggedToken], tokenizer: Tokenizer) -> dict[str, object]:
    """A list of objects, each token with its bytes."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token)
        return {"token": _label(raw), "logprob": _finite(logprob), "bytes": list(raw)}

    return {
        "content": [
            {**entry(one.token, one.logprob.logprob), "top_logprobs": [entry(token, logprob) for token, logprob in one.logprob.top]}
            for one in logged
        ],
        "refusal": None,
    }


COMPLETION = Format(
    id_prefix="cmpl-",
    whole_object="text_completion",
    chunk_object="text_completion",
    opening=None,
    before_text=b'"text":',
    after_text=b"",
    whole_text=lambda text: {"text": text},
    logprobs=_completion_logprobs,
)

CHAT = Format(
    id_prefix="chatcmpl-",
    whole_object="chat.completion",
    chunk_object="chat.completion.chunk",
    opening=b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null',
    before_text=b'"delta":{"content":',
    after_text=b"}",
    whole_text=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    logprobs=_chat_logprobs,
)
