"""What a running cluster tells of its requests: receipts, the waterfall, the trace of the last minutes."""

import subprocess
import sys
from itertools import pairwise

import pytest

from tests.support.clusters import Cluster
from tests.support.oracle import Oracle, prompt_of
from tests.support.trace_events import check, names, slices

pytestmark = pytest.mark.process


def test_the_spans_of_a_remote_request_fill_the_time_to_its_first_token(cluster: Cluster, oracle: Oracle) -> None:
    request_id = cluster.complete(prompt_of(900, oracle, salt=1), max_tokens=8)["id"]
    cluster.wait_idle()
    receipt = cluster.receipt(request_id)
    (attempt,) = receipt["attempts"]
    spans = {span["name"]: span for span in attempt["spans"]}
    assert {"decide", "queue", "prefill_wait", "prefill", "transfer", "decode"} <= spans.keys()
    in_turn = [spans[name] for name in ("decide", "queue", "prefill_wait", "prefill", "decode")]
    assert all(one["end_ms"] <= following["start_ms"] + 0.001 for one, following in pairwise(in_turn))
    assert spans["prefill"]["end_ms"] == pytest.approx(receipt["spans_ms"]["first_token"], abs=5)
    assert spans["prefill"]["start_ms"] < spans["transfer"]["start_ms"] < spans["transfer"]["end_ms"]
    assert attempt["end_ms"] == receipt["spans_ms"]["total"]


def test_a_local_prefill_is_told_by_its_node(cluster: Cluster, oracle: Oracle) -> None:
    request_id = cluster.complete(prompt_of(60, oracle, salt=2), max_tokens=8)["id"]
    receipt = cluster.receipt(request_id)
    assert [span["name"] for span in receipt["attempts"][0]["spans"]] == ["decide", "prefill_wait", "prefill", "decode"]
    assert 0 < receipt["spans_ms"]["prefill"] <= receipt["spans_ms"]["first_token"]


def test_the_latest_requests_are_listed(cluster: Cluster, oracle: Oracle) -> None:
    ids = [cluster.complete(prompt_of(20, oracle, salt=salt), max_tokens=2)["id"] for salt in (3, 4)]
    listed = cluster.get("/v1/requests?limit=2").json()["data"]
    assert [receipt["id"] for receipt in listed] == ids[::-1]


def test_no_block_is_anybody_elses_when_all_is_quiet(cluster: Cluster, oracle: Oracle) -> None:
    cluster.complete(prompt_of(600, oracle, salt=7), max_tokens=2)
    cluster.wait_idle()
    answered = [{"name": name, "state": "answered"} for name in ("p0", "d0")]
    assert cluster.get("/v1/debug/blocks").json() == {"nodes": answered, "blocks": []}


def test_the_waterfall_is_drawn_in_a_terminal_that_is_none(cluster: Cluster, oracle: Oracle) -> None:
    request_id = cluster.complete(prompt_of(600, oracle, salt=5), max_tokens=8)["id"]
    command = [sys.executable, "-m", "disaggd", "trace", request_id, "--url", cluster.url]
    drawn = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (drawn.returncode, drawn.stderr) == (0, "")
    assert drawn.stdout.startswith(f"{request_id}  remote p0")
    assert [line for line in drawn.stdout.splitlines() if line.startswith("transfer     p0")]


def test_the_trace_of_a_cluster_keeps_the_rules_and_names_its_nodes(cluster: Cluster, oracle: Oracle) -> None:
    request_id = cluster.complete(prompt_of(700, oracle, salt=6), max_tokens=8)["id"]
    cluster.wait_idle()
    events = cluster.get("/v1/cluster/trace?seconds=60").json()["traceEvents"]
    check(events)
    assert set(names(events, "process_name").values()) == {"router", "p0", "d0"}
    for node, activity in (("p0", "prefill"), ("p0", "transfer"), ("d0", "decode")):
        assert request_id in {name for name, _, _ in slices(events, node)[activity]}
    assert {event["name"] for event in events if event["ph"] == "C"} >= {"blocks", "sequences", "prefill queue"}
