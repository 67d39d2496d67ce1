"""Routes, counts, and the endpoints that only look."""

from typing import Any

import pytest


def test_models_lists_the_one_model(call: Any) -> None:
    listed = call("GET", "/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["tiny"]
    assert call("GET", "/v1/models/tiny").json() == listed["data"][0]
    assert call("GET", "/v1/models/org/huge").status_code == 404


def test_ready_follows_the_backend_and_health_does_not(call: Any, backend: Any) -> None:
    assert call("GET", "/ready").status_code == 200
    backend.trouble = "d0 has a cold"
    response = call("GET", "/ready")
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["type"] == "service_unavailable"
    assert response.json()["error"]["message"] == "d0 has a cold"
    assert call("GET", "/health").status_code == 200


def test_a_receipt_is_found_by_the_id_of_the_reply(call: Any) -> None:
    request_id = call.complete("hello").json()["id"]
    receipt = call("GET", f"/v1/requests/{request_id}").json()
    assert receipt["id"] == request_id
    assert receipt["decision"] == "remote"
    assert call("GET", "/v1/requests/unknown").status_code == 404


def test_a_receipt_is_found_by_any_id_a_client_may_choose(call: Any) -> None:
    call("POST", "/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "a/b?c%d"})
    assert call("GET", "/v1/requests/a%2Fb%3Fc%25d").json()["id"] == "a/b?c%d"


def test_the_cluster_is_shown_as_it_is(call: Any, backend: Any) -> None:
    assert call("GET", "/v1/cluster").json() == backend.cluster()


def test_a_checkup_is_asked_for_and_told_as_it_is(call: Any) -> None:
    assert call("POST", "/v1/cluster/check").json() == {"ok": True, "ways": []}
    assert call("GET", "/v1/cluster/check").status_code == 405


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/", 404), ("GET", "/v1/nope", 404), ("POST", "/v1/embeddings", 404)])
def test_an_unknown_path_is_refused_in_openais_shape(call: Any, method: str, path: str, status: int) -> None:
    response = call(method, path)
    assert response.status_code == status
    assert path in response.json()["error"]["message"]


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/completions"), ("DELETE", "/v1/models"), ("POST", "/health")])
def test_a_wrong_method_is_refused_in_openais_shape(call: Any, method: str, path: str) -> None:
    response = call(method, path)
    assert response.status_code == 405
    assert response.headers["allow"]
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_answers_are_counted_by_route_and_status(call: Any, registry: Any) -> None:
    call.complete("hello")
    call.complete("")
    call("GET", "/v1/requests/unknown")

    def count(route: str, status: str) -> float | None:
        return registry.get_sample_value("disaggd_http_requests_total", {"route": route, "status": status})

    assert count("/v1/completions", "200") == 1
    assert count("/v1/completions", "400") == 1
    assert count("/v1/requests/{id:path}", "404") == 1
    assert registry.get_sample_value("disaggd_open_requests") == 0


def test_metrics_tell_the_latencies_clients_saw(call: Any, tokenizer: Any) -> None:
    call.complete("one two three")
    response = call("GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    num_tokens = len(tokenizer.encode("one two three", add_special_tokens=True))
    assert "disaggd_time_to_first_token_seconds_count 1.0" in response.text
    assert f"disaggd_inter_token_latency_seconds_count {float(num_tokens - 1)}" in response.text
    assert "disaggd_e2e_request_latency_seconds_count 1.0" in response.text


def test_receipts_are_listed_as_many_as_are_asked_for(call: Any, backend: Any) -> None:
    for name in "abc":
        call("POST", "/v1/completions", json={"prompt": "x"}, headers={"x-request-id": name})
    listed = call("GET", "/v1/requests").json()
    assert (listed["object"], [receipt["id"] for receipt in listed["data"]]) == ("list", ["c", "b", "a"])
    assert [receipt["id"] for receipt in call("GET", "/v1/requests?limit=2").json()["data"]] == ["c", "b"]


@pytest.mark.parametrize("path", ["/v1/requests?limit={}", "/v1/cluster/trace?seconds={}"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", "", "٣", "99999999"])
def test_a_bad_number_in_the_query_is_refused_by_its_name(call: Any, path: str, value: str) -> None:
    response = call("GET", path.format(value))
    assert response.status_code == 400
    assert response.json()["error"]["param"] in path


def test_the_trace_comes_piece_by_piece_and_others_have_their_turn(call: Any, backend: Any) -> None:
    response = call("GET", "/v1/cluster/trace?seconds=7")
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {"traceEvents": [7]}
    assert call("GET", "/v1/cluster/trace").json() == {"traceEvents": [None]}
