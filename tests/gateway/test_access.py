"""API keys at the gateway: who gets in, what each may see, and how much it may have at once."""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.routing import Route

from disaggd.api_keys import ApiKey, digest_of, new_key
from disaggd.errors import Overloaded, Unavailable
from disaggd.gateway.access import Access
from disaggd.gateway.app import create_app
from disaggd.gateway.backend import Delta, GenerationRequest
from disaggd.gateway.limits import GatewayLimits
from disaggd.observe.metrics import Metrics
from tests.gateway.conftest import Caller

ALICE, BOB, ROOT, SHORT = new_key(), new_key(), new_key(), "hunter2hunter2"


def api_key(name: str, key: str, **limits: Any) -> ApiKey:
    return ApiKey(name=name, hash="sha256:" + digest_of(key).hex(), **limits)


class Door:
    """A gateway with keys, its access, its metrics, and a clock that a test moves."""

    def __init__(self, backend: Any, tokenizer: Any, *keys: ApiKey, open_metrics: bool = False) -> None:
        self.registry = CollectorRegistry()
        self.now_s = 1000.0
        metrics = Metrics(self.registry)
        self.access = Access(metrics, keys, lambda: self.now_s)
        self.call = Caller(create_app(backend, tokenizer, metrics, GatewayLimits(), self.access, open_metrics=open_metrics))

    def __call__(self, key: str | None, method: str, path: str, **options: Any) -> httpx.Response:
        headers = options.pop("headers", {}) | ({} if key is None else {"authorization": f"Bearer {key}"})
        return self.call(method, path, headers=headers, **options)

    def complete(self, key: str | None, tokens: int = 3, max_tokens: int | None = 2, **headers: str) -> httpx.Response:
        body = {"prompt": list(range(100, 100 + tokens)), "max_tokens": max_tokens}
        return self(key, "POST", "/v1/completions", json=body, headers=headers)

    def scope(self, key: str) -> dict[str, Any]:
        """Of a bare request with `key`."""
        headers = [(b"authorization", f"Bearer {key}".encode())]
        return {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": headers, "client": ("127.0.0.1", 1)}

    def count(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


@pytest.fixture
def door(backend: Any, tokenizer: Any) -> Door:
    keys = api_key("alice", ALICE), api_key("bob", BOB, may_override=True), api_key("root", ROOT, admin=True), api_key("short", SHORT)
    return Door(backend, tokenizer, *keys)


def limited(backend: Any, tokenizer: Any, **limits: Any) -> Door:
    return Door(backend, tokenizer, api_key("alice", ALICE, **limits), api_key("bob", BOB, **limits))


# ── who gets in ──────────────────────────────────────────────────────────────────────────────────────────────────────

OPEN = {"/health", "/ready"}
ADMINS = {"/v1/cluster": "GET", "/v1/cluster/check": "POST", "/v1/cluster/trace": "GET", "/v1/debug/blocks": "GET", "/metrics": "GET"}


def asked(door: Door) -> list[tuple[str, str]]:
    """Every method and path that the application has."""
    routes = [route for route in door.call.app.routes if isinstance(route, Route)]
    return [(method, re.sub("{.*}", "x", route.path)) for route in routes for method in route.methods or ()]


def test_without_a_key_nothing_but_probes_is_answered(door: Door, backend: Any) -> None:
    """Whatever path is added, somebody says who may ask it."""
    paths = asked(door)
    assert len(paths) > 10
    for method, path in paths:
        response = door(None, method, path)
        assert response.status_code == (200 if path in OPEN else 401), path
        if path not in OPEN and method != "HEAD":
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["x-request-id"].startswith("req-")
    assert backend.requests == []


WRONG = {
    "nothing": "",
    "no key": "Bearer",
    "an empty key": "Bearer ",
    "another scheme": f"Basic {ALICE}",
    "no scheme": ALICE,
    "too long": f"Bearer {ALICE}x",
    "too short": f"Bearer {ALICE[:-1]}",
    "a password": f"Bearer {SHORT}",
    "not ASCII": "Bearer é",
}


@pytest.mark.parametrize("authorization", WRONG.values(), ids=WRONG)  # ids: keys are new in every process that collects tests
def test_a_wrong_key_is_refused_and_so_is_a_short_one(door: Door, backend: Any, authorization: str) -> None:
    response = door.call("GET", "/v1/models", headers={"authorization": authorization.encode()})
    assert response.status_code == 401
    assert door.count("disaggd_unauthorized_total", cause="wrong") == 1
    assert ALICE[:-1] not in response.text


@pytest.mark.parametrize(("given", "is_kept"), [("mine-7", True), ("not a name", False), ("x" * 129, False)])
def test_a_refusal_bears_the_id_that_the_request_came_with(door: Door, given: str, is_kept: bool) -> None:
    response = door.call("POST", "/v1/completions", headers={"x-request-id": given})
    assert response.status_code == 401
    assert (response.headers["x-request-id"] == given) == is_kept


@pytest.mark.parametrize(
    ("authorization", "said"), [(f"Bearer {32 * 'k'}", "no such API key"), ("Basic YTpi", "the scheme must be Bearer")]
)
def test_a_refusal_says_whether_the_key_is_wrong_or_the_scheme(door: Door, authorization: str, said: str) -> None:
    response = door.call("GET", "/v1/models", headers={"authorization": authorization})
    assert response.status_code == 401
    assert said in response.json()["error"]["message"]


def test_a_key_serves_and_is_named_in_the_receipt(door: Door, backend: Any) -> None:
    response = door.complete(ALICE)
    assert response.status_code == 200
    assert backend.requests[0].key == "alice"
    assert door(ALICE, "GET", f"/v1/requests/{response.json()['id']}").json()["key"] == "alice"


def test_refusals_are_logged_once_counted_and_show_no_key(door: Door, caplog: pytest.LogCaptureFixture) -> None:
    wrong = new_key()
    for key in (None, wrong, None, wrong, wrong):
        assert door(key, "GET", "/v1/models").status_code == 401
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "missing API key" in caplog.text and "wrong API key" in caplog.text
    assert wrong not in caplog.text
    assert [door.count("disaggd_unauthorized_total", cause=cause) for cause in ("missing", "wrong")] == [2, 3]
    assert door.count("disaggd_http_requests_total", route="/v1/models", status="401") == 5


@pytest.mark.parametrize("path", ADMINS)
def test_what_shows_the_cluster_is_for_admins(door: Door, path: str) -> None:
    assert door(ROOT, ADMINS[path], path).status_code == 200
    refused = door(BOB, ADMINS[path], path)
    assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")


def test_docs_security_names_what_is_for_admins(door: Door) -> None:
    (row,) = re.findall(r"^\| `admin` \|.*$", (Path(__file__).parents[2] / "docs" / "security.md").read_text(), re.MULTILINE)
    for_admins = {path for method, path in asked(door) if method != "HEAD" and door(BOB, method, path).status_code == 403}
    assert for_admins == set(ADMINS) == set(re.findall(r"`(/[^`]*)`", row))


def test_metrics_may_be_open(backend: Any, tokenizer: Any) -> None:
    door = Door(backend, tokenizer, open_metrics=True)
    assert door(None, "GET", "/metrics").status_code == 200
    assert door(None, "GET", "/v1/cluster").status_code == 401


def test_an_override_is_for_keys_that_may(door: Door, backend: Any) -> None:
    refused = door.complete(ALICE, **{"x-disaggd-policy": "local"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (403, "x-disaggd-policy")
    for key in (BOB, ROOT):
        assert door.complete(key, **{"x-disaggd-policy": "remote"}).status_code == 200
    assert [request.policy for request in backend.requests] == ["remote", "remote"]


def test_a_key_may_have_cached_prefixes_of_its_own_that_no_other_can_ask_for(backend: Any, tokenizer: Any) -> None:
    door = Door(backend, tokenizer, api_key("alice", ALICE, own_cache=True), api_key("bob", BOB), api_key("carol", ROOT, own_cache=True))
    asked = [(ALICE, ""), (ALICE, "x"), (ROOT, ""), (BOB, ""), (BOB, "x"), (BOB, "key:alice:"), (BOB, "key:alice:x")]
    for key, salt in asked:
        door(key, "POST", "/v1/completions", json={"prompt": "x", "cache_salt": salt})
    salts = [request.cache_salt for request in backend.requests]
    assert len(set(salts)) == len(asked)
    assert salts[3] == "", "who has none and asks for none shares with all that do alike"


def test_a_receipt_is_shown_to_its_own_key_and_to_admins(door: Door) -> None:
    door.complete(ALICE, **{"x-request-id": "of-alice"})
    assert door(BOB, "GET", "/v1/requests/of-alice").status_code == 404
    assert [door(key, "GET", "/v1/requests/of-alice").status_code for key in (ALICE, ROOT)] == [200, 200]
    listed = {key: [receipt["id"] for receipt in door(key, "GET", "/v1/requests").json()["data"]] for key in (ALICE, BOB, ROOT)}
    assert listed == {ALICE: ["of-alice"], BOB: [], ROOT: ["of-alice"]}


# ── how much at once ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_key_has_so_many_sequences_in_flight_and_others_do_not_count(backend: Any, tokenizer: Any) -> None:
    door = limited(backend, tokenizer, max_requests=2)
    during: list[httpx.Response] = []

    async def ask_meanwhile(request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        if not during:
            during.append(httpx.Response(0))
            during.append(await asyncio.to_thread(door.complete, ALICE))
            during.append(await asyncio.to_thread(door.complete, BOB))
        yield Delta((5,), finish_reason="length")

    backend.script = ask_meanwhile
    both = door(ALICE, "POST", "/v1/completions", json={"prompt": [[5, 6], [7]], "max_tokens": 1})
    assert both.status_code == 200
    assert [response.status_code for response in during[1:]] == [429, 200]
    assert during[1].json()["error"]["code"] == "rate_limit_exceeded"
    assert door.complete(ALICE).status_code == 200, "what has ended is in flight no more"
    assert door.count("disaggd_api_key_requests_total", key="alice", outcome="max_requests") == 1
    assert door.count("disaggd_api_key_requests_total", key="alice", outcome="admitted") == 2


def test_more_prompts_than_a_key_may_ever_have_are_a_bad_request(backend: Any, tokenizer: Any) -> None:
    door = limited(backend, tokenizer, max_requests=2)
    response = door(ALICE, "POST", "/v1/completions", json={"prompt": [[5], [6], [7]], "max_tokens": 1})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


def test_tokens_come_back_by_the_minute(backend: Any, tokenizer: Any) -> None:
    door = limited(backend, tokenizer, tokens_per_minute=60)
    assert door.complete(ALICE, tokens=40, max_tokens=20).status_code == 200
    refused = door.complete(ALICE, tokens=8, max_tokens=2)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "10")
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert door.complete(BOB, tokens=8, max_tokens=2).status_code == 200
    door.now_s += 9.5
    assert door.complete(ALICE, tokens=8, max_tokens=2).headers["retry-after"] == "1"
    door.now_s += 0.5
    assert door.complete(ALICE, tokens=8, max_tokens=2).status_code == 200
    assert door.count("disaggd_api_key_tokens_total", key="alice", kind="prompt") == 48
    assert door.count("disaggd_api_key_tokens_total", key="alice", kind="output") == 22


def test_what_was_reserved_and_not_used_comes_back_at_once(backend: Any, tokenizer: Any) -> None:
    door = limited(backend, tokenizer, tokens_per_minute=100)

    async def brief(request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        yield Delta((5,), finish_reason="stop")

    backend.script = brief
    for _ in range(4):  # each reserves 60 of what is left, and uses 11
        assert door.complete(ALICE, tokens=10, max_tokens=50).status_code == 200
    assert door.complete(ALICE, tokens=10, max_tokens=50).status_code == 429


def test_a_request_that_was_refused_before_its_first_token_costs_nothing(backend: Any, tokenizer: Any) -> None:
    door = limited(backend, tokenizer, tokens_per_minute=20, max_requests=1)

    async def full(request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        raise Overloaded("the queue is full")
        yield

    async def lost(request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        yield Delta((5,))
        raise Unavailable("gone")

    backend.script = full
    for _ in range(3):
        assert door.complete(ALICE, tokens=18, max_tokens=2).json()["error"]["message"] == "the queue is full"
    backend.script = lost
    assert door.complete(ALICE, tokens=18, max_tokens=2).status_code == 503
    assert door.complete(ALICE, tokens=18, max_tokens=2).status_code == 429, "19 were used by the one that was lost"


def test_a_client_that_leaves_pays_for_its_prompt_and_has_nothing_in_flight(backend: Any, tokenizer: Any) -> None:
    door = limited(backend, tokenizer, tokens_per_minute=20, max_requests=1)
    client = door.access.client(Request(door.scope(ALICE)), "key")
    with pytest.raises(asyncio.CancelledError), door.access.reserved(client, 1, 20, lambda: (15, 0)):
        raise asyncio.CancelledError
    assert (client.num_running, client.level) == (0, 5)


def test_a_request_larger_than_a_minutes_tokens_runs_when_none_are_used_and_is_paid_off(backend: Any, tokenizer: Any) -> None:
    door = limited(backend, tokenizer, tokens_per_minute=60)
    assert door.complete(ALICE, tokens=100, max_tokens=20).status_code == 200
    assert door.complete(ALICE, tokens=1, max_tokens=1).headers["retry-after"] == "62"
    door.now_s += 62
    assert door.complete(ALICE, tokens=1, max_tokens=1).status_code == 200


def test_without_max_tokens_the_prompt_is_reserved_and_the_output_is_paid_in_the_end(backend: Any, tokenizer: Any) -> None:
    door = limited(backend, tokenizer, tokens_per_minute=60)
    assert door.complete(ALICE, tokens=50, max_tokens=None).status_code == 200
    assert door.complete(ALICE, tokens=1, max_tokens=1).status_code == 429


# ── another file ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_keys_are_withdrawn_and_added_and_a_name_that_stays_keeps_its_debts(backend: Any, tokenizer: Any) -> None:
    door = limited(backend, tokenizer, tokens_per_minute=20)
    assert door.complete(ALICE, tokens=18, max_tokens=2).status_code == 200
    renewed = new_key()
    door.access.set_keys([api_key("alice", renewed, tokens_per_minute=20), api_key("carol", ROOT)])
    assert [door(key, "GET", "/v1/models").status_code for key in (ALICE, BOB, renewed, ROOT)] == [401, 401, 200, 200]
    assert door.complete(renewed, tokens=10).status_code == 429
    door.access.set_keys([api_key("alice", renewed, tokens_per_minute=40)])
    assert door.complete(renewed, tokens=10).status_code == 200, "other limits begin anew"


def test_an_empty_file_lets_nobody_in(backend: Any, tokenizer: Any) -> None:
    door = Door(backend, tokenizer)
    assert door(ALICE, "GET", "/v1/models").status_code == 401


def test_without_a_file_everybody_may_do_everything(call: Any) -> None:
    for path in ("/v1/models", "/v1/requests", "/v1/cluster", "/v1/cluster/trace", "/metrics"):
        assert call("GET", path).status_code == 200
