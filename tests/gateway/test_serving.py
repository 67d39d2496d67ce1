"""The two text endpoints over ASGI, against a scripted backend."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest

from disaggd.errors import Overloaded, RequestFailed
from disaggd.gateway.backend import Delta, GenerationRequest
from disaggd.gateway.tokenizer import Tokenizer
from disaggd.sampling import TokenLogprob


def events(response: httpx.Response) -> list[Any]:
    """The JSON of each event; `[DONE]` stays a string."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.removesuffix("\n\n").split("\n\n")
    datas = [block.removeprefix("data: ") for block in blocks]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]


def says(*deltas: Delta) -> Any:
    async def script(request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        for delta in deltas:
            yield delta

    return script


def ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def error(response: httpx.Response) -> Any:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


# ── whole replies ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_whole_completion_has_openais_shape(call: Any) -> None:
    response = call.complete("def f(x):", max_tokens=100)
    body = response.json()
    assert body["object"] == "text_completion"
    assert body["model"] == "tiny"
    assert body["choices"] == [{"index": 0, "text": "def f(x):", "logprobs": None, "finish_reason": "length"}]
    usage = body["usage"]
    assert usage["prompt_tokens"] == usage["completion_tokens"] == usage["total_tokens"] / 2
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3}
    assert response.headers["x-request-id"] == body["id"]
    assert body["id"].startswith("cmpl-")
    assert response.headers["x-disaggd"] == "remote p0->d0 cached=3 kv=12.6MB"


def test_a_whole_chat_reply_has_openais_shape(call: Any) -> None:
    body = call.chat("hi").json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "user\nhi\nassistant\n", "refusal": None}
    assert choice["finish_reason"] == "length"


def test_several_prompts_are_choices_with_ids_of_their_own(call: Any, backend: Any) -> None:
    body = call.complete(["one", "two", "three"], max_tokens=50, seed=5).json()
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(0, "one"), (1, "two"), (2, "three")]
    assert [request.id for request in backend.requests] == [body["id"], f"{body['id']}:1", f"{body['id']}:2"]
    assert {request.sampling.seed for request in backend.requests} == {5}


def test_unseeded_sequences_draw_seeds_of_their_own(call: Any, backend: Any) -> None:
    call.complete(["one", "two"])
    call.complete("three")
    assert len({request.sampling.seed for request in backend.requests}) == 3


def test_token_ids_reach_the_backend_unchanged(call: Any, backend: Any) -> None:
    call.complete([[5, 6, 7], [4095]])
    assert [request.tokens for request in backend.requests] == [[5, 6, 7], [4095]]


def test_a_long_text_is_tokenized_like_a_short_one(call: Any, backend: Any, tokenizer: Tokenizer) -> None:
    text = "import os\n" * 500
    backend.max_model_len = 10_000
    call.complete(text)
    assert backend.requests[0].tokens == tokenizer.encode(text, add_special_tokens=True)


# ── stopping ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stop_string_across_tokens_cuts_the_text_and_ends_the_sequence(call: Any, backend: Any) -> None:
    response = call.complete("return None # done", stop=["ne #", "zzz"], max_tokens=100)
    body = response.json()
    assert body["choices"][0]["text"] == "return No"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert backend.events == [f"stopped {body['id']}", f"aborted {body['id']}"]


def test_a_stream_never_shows_part_of_a_stop_string(call: Any) -> None:
    texts = [event["choices"][0]["text"] for event in events(call.complete("a b c d", stop="c d", stream=True))[:-1]]
    assert "".join(texts) == "a b "


def test_a_sequence_that_ends_by_itself_is_not_aborted(call: Any, backend: Any) -> None:
    call.complete("abc", stop="zzz")
    assert backend.events == []


def test_the_token_that_stopped_a_sequence_is_counted_but_not_shown(call: Any, backend: Any, tokenizer: Tokenizer) -> None:
    backend.script = says(Delta(ids(tokenizer, "yes")), Delta(ids(tokenizer, "no")[:1], finish_reason="stop"))
    body = call.complete("x", stop_token_ids=[ids(tokenizer, "no")[0]]).json()
    assert body["choices"][0] == {"index": 0, "text": "yes", "logprobs": None, "finish_reason": "stop"}
    assert body["usage"]["completion_tokens"] == len(ids(tokenizer, "yes")) + 1


def test_a_character_left_open_is_shown_as_a_replacement(call: Any, backend: Any, tokenizer: Tokenizer) -> None:
    half = tokenizer._backing.token_to_id("Ã")
    backend.script = says(Delta((50,)), Delta((half,), finish_reason="length"))
    for stop in (None, ["zzz"]):
        assert call.complete("x", stop=stop).json()["choices"][0]["text"].endswith("\ufffd")


# ── streams ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stream_is_one_event_per_delta_and_done(call: Any, tokenizer: Tokenizer) -> None:
    response = call.complete("héllo 😀", stream=True)
    *chunks, done = events(response)
    assert done == "[DONE]"
    assert len(chunks) == len(ids(tokenizer, "héllo 😀"))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "héllo 😀"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert {chunk["id"] for chunk in chunks} == {response.headers["x-request-id"]}
    assert all("usage" not in chunk for chunk in chunks)


def test_usage_comes_last_when_asked_for(call: Any) -> None:
    *chunks, last, done = events(call.complete("hello", stream=True, stream_options={"include_usage": True}))
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 2 * last["usage"]["prompt_tokens"]
    assert all(chunk["usage"] is None for chunk in chunks)


def test_a_chat_stream_opens_with_the_role(call: Any) -> None:
    first, *chunks, done = events(call.chat("hi", stream=True))
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "user\nhi\nassistant\n"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert done == "[DONE]"


def test_a_stream_of_several_prompts_names_the_choice_of_each_event(call: Any) -> None:
    *chunks, _ = events(call.complete(["one two", "three four"], stream=True))
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == {0: "one two", 1: "three four"}


# ── logprobs ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def two_tokens(backend: Any, tokenizer: Tokenizer) -> tuple[int, int]:
    """`é` in two halves: a likely one, and one with an alternative."""
    first, second = tokenizer._backing.token_to_id("Ã"), tokenizer._backing.token_to_id("©")
    backend.script = says(
        Delta((first,), (TokenLogprob(-0.5, ((first, -0.5),)),)),
        Delta((second,), (TokenLogprob(float("-inf"), ((5, -0.25),)),), finish_reason="length"),
    )
    return first, second


def test_completion_logprobs_are_parallel_lists(call: Any, two_tokens: tuple[int, int], tokenizer: Tokenizer) -> None:
    choice = call.complete("x", logprobs=1).json()["choices"][0]
    other = tokenizer.token_bytes(5).decode()
    assert choice["text"] == "é"
    assert choice["logprobs"] == {
        "tokens": ["bytes:\\xc3", "bytes:\\xa9"],
        "token_logprobs": [-0.5, -9999.0],
        "top_logprobs": [{"bytes:\\xc3": -0.5}, {other: -0.25, "bytes:\\xa9": -9999.0}],
        "text_offset": [0, 0],
    }


def test_chat_logprobs_have_bytes(call: Any, two_tokens: tuple[int, int]) -> None:
    content = call.chat("x", logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0xC3], [0xA9]]
    assert content[1]["top_logprobs"][0]["logprob"] == -0.25


def test_streamed_logprobs_come_with_their_tokens(call: Any, two_tokens: tuple[int, int]) -> None:
    *chunks, _ = events(call.complete("x", logprobs=0, stream=True))
    assert [chunk["choices"][0]["logprobs"]["tokens"] for chunk in chunks] == [["bytes:\\xc3"], ["bytes:\\xa9"]]


def test_text_offsets_count_characters(call: Any, backend: Any, tokenizer: Tokenizer) -> None:
    tokens = ids(tokenizer, "über alles")
    backend.script = says(Delta(tokens, tuple(TokenLogprob(-1.0) for _ in tokens), finish_reason="length"))
    logprobs = call.complete("x", logprobs=0).json()["choices"][0]["logprobs"]
    assert logprobs["text_offset"][0] == 0
    for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
        assert token.startswith("bytes:") or "über alles"[offset:].startswith(token)


# ── limits ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(call: Any) -> None:
    refused = error(call.complete([1] * 257))
    assert "257" in refused["message"]
    assert "256" in refused["message"]
    assert refused["code"] == "context_length_exceeded"


def test_tokens_asked_for_beyond_the_context_are_refused(call: Any) -> None:
    response = call.complete([1] * 200, max_tokens=57)
    assert response.status_code == 400
    assert error(response)["param"] == "max_tokens"
    assert "200 tokens and max_tokens asks for 57 more, but the model's context holds 256" in error(response)["message"]


def test_default_max_tokens_fit_the_context(call: Any, backend: Any) -> None:
    call.complete([1] * 250)
    call.complete([1] * 5)
    call.chat("hi")
    chat = backend.requests[2]
    assert [request.sampling.max_tokens for request in backend.requests] == [6, 16, 256 - len(chat.tokens)]


def test_a_prompt_that_leaves_no_room_is_refused(call: Any) -> None:
    assert call.complete([1] * 256).status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\udc00 x"}',
        b'{"prompt": "\xed\xa0\x80"}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": ' + b'{"a":' * 20_000 + b"1" + b"}" * 20_001,
        b'{"prompt": "x", "logit_bias": {"1": ' + b"[" * 50_000 + b"]" * 50_000 + b"}}",
    ],
)
def test_a_body_that_is_no_json_object_is_refused_and_the_server_lives(call: Any, body: bytes) -> None:
    response = call("POST", "/v1/completions", content=body)
    assert response.status_code == 400
    assert error(response)["type"] == "invalid_request_error"
    assert call.complete("still here").status_code == 200


@pytest.mark.parametrize("depth", range(800, 1000, 5))
def test_a_value_nested_as_deeply_as_json_is_read_is_refused(call: Any, depth: int) -> None:
    nested = b"[" * depth + b"]" * depth
    assert call("POST", "/v1/completions", content=b'{"prompt": "x", "temperature": ' + nested + b"}").status_code == 400
    chat = b'{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"a": ' + nested + b"}}"
    assert call("POST", "/v1/chat/completions", content=chat).status_code in (200, 400)


def test_a_huge_body_is_refused_by_its_declared_length(call: Any) -> None:
    response = call("POST", "/v1/completions", content=b"x" * 200_001)
    assert response.status_code == 413
    assert "200001 bytes" in error(response)["message"]


def test_a_huge_body_of_unknown_length_is_refused_as_it_comes(call: Any) -> None:
    sent = []

    async def body() -> AsyncGenerator[bytes, None]:
        for _ in range(100):
            sent.append(1)
            yield b"x" * 10_000

    response = call("POST", "/v1/completions", content=body())
    assert response.status_code == 413
    assert len(sent) < 100


# ── headers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_clients_request_id_is_the_bodys_id(call: Any) -> None:
    response = call("POST", "/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "mine/1"})
    assert response.json()["id"] == response.headers["x-request-id"] == "mine/1"


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "\xe9", "\x7f"])
def test_a_request_id_that_cannot_be_a_header_is_refused(call: Any, given: str) -> None:
    response = call("POST", "/v1/completions", json={"prompt": "x"}, headers={"x-request-id": given.encode("latin-1")})
    assert response.status_code == 400
    assert error(response)["param"] == "x-request-id"
    assert response.headers["x-request-id"].startswith("cmpl-")


def test_refusals_bear_the_request_id(call: Any) -> None:
    response = call("POST", "/v1/completions", json={"prompt": ""}, headers={"x-request-id": "mine"})
    assert response.status_code == 400
    assert response.headers["x-request-id"] == "mine"


# ── failures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_before_the_first_token_has_its_own_status(call: Any, backend: Any, stream: bool) -> None:
    async def full(request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        raise Overloaded("every queue is full", retry_after_s=3)
        yield

    backend.script = full
    response = call.complete("x", stream=stream)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"
    assert error(response)["type"] == "rate_limit_error"


def test_a_failure_after_the_first_token_ends_the_stream_without_done(call: Any, backend: Any) -> None:
    async def breaking(request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        yield Delta((50,))
        raise RequestFailed("no node is left")

    backend.script = breaking
    first, last = events(call.complete("x", stream=True))
    assert first["choices"][0]["finish_reason"] is None
    assert last["error"]["message"] == "no node is left"


@pytest.mark.parametrize(
    "deltas", [(Delta((50,)),), (), (Delta((50,)), Delta((), finish_reason="error")), (Delta((), finish_reason="abort"),)]
)
def test_a_sequence_that_does_not_end_well_is_an_error(call: Any, backend: Any, deltas: tuple[Delta, ...]) -> None:
    backend.script = says(*deltas)
    response = call.complete("x")
    assert response.status_code == 502
    assert error(response)["type"] == "server_error"


def test_a_bug_is_an_openai_shaped_500(call: Any, backend: Any) -> None:
    async def buggy(request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        raise ZeroDivisionError
        yield

    backend.script = buggy
    response = call.complete("x")
    assert response.status_code == 500
    assert error(response)["message"] == "internal error"


def test_one_failing_choice_aborts_the_others(call: Any, backend: Any) -> None:
    async def script(request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        if request.id.endswith(":1"):
            raise RequestFailed("no")
        await asyncio.Event().wait()
        yield Delta((1,))

    backend.script = script
    assert call.complete(["a", "b", "c"]).status_code == 502
    assert sorted(event.split(":")[-1] for event in backend.events if event.startswith("aborted"))[:1] == ["2"]
    assert len(backend.events) == 2


def test_a_model_without_a_chat_template_refuses_chats(call: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    response = call.chat("hi")
    assert response.status_code == 400
    assert "'tiny' has no chat template" in error(response)["message"]


def test_an_unknown_model_is_not_found(call: Any) -> None:
    response = call.complete("x", model="huge")
    assert response.status_code == 404
    assert error(response)["code"] == "model_not_found"
