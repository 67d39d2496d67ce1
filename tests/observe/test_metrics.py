"""Metrics: each verb moves its series, in a registry of its own."""

from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from disaggd.observe.metrics import Metrics
from disaggd.observe.receipts import CachedTokens, Receipt, Spans


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> Metrics:
    return Metrics(registry)


def test_two_routers_live_in_one_process() -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    Metrics(first).set_queue_depth(3)
    Metrics(second).set_queue_depth(5)
    assert [registry.get_sample_value("disaggd_prefill_queue_depth") for registry in (first, second)] == [3, 5]


def test_a_finished_receipt_is_counted(metrics: Metrics, registry: Any) -> None:
    receipt = Receipt(
        id="r",
        model="tiny",
        decision="remote",
        reason="long: 100 uncached tokens > 64",
        prompt_tokens=100,
        output_tokens=20,
        cached_tokens=CachedTokens(prefill=30),
        kv_bytes=4096,
        spans_ms=Spans(queue=5.0, transfer=250.0),
        finish_reason="stop",
    )
    metrics.observe_finish(receipt)
    expected = {
        "disaggd_prompt_tokens_total": 100,
        "disaggd_prompt_tokens_cached_total": 30,
        "disaggd_generation_tokens_total": 20,
        "disaggd_kv_transferred_bytes_total": 4096,
        "disaggd_request_queue_time_seconds_sum": 0.005,
        "disaggd_kv_transfer_time_seconds_sum": 0.25,
        "disaggd_request_prefill_time_seconds_count": 0,
    }
    assert {name: registry.get_sample_value(name) for name in expected} == expected
    assert registry.get_sample_value("disaggd_decisions_total", {"decision": "remote", "reason": "long"}) == 1
    assert registry.get_sample_value("disaggd_request_finished_total", {"finished_reason": "stop"}) == 1


def test_an_undecided_request_counts_no_decision(metrics: Metrics) -> None:
    metrics.observe_finish(Receipt(id="r", model="tiny", prompt_tokens=1))
    assert b"disaggd_decisions_total{" not in metrics.render()


def test_a_kv_path_is_told_until_one_of_its_ends_is_gone(metrics: Metrics, registry: Any) -> None:
    pair = {"prefill": "p0", "decode": "d0"}
    for is_ready in (False, True):
        metrics.set_pair("p0", "d0", is_ready)
        assert registry.get_sample_value("disaggd_kv_path_up", pair) == is_ready
    metrics.forget_pair("p0", "d0")
    assert registry.get_sample_value("disaggd_kv_path_up", pair) is None


def test_blocks_are_told_by_node_and_state(metrics: Metrics, registry: Any) -> None:
    metrics.set_blocks("d0", {"free": 7, "granted": 2})
    assert registry.get_sample_value("disaggd_kv_blocks", {"node": "d0", "state": "granted"}) == 2


def test_a_node_that_went_down_holds_nothing(metrics: Metrics, registry: Any) -> None:
    for node in ("d0", "d1"):
        metrics.set_node(node, "decode", up=True)
        metrics.set_blocks(node, {"free": 7})
        metrics.set_sequences(node, {"running": 1})
    metrics.set_node("d0", "decode", up=False)
    assert registry.get_sample_value("disaggd_node_up", {"node": "d0", "role": "decode"}) == 0
    assert registry.get_sample_value("disaggd_kv_blocks", {"node": "d0", "state": "free"}) is None
    assert registry.get_sample_value("disaggd_sequences", {"node": "d0", "state": "running"}) is None
    assert registry.get_sample_value("disaggd_kv_blocks", {"node": "d1", "state": "free"}) == 7


def test_preemptions_are_counted_over_a_nodes_restarts(metrics: Metrics, registry: Any) -> None:
    for total in (0, 3, 5, 1):  # the last is a restarted node's
        metrics.count_preemptions("d0", total)
    assert registry.get_sample_value("disaggd_num_preemptions_total", {"node": "d0"}) == 6


def test_dropped_frames_are_counted_by_type(metrics: Metrics, registry: Any) -> None:
    metrics.count_dropped_frames("Tokens", 2)
    assert registry.get_sample_value("disaggd_dropped_frames_total", {"frame": "Tokens"}) == 2
