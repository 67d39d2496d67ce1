"""What a client hears when the router itself is wrong: that it is, and nothing of how."""

from collections.abc import AsyncGenerator, Callable
from typing import Any, NoReturn

import httpx
import msgspec
import pytest

from disaggd.errors import RequestFailed
from disaggd.gateway.backend import Delta, GenerationRequest

SECRET_PATH = "/srv/models/secret/model.safetensors"


def faults() -> list[Exception]:
    return [
        FileNotFoundError(2, "No such file", SECRET_PATH),
        KeyError(SECRET_PATH),
        RuntimeError(f"at {SECRET_PATH}:12"),
        AssertionError(),
    ]


def tells_nothing(response: httpx.Response) -> bool:
    return not any(word in response.text for word in ("/srv", "secret", "Traceback", "Error", "File ", ".py", "No such file"))


def is_openais(response: httpx.Response) -> bool:
    error = response.json()["error"]
    return set(error) == {"message", "type", "param", "code"} and isinstance(error["message"], str)


@pytest.mark.parametrize("fault", faults(), ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("ask", ["complete", "chat"])
def test_a_fault_before_the_first_token_is_an_internal_error(call: Any, backend: Any, ask: str, fault: Exception) -> None:
    async def broken(request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        raise fault
        yield

    backend.script = broken
    for stream in (False, True):
        response = getattr(call, ask)("hello", stream=stream)
        assert (response.status_code, response.json()["error"]["message"]) == (500, "internal error")
        assert tells_nothing(response) and is_openais(response)


@pytest.mark.parametrize("path", ["/v1/requests", "/v1/requests/x", "/v1/cluster", "/v1/cluster/trace", "/ready", "/v1/models"])
@pytest.mark.parametrize("fault", faults(), ids=lambda fault: type(fault).__name__)
def test_a_fault_of_whatever_is_looked_at_is_an_internal_error(
    call: Any, backend: Any, monkeypatch: pytest.MonkeyPatch, path: str, fault: Exception
) -> None:
    def broken(*_: object) -> NoReturn:
        raise fault

    for name in ("receipts", "receipt", "cluster", "trace", "why_not_ready"):
        monkeypatch.setattr(backend, name, broken)
    monkeypatch.setattr(type(backend), "model_name", property(broken), raising=False)
    response = call("GET", path)
    assert response.status_code == 500
    assert tells_nothing(response) and is_openais(response)


def test_a_fault_in_the_midst_of_a_stream_ends_it_and_tells_nothing(call: Any, backend: Any) -> None:
    async def breaks(request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        yield Delta((500,))
        raise FileNotFoundError(2, "No such file", SECRET_PATH)

    backend.script = breaks
    response = call.complete("hello", stream=True)
    assert response.status_code == 200 and "[DONE]" not in response.text
    assert tells_nothing(response)


def test_what_the_cluster_says_on_purpose_is_passed_on(call: Any, backend: Any) -> None:
    async def fails(request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        yield Delta((500,))
        raise RequestFailed("no decode node is left", code="no_decode_node")

    backend.script = fails
    events = [line.removeprefix("data: ") for line in call.complete("hello", stream=True).text.splitlines() if line]
    assert msgspec.json.decode(events[-1])["error"]["code"] == "no_decode_node"


BODIES: dict[str, Callable[[Any], httpx.Response]] = {
    "no JSON": lambda call: call("POST", "/v1/completions", content=b"{"),
    "no UTF-8": lambda call: call("POST", "/v1/completions", content=b'{"prompt": "\xff"}'),
    "no object": lambda call: call("POST", "/v1/completions", content=b"[]"),
    "nothing": lambda call: call("POST", "/v1/completions", content=b""),
    "nested deeply": lambda call: call("POST", "/v1/completions", content=b"[" * 100_000),
    "a prompt that is none": lambda call: call.complete({"a": 1}),
    "a token that is none": lambda call: call.complete([10**9]),
    "infinity": lambda call: call("POST", "/v1/completions", content=b'{"prompt": "x", "temperature": 1e999}'),
    "a large number": lambda call: call("POST", "/v1/completions", content=b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}"),
    "an unknown field": lambda call: call.complete("x", **{"a\nb": 1}),
    "a header that is none": lambda call: call("POST", "/v1/completions", content=b"{}", headers={"x-request-id": "a b"}),
    "another path": lambda call: call("GET", "/v1/../etc/passwd"),
    "an encoded path": lambda call: call("GET", "/v1/models/%2e%2e%2f%00%ff"),
    "another method": lambda call: call("DELETE", "/v1/models"),
    "a bad number": lambda call: call("GET", "/v1/requests?limit=1e9"),
    "an unknown id": lambda call: call("GET", "/v1/requests/%00%ff"),
}


@pytest.mark.parametrize("ask", BODIES.values(), ids=BODIES)
def test_bad_input_is_a_4xx_in_openais_shape(call: Any, ask: Callable[[Any], httpx.Response]) -> None:
    response = ask(call)
    assert 400 <= response.status_code < 500
    assert is_openais(response)
    assert "Traceback" not in response.text and ".py" not in response.text
