"""What a request's headers ask of the cluster, and who may ask it."""

from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from disaggd.gateway.app import create_app
from disaggd.gateway.limits import GatewayLimits
from disaggd.observe.metrics import Metrics
from tests.gateway.conftest import Caller

KEY, OTHER_KEY = "k" * 16, "another-key-0123456789"


@pytest.fixture
def guarded(backend: Any, tokenizer: Any) -> Caller:
    """Only two keys may override the decision."""
    limits = GatewayLimits(trusted_keys=(KEY, OTHER_KEY))
    return Caller(create_app(backend, tokenizer, Metrics(CollectorRegistry()), limits))


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


@pytest.mark.parametrize("authorization", [f"Bearer {KEY}", f"bearer {OTHER_KEY}", f"Bearer  {KEY} "])
def test_a_trusted_key_may_override_the_decision(guarded: Caller, backend: Any, authorization: str) -> None:
    assert complete(guarded, x_disaggd_policy="remote", authorization=authorization).status_code == 200
    assert backend.requests[0].policy == "remote"


@pytest.mark.parametrize("authorization", ["", "Bearer", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", f"Basic {KEY}", KEY])
def test_whoever_has_no_trusted_key_is_refused_an_override_and_served_without(guarded: Caller, backend: Any, authorization: str) -> None:
    refused = complete(guarded, x_disaggd_policy="local", authorization=authorization)
    assert refused.status_code == 403
    assert refused.json()["error"]["type"] == "permission_error"
    assert not backend.requests
    assert complete(guarded, authorization=authorization).status_code == 200


def test_an_override_that_is_none_is_a_bad_request_whoever_sends_it(guarded: Caller) -> None:
    assert complete(guarded, x_disaggd_policy="elsewhere").status_code == 400


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
