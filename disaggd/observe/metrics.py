"""Every Prometheus metric of a router, and the verbs that move them. Runs on the router's asyncio thread.

The gateway tells what clients see; the router role tells what the cluster does. Knows neither. Names follow vLLM's where it
has the same thing, with `disaggd_` for `vllm:`. A `reason` is a short code out of a few dozen, never a sentence: each one
is a time series.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from disaggd.observe.receipts import Receipt

BlockState = Literal["free", "cached", "used", "granted", "held", "quarantined"]
SequenceState = Literal["waiting", "running", "queued"]

_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_FIRST_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_REQUEST_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)


class Metrics:
    """One router's metrics, in a registry of its own: two routers live in one test."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._http_requests = Counter("disaggd_http_requests", "HTTP requests answered", ["route", "status"], registry=registry)
        self._open_requests = Gauge("disaggd_open_requests", "HTTP requests being served", registry=registry)
        self._first_token_s = _seconds("time_to_first_token", "From a request's arrival to its first token", _FIRST_BUCKETS_S, registry)
        self._inter_token_s = _seconds("inter_token_latency", "Between two deliveries of one sequence", _TOKEN_BUCKETS_S, registry)
        self._request_s = _seconds("e2e_request_latency", "From a request's arrival to its last token", _REQUEST_BUCKETS_S, registry)
        self._declare_receipts(registry)
        self._declare_cluster(registry)

    def _declare_receipts(self, registry: CollectorRegistry) -> None:
        self._prompt_tokens = Counter("disaggd_prompt_tokens", "Prompt tokens of ended requests", registry=registry)
        self._cached_tokens = Counter("disaggd_prompt_tokens_cached", "Prompt tokens not computed again", registry=registry)
        self._generation_tokens = Counter("disaggd_generation_tokens", "Output tokens of ended requests", registry=registry)
        self._finished = Counter("disaggd_request_finished", "Ended sequences", ["finished_reason"], registry=registry)
        self._decisions = Counter("disaggd_decisions", "Where prompts were prefilled, and why", ["decision", "reason"], registry=registry)
        self._kv_bytes = Counter("disaggd_kv_transferred_bytes", "KV bytes pushed by handles that ended DONE", registry=registry)
        self._queue_s = _seconds("request_queue_time", "In the prefill queue", _FIRST_BUCKETS_S, registry)
        self._prefill_s = _seconds("request_prefill_time", "Computing prompts", _FIRST_BUCKETS_S, registry)
        self._decode_s = _seconds("request_decode_time", "From first token to last", _REQUEST_BUCKETS_S, registry)
        self._transfer_s = _seconds("kv_transfer_time", "From first handle posted to last handle done", _FIRST_BUCKETS_S, registry)
        self._exposed_s = _seconds("kv_transfer_exposed_time", "Transfer after the first token", _FIRST_BUCKETS_S, registry)

    def _declare_cluster(self, registry: CollectorRegistry) -> None:
        self._node_up = Gauge("disaggd_node_up", "Whether the node's link is up", ["node", "role"], registry=registry)
        self._kv_path_up = Gauge("disaggd_kv_path_up", "Whether KV may be pushed", ["prefill", "decode"], registry=registry)
        self._blocks = Gauge("disaggd_kv_blocks", "KV blocks", ["node", "state"], registry=registry)
        self._sequences = Gauge("disaggd_sequences", "Sequences in a node's engine", ["node", "state"], registry=registry)
        self._queue_depth = Gauge("disaggd_prefill_queue_depth", "Jobs in the prefill queue", registry=registry)
        self._preemptions = Counter("disaggd_num_preemptions", "Sequences preempted for want of blocks", ["node"], registry=registry)
        self._seen_preemptions: dict[str, int] = {}
        self._retries = Counter("disaggd_retries", "Sequences placed again after a loss", registry=registry)
        self._dropped_frames = Counter("disaggd_dropped_frames", "Frames of attempts that are over", ["frame"], registry=registry)

    # ── told by the gateway ──────────────────────────────────────────────────────────────────────────────────────────

    def count_http(self, route: str, status: int) -> None:
        """A request was answered; 499 is a client that went before."""
        self._http_requests.labels(route, str(status)).inc()

    def open_request(self) -> AbstractContextManager[None]:
        """A request is being served for as long as the context lasts."""
        return self._open_requests.track_inprogress()

    def observe_first_token(self, seconds: float) -> None:
        self._first_token_s.observe(seconds)

    def observe_inter_token(self, seconds: float) -> None:
        self._inter_token_s.observe(seconds)

    def observe_request(self, seconds: float) -> None:
        self._request_s.observe(seconds)

    # ── told by the router role ──────────────────────────────────────────────────────────────────────────────────────

    def observe_finish(self, receipt: Receipt) -> None:
        """A sequence has ended, well or not."""
        self._prompt_tokens.inc(receipt.prompt_tokens)
        self._cached_tokens.inc(receipt.num_cached)
        self._generation_tokens.inc(receipt.output_tokens)
        self._kv_bytes.inc(receipt.kv_bytes)
        self._retries.inc(receipt.retries)
        self._finished.labels(receipt.finish_reason or "error").inc()
        if receipt.decision is not None:
            self._decisions.labels(receipt.decision, (receipt.reason or "").partition(":")[0]).inc()
        self._observe_spans(receipt)

    def _observe_spans(self, receipt: Receipt) -> None:
        spans = receipt.spans_ms
        for histogram, span_ms in (
            (self._queue_s, spans.queue),
            (self._prefill_s, spans.prefill),
            (self._decode_s, spans.decode),
            (self._transfer_s, spans.transfer),
            (self._exposed_s, spans.transfer_exposed),
        ):
            if span_ms is not None:
                histogram.observe(span_ms / 1e3)

    def set_node(self, node: str, role: str, up: bool) -> None:
        """The node's link is up or down. What is down shows no blocks and no sequences."""
        self._node_up.labels(node, role).set(up)
        if not up:
            self._blocks.remove_by_labels({"node": node})
            self._sequences.remove_by_labels({"node": node})

    def set_pair(self, prefill: str, decode: str, is_ready: bool) -> None:
        """Whether the prefill node may push to the decode node."""
        self._kv_path_up.labels(prefill, decode).set(is_ready)

    def forget_pair(self, prefill: str, decode: str) -> None:
        """One of the two is gone."""
        self._kv_path_up.remove(prefill, decode)

    def set_blocks(self, node: str, counts: Mapping[BlockState, int]) -> None:
        for state, count in counts.items():
            self._blocks.labels(node, state).set(count)

    def set_sequences(self, node: str, counts: Mapping[SequenceState, int]) -> None:
        for state, count in counts.items():
            self._sequences.labels(node, state).set(count)

    def set_queue_depth(self, jobs: int) -> None:
        self._queue_depth.set(jobs)

    def count_preemptions(self, node: str, total: int) -> None:
        """`total` is the node's own count, which begins anew with the node."""
        seen = self._seen_preemptions.get(node, 0)
        self._preemptions.labels(node).inc(total - seen if total >= seen else total)
        self._seen_preemptions[node] = total

    def count_dropped_frames(self, frame: str, count: int) -> None:
        """Frames of that type that came for an older attempt, or about a sequence that is over."""
        self._dropped_frames.labels(frame).inc(count)

    def render(self) -> bytes:
        """The exposition that `/metrics` serves, of type `content_type`."""
        return generate_latest(self._registry)


def _seconds(name: str, what: str, buckets: tuple[float, ...], registry: CollectorRegistry) -> Histogram:
    return Histogram(f"disaggd_{name}_seconds", what, buckets=buckets, registry=registry)
