"""What a request's headers ask of the cluster."""

from typing import Any

import httpx
import pytest

from tests.gateway.conftest import Caller


def complete(call: Caller, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return call("POST", "/v1/completions", json={"prompt": "x"}, headers=named)


# ── policy ──


def test_the_policy_header_reaches_the_backend(call: Any, backend: Any) -> None:
    for headers in ({}, {"x_disaggd_policy": "local"}, {"x_disaggd_policy": "remote"}):
        assert complete(call, **headers).status_code == 200
    assert [request.policy for request in backend.requests] == ["auto", "local", "remote"]


def test_another_policy_is_refused(call: Any) -> None:
    response = complete(call, x_disaggd_policy="auto")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "x-disaggd-policy")


# ── session, salt, priority ──


def test_a_session_reaches_the_backend(call: Any, backend: Any) -> None:
    complete(call, x_session_id="chat/17")
    complete(call)
    assert [request.session for request in backend.requests] == ["chat/17", None]


@pytest.mark.parametrize("given", ["", "a b", "x" * 129])
def test_a_session_that_is_no_name_is_refused(call: Any, given: str) -> None:
    response = complete(call, x_session_id=given)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "x-session-id")


def test_salt_and_priority_reach_the_backend(call: Any, backend: Any) -> None:
    call.complete("x", cache_salt="mine", priority=5)
    call.chat("x", cache_salt="mine", priority=5)
    assert [(request.cache_salt, request.priority) for request in backend.requests] == [("mine", 5)] * 2


def test_a_salt_that_is_no_text_is_a_bad_request(call: Any) -> None:
    """JSON can spell half a surrogate pair, which no encoding takes."""
    body = b'{"prompt": "x", "cache_salt": "\\ud800"}'
    response = call("POST", "/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
