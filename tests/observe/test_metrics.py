"""Metrics: each verb moves its series, in a registry of its own; the page that documents them is whole."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from disaggd.observe.metrics import BlockState, Metrics
from disaggd.observe.receipts import Attempt, CachedTokens, Receipt, Spans
from tests.support.exercised_metrics import exercise, exposed
from tests.support.receipts import local_receipt, remote_attempt, remote_receipt

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> Metrics:
    return Metrics(registry)


def blocks(**counts: int) -> dict[BlockState, int]:
    return {"free": 0, "cached": 0, "used": 0, "granted": 0, "held": 0, "quarantined": 0, **counts}  # type: ignore[dict-item]


def test_two_routers_live_in_one_process() -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    Metrics(first).set_queue(3, 0, 0.0)
    Metrics(second).set_queue(5, 0, 0.0)
    assert [registry.get_sample_value("disaggd_prefill_queue_depth") for registry in (first, second)] == [3, 5]


def test_a_finished_receipt_is_counted(metrics: Metrics, registry: Any) -> None:
    metrics.observe_finish(
        Receipt(
            id="r",
            model="tiny",
            decision="remote",
            reason="long: 100 uncached tokens > 64",
            prediction_error=-0.25,
            prompt_tokens=100,
            output_tokens=20,
            cached_tokens=CachedTokens(prefill=30),
            kv_bytes=4096,
            retries=2,
            spans_ms=Spans(queue=5.0, prefill_wait=1.0, transfer=250.0, transfer_exposed=10.0, decode=190.0),
            finish_reason="stop",
            attempts=(remote_attempt(),),
        )
    )
    expected = {
        "disaggd_prompt_tokens_total": 100,
        "disaggd_prompt_tokens_cached_total": 30,
        "disaggd_generation_tokens_total": 20,
        "disaggd_request_prompt_tokens_sum": 100,
        "disaggd_request_generation_tokens_sum": 20,
        "disaggd_retries_total": 2,
        "disaggd_prefill_queue_time_seconds_sum": 0.005,
        "disaggd_request_queue_time_seconds_sum": 0.006,
        "disaggd_request_decode_time_seconds_sum": 0.19,
        "disaggd_request_time_per_output_token_seconds_sum": pytest.approx(0.01),
        "disaggd_request_prefill_time_seconds_count": 0,
    }
    assert {name: registry.get_sample_value(name) for name in expected} == expected
    pair = {"prefill": "p0", "decode": "d0"}
    assert registry.get_sample_value("disaggd_kv_transferred_bytes_total", pair) == 4096
    assert registry.get_sample_value("disaggd_kv_transfer_time_seconds_sum", pair) == 0.25
    assert registry.get_sample_value("disaggd_kv_transfer_exposed_time_seconds_sum", pair) == 0.01
    assert registry.get_sample_value("disaggd_decisions_total", {"decision": "remote", "reason": "long"}) == 1
    assert registry.get_sample_value("disaggd_ttft_prediction_error_ratio_sum", {"decision": "remote"}) == 0.25
    assert registry.get_sample_value("disaggd_request_success_total", {"finished_reason": "stop"}) == 1


def test_bytes_of_a_prefill_that_failed_are_counted_though_decode_did_it_in_the_end(metrics: Metrics, registry: Any) -> None:
    lost, again = remote_attempt(failure="lost"), Attempt(decision="local", reason="retries: 3", decode_node="d1", start_ms=50.0)
    metrics.observe_finish(local_receipt(attempts=(lost, again), kv_bytes=77, retries=1))
    assert registry.get_sample_value("disaggd_kv_transferred_bytes_total", {"prefill": "p0", "decode": "d0"}) == 77


def test_a_request_of_one_token_has_no_time_between_tokens(metrics: Metrics, registry: Any) -> None:
    metrics.observe_finish(remote_receipt(output_tokens=1))
    assert registry.get_sample_value("disaggd_request_time_per_output_token_seconds_count") == 0


def test_an_undecided_request_counts_no_decision(metrics: Metrics) -> None:
    metrics.observe_finish(Receipt(id="r", model="tiny", prompt_tokens=1))
    assert b"disaggd_decisions_total{" not in metrics.render()


def test_a_kv_path_is_told_until_one_of_its_ends_is_gone(metrics: Metrics, registry: Any) -> None:
    pair = {"writer": "p0", "target": "d0"}
    for is_ready in (False, True):
        metrics.set_pair("p0", "d0", is_ready)
        assert registry.get_sample_value("disaggd_kv_path_up", pair) == is_ready
    metrics.forget_pair("p0", "d0")
    assert registry.get_sample_value("disaggd_kv_path_up", pair) is None


def test_blocks_are_told_by_node_and_state(metrics: Metrics, registry: Any) -> None:
    metrics.set_blocks("d0", blocks(free=5, cached=2, granted=2, quarantined=1), 10)
    assert registry.get_sample_value("disaggd_kv_blocks", {"node": "d0", "state": "granted"}) == 2
    assert registry.get_sample_value("disaggd_kv_cache_usage_perc", {"node": "d0"}) == pytest.approx(0.3)


def test_a_node_that_went_down_holds_nothing(metrics: Metrics, registry: Any) -> None:
    for node in ("d0", "d1"):
        metrics.set_node(node, "decode", up=True)
        metrics.set_blocks(node, blocks(free=7), 7)
        metrics.set_sequences(node, {"running": 1})
        metrics.set_backlog(node, 5)
        metrics.set_indexed(node, 5)
        metrics.set_breakeven(node, 700)
    metrics.set_node("d0", "decode", up=False)
    assert registry.get_sample_value("disaggd_node_up", {"node": "d0", "role": "decode"}) == 0
    shown = [sample for family in registry.collect() for sample in family.samples if sample.labels.get("node") == "d0"]
    assert {sample.name for sample in shown} == {"disaggd_node_up"}
    assert registry.get_sample_value("disaggd_kv_blocks", {"node": "d1", "state": "free"}) == 7


def test_what_nodes_count_is_counted_over_their_restarts(metrics: Metrics, registry: Any) -> None:
    for total in (0, 3, 5, 1):  # the last is a restarted node's
        metrics.count_preemptions("d0", total)
        metrics.count_prefixes("d0", queried_tokens=10 * total, hit_tokens=2 * total, evicted_blocks=total)
    metrics.count_preemptions("d1", 4)
    assert registry.get_sample_value("disaggd_num_preemptions_total", {"node": "d0"}) == 6
    assert registry.get_sample_value("disaggd_prefix_cache_queries_total", {"node": "d0"}) == 60
    assert registry.get_sample_value("disaggd_prefix_cache_hits_total", {"node": "d0"}) == 12
    assert registry.get_sample_value("disaggd_prefix_cache_evictions_total", {"node": "d0"}) == 6
    assert registry.get_sample_value("disaggd_num_preemptions_total", {"node": "d1"}) == 4


def test_pushes_of_prefixes_are_counted_by_way_and_outcome(metrics: Metrics, registry: Any) -> None:
    way = {"writer": "d0", "target": "p0"}
    for total in (1, 3):
        metrics.count_prefix_pushes("d0", "p0", "failed", total)
        metrics.count_pushed_prefixes("d0", "p0", 64 * total, 4096 * total)
    assert registry.get_sample_value("disaggd_prefix_pushes_total", {**way, "outcome": "failed"}) == 3
    assert registry.get_sample_value("disaggd_prefix_push_tokens_total", way) == 192
    assert registry.get_sample_value("disaggd_prefix_push_bytes_total", way) == 12288


def test_dropped_frames_are_counted_by_type(metrics: Metrics, registry: Any) -> None:
    metrics.count_dropped_frames("Tokens", 2)
    assert registry.get_sample_value("disaggd_dropped_frames_total", {"frame": "Tokens"}) == 2


# ── docs/metrics.md ──────────────────────────────────────────────────────────────────────────────────────────────────


def documented() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(name, type, labels) of each row."""
    row = re.compile(r"^\| `(disaggd_\w+)`(?: ᵛ)? \| (\w+) \|([\w, ]*)\|")
    for line in PAGE.read_text().splitlines():
        if line.startswith("| `"):
            match = row.match(line)
            assert match is not None, line
            yield match[1], match[2], tuple(sorted(filter(None, match[3].replace(" ", "").split(","))))


def test_the_page_documents_every_metric_with_its_type_and_labels_and_none_that_is_not() -> None:
    rows = list(documented())
    assert len(rows) == len({name for name, _, _ in rows})
    assert sorted(rows) == sorted(exposed(exercise()))


def test_no_metric_is_declared_that_nothing_moves() -> None:
    assert [family.name for family in exercise().collect() if not family.samples] == []


def test_the_page_names_nothing_else_that_looks_like_a_metric() -> None:
    known = {name for name, _, _ in documented()}
    assert {name for name in re.findall(r"disaggd_\w+", PAGE.read_text()) if name != "disaggd_"} <= known
