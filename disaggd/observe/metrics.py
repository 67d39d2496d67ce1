"""Every Prometheus metric of a router, and the verbs that move them. Runs on the router's asyncio thread.

The gateway tells what clients see; the router role tells what the cluster does. Knows neither. Names follow vLLM's where it
has the same thing, with `disaggd_` for `vllm:`. A `reason` is a short code out of a few dozen, never a sentence: each one
is a time series. docs/metrics.md says what each is for; a test compares the two.
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
_LENGTH_BUCKETS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
_ERROR_BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0)


class Metrics:
    """One router's metrics, in a registry of its own: two routers live in one test."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, registry: CollectorRegistry, version: str = "", model: str = "") -> None:
        self._registry = registry
        Gauge("disaggd_info", "1, with what runs here", ["version", "model"], registry=registry).labels(version, model).set(1)
        self._totals: dict[tuple[Counter, tuple[str, ...]], int] = {}
        """Of counts that somebody else keeps: what was told last, by counter and label."""
        self._http_requests = Counter("disaggd_http_requests", "HTTP requests answered", ["route", "status"], registry=registry)
        self._unauthorized = Counter("disaggd_unauthorized", "HTTP requests without a valid API key", ["cause"], registry=registry)
        self._unreadable_keys = Counter(
            "disaggd_unreadable_api_keys", "Changes of the API keys' file that could not be read", registry=registry
        )
        self._key_requests = Counter("disaggd_api_key_requests", "Requests at admission", ["key", "outcome"], registry=registry)
        self._key_tokens = Counter("disaggd_api_key_tokens", "Tokens of requests that are over", ["key", "kind"], registry=registry)
        self._open_requests = Gauge("disaggd_open_requests", "HTTP requests being served", registry=registry)
        self._slow_clients = Counter("disaggd_slow_clients", "Clients cut for their slowness", ["why"], registry=registry)
        self._refused = Counter("disaggd_refused_connections", "Connections closed unheard", ["why"], registry=registry)
        self._first_token_s = _seconds("time_to_first_token", "From a request's arrival to its first token", _FIRST_BUCKETS_S, registry)
        self._inter_token_s = _seconds("inter_token_latency", "Between two deliveries of one sequence", _TOKEN_BUCKETS_S, registry)
        self._request_s = _seconds("e2e_request_latency", "From a request's arrival to its last token", _REQUEST_BUCKETS_S, registry)
        self._declare_tokens(registry)
        self._declare_requests(registry)
        self._declare_queue(registry)
        self._declare_nodes(registry)
        self._declare_caches(registry)

    def _declare_tokens(self, registry: CollectorRegistry) -> None:
        self._prompt_tokens = Counter("disaggd_prompt_tokens", "Prompt tokens of ended requests", registry=registry)
        self._cached_tokens = Counter("disaggd_prompt_tokens_cached", "Prompt tokens not computed again", registry=registry)
        self._generation_tokens = Counter("disaggd_generation_tokens", "Output tokens of ended requests", registry=registry)
        self._prompt_length = _lengths("request_prompt_tokens", "Prompt tokens of a request", registry)
        self._output_length = _lengths("request_generation_tokens", "Output tokens of a request", registry)

    def _declare_requests(self, registry: CollectorRegistry) -> None:
        pair = ["prefill", "decode"]
        self._ended = Counter("disaggd_request_success", "Ended sequences", ["finished_reason"], registry=registry)
        self._decisions = Counter("disaggd_decisions", "Where prompts were prefilled, and why", ["decision", "reason"], registry=registry)
        self._prediction_error = Histogram(
            "disaggd_ttft_prediction_error_ratio",
            "|predicted - actual| / actual, from the decision to the first token",
            ["decision"],
            buckets=_ERROR_BUCKETS,
            registry=registry,
        )
        self._waited_s = _seconds("request_queue_time", "From the decision to the first step of the prompt", _FIRST_BUCKETS_S, registry)
        self._prefill_s = _seconds("request_prefill_time", "Computing prompts", _FIRST_BUCKETS_S, registry)
        self._decode_s = _seconds("request_decode_time", "From first token to last", _REQUEST_BUCKETS_S, registry)
        self._per_token_s = _seconds("request_time_per_output_token", "Decode time per token of a request", _TOKEN_BUCKETS_S, registry)
        self._kv_bytes = Counter("disaggd_kv_transferred_bytes", "KV bytes pushed by handles that ended DONE", pair, registry=registry)
        self._transfer_s = _seconds("kv_transfer_time", "From first handle posted to last handle done", _FIRST_BUCKETS_S, registry, pair)
        self._exposed_s = _seconds("kv_transfer_exposed_time", "Transfer after the first token", _FIRST_BUCKETS_S, registry, pair)
        self._stalled = Gauge("disaggd_num_requests_stalled", "Sequences that stand still now", registry=registry)
        self._stalls = Counter("disaggd_stalled_requests", "Sequences that stood still, by where", ["phase"], registry=registry)
        self._retries = Counter("disaggd_retries", "Sequences placed again after a loss", registry=registry)

    def _declare_queue(self, registry: CollectorRegistry) -> None:
        self._queue_s = _seconds("prefill_queue_time", "In the prefill queue", _FIRST_BUCKETS_S, registry)
        self._queue_depth = Gauge("disaggd_prefill_queue_depth", "Jobs in the prefill queue", registry=registry)
        self._queue_tokens = Gauge("disaggd_prefill_queue_tokens", "Tokens of the jobs in the prefill queue", registry=registry)
        self._queue_oldest_s = Gauge("disaggd_prefill_queue_oldest_seconds", "Since the oldest waiting job's arrival", registry=registry)
        self._queue_drops = Counter("disaggd_prefill_queue_drops", "Jobs that nobody will compute", ["reason"], registry=registry)
        self._dropped_frames = Counter("disaggd_dropped_frames", "Frames of attempts that are over", ["frame"], registry=registry)

    def _declare_nodes(self, registry: CollectorRegistry) -> None:
        self._node_up = Gauge("disaggd_node_up", "Whether the node's link is up", ["node", "role"], registry=registry)
        self._refused_links = Counter("disaggd_refused_links", "Links refused, and who did", ["by", "cause"], registry=registry)
        self._draining = _per_node("node_draining", "Whether the node is about to stop", registry)
        self._slow_thread = _per_node("node_thread_silent_seconds", "Since a thread of it got on, where that is long", registry, "thread")
        self._kv_path_up = Gauge("disaggd_kv_path_up", "Whether KV may be pushed", ["writer", "target"], registry=registry)
        self._blocks = _per_node("kv_blocks", "KV blocks", registry, "state")
        self._usage = _per_node("kv_cache_usage_perc", "Share of the KV blocks that no new sequence could have: 1 is all", registry)
        self._sequences: dict[SequenceState, Gauge] = {
            "running": _per_node("num_requests_running", "Sequences being computed", registry),
            "waiting": _per_node("num_requests_waiting", "Sequences that wait for blocks or a place", registry),
            "queued": _per_node("num_requests_prefilled_elsewhere", "Sequences that wait for a prefill elsewhere", registry),
        }
        self._breakeven = _per_node("breakeven_tokens", "Uncached tokens from which a prefill elsewhere costs less", registry)
        self._backlog = _per_node("prefill_backlog_tokens", "Prompt tokens that wait, or are half computed", registry)
        self._preemptions = Counter("disaggd_num_preemptions", "Sequences preempted for want of blocks", ["node"], registry=registry)
        self._verified = Counter("disaggd_kv_blocks_verified", "Blocks that landed with the right checksums", ["node"], registry=registry)
        self._corrupt = Counter("disaggd_kv_checksum_failures", "Blocks that landed with wrong ones", ["node"], registry=registry)

    def _declare_caches(self, registry: CollectorRegistry) -> None:
        way = ["writer", "target"]
        self._prefix_queries = Counter("disaggd_prefix_cache_queries", "Tokens sought in the prefix cache", ["node"], registry=registry)
        self._prefix_hits = Counter("disaggd_prefix_cache_hits", "Tokens found in the prefix cache", ["node"], registry=registry)
        self._evictions = Counter("disaggd_prefix_cache_evictions", "Cached blocks given to others", ["node"], registry=registry)
        self._prefix_pushes = Counter("disaggd_prefix_pushes", "Prefixes wanted of decode nodes", [*way, "outcome"], registry=registry)
        self._prefix_push_tokens = Counter("disaggd_prefix_push_tokens", "Tokens of prefixes pushed", way, registry=registry)
        self._prefix_push_bytes = Counter("disaggd_prefix_push_bytes", "KV bytes of prefixes pushed", way, registry=registry)
        self._indexed = _per_node("cache_index_blocks", "Blocks that the router knows to be cached there", registry)

    # ── told by the gateway ──────────────────────────────────────────────────────────────────────────────────────────

    def count_http(self, route: str, status: int) -> None:
        """A request was answered; 499 is a client that went before."""
        self._http_requests.labels(route, str(status)).inc()

    def count_unauthorized(self, cause: str, total: int) -> None:
        self._count_to(self._unauthorized, (cause,), total)

    def count_unreadable_keys(self) -> None:
        """The file of API keys has changed, and cannot be read: those that were read last hold on."""
        self._unreadable_keys.inc()

    def count_key_request(self, key: str, outcome: str) -> None:
        """A request of one API key was admitted, or met one of the key's limits."""
        self._key_requests.labels(key, outcome).inc()

    def count_key_tokens(self, key: str, prompt_tokens: int, output_tokens: int) -> None:
        """A request of one API key is over."""
        self._key_tokens.labels(key, "prompt").inc(prompt_tokens)
        self._key_tokens.labels(key, "output").inc(output_tokens)

    def open_request(self) -> AbstractContextManager[None]:
        """A request is being served for as long as the context lasts."""
        return self._open_requests.track_inprogress()

    def count_slow_client(self, why: str) -> None:
        """A client was cut, or its sequence ended, because it sends or reads too slowly."""
        self._slow_clients.labels(why).inc()

    def count_refused_connection(self, why: str) -> None:
        """A connection was closed before its request was looked at."""
        self._refused.labels(why).inc()

    def observe_first_token(self, seconds: float) -> None:
        self._first_token_s.observe(seconds)

    def observe_inter_token(self, seconds: float) -> None:
        """Tokens that come together count once."""
        self._inter_token_s.observe(seconds)

    def observe_request(self, seconds: float) -> None:
        self._request_s.observe(seconds)

    # ── told by the router role: requests ────────────────────────────────────────────────────────────────────────────

    def observe_finish(self, receipt: Receipt) -> None:
        """A sequence has ended, well or not."""
        self._prompt_tokens.inc(receipt.prompt_tokens)
        self._cached_tokens.inc(receipt.num_cached)
        self._generation_tokens.inc(receipt.output_tokens)
        self._prompt_length.observe(receipt.prompt_tokens)
        self._output_length.observe(receipt.output_tokens)
        self._retries.inc(receipt.retries)
        self._ended.labels(receipt.finish_reason or "error").inc()
        if receipt.decision is not None:
            self._decisions.labels(receipt.decision, (receipt.reason or "").partition(":")[0]).inc()
            if receipt.prediction_error is not None:
                self._prediction_error.labels(receipt.decision).observe(abs(receipt.prediction_error))
        self._observe_spans(receipt)
        self._observe_transfer(receipt)

    def _observe_spans(self, receipt: Receipt) -> None:
        spans = receipt.spans_ms
        waited_ms = None if spans.prefill_wait is None else (spans.queue or 0.0) + spans.prefill_wait
        per_token_ms = spans.decode / (receipt.output_tokens - 1) if spans.decode is not None and receipt.output_tokens > 1 else None
        for histogram, span_ms in (
            (self._queue_s, spans.queue),
            (self._waited_s, waited_ms),
            (self._prefill_s, spans.prefill),
            (self._decode_s, spans.decode),
            (self._per_token_s, per_token_ms),
        ):
            if span_ms is not None:
                histogram.observe(span_ms / 1e3)

    def _observe_transfer(self, receipt: Receipt) -> None:
        """Bytes of all attempts go to the pair of the last one that pushed."""
        pairs = [(attempt.prefill_node, attempt.decode_node) for attempt in receipt.attempts if attempt.prefill_node is not None]
        if not pairs:
            return
        spans, (prefill, decode) = receipt.spans_ms, pairs[-1]
        self._kv_bytes.labels(prefill, decode).inc(receipt.kv_bytes)
        if spans.transfer is not None:
            self._transfer_s.labels(prefill, decode).observe(spans.transfer / 1e3)
        if spans.transfer_exposed is not None:
            self._exposed_s.labels(prefill, decode).observe(spans.transfer_exposed / 1e3)

    def set_queue(self, jobs: int, tokens: int, oldest_s: float) -> None:
        """What waits in the prefill queue, and for how long the oldest has."""
        self._queue_depth.set(jobs)
        self._queue_tokens.set(tokens)
        self._queue_oldest_s.set(oldest_s)

    def count_queue_drops(self, reason: str, total: int) -> None:
        """Jobs that left the prefill queue, or were refused, for that reason, since the router's start."""
        self._count_to(self._queue_drops, (reason,), total)

    def set_stalls(self, num_stalled: int, totals: Mapping[str, int]) -> None:
        """How many stand still, and by phase how many ever did, since the router's start."""
        self._stalled.set(num_stalled)
        for phase, total in totals.items():
            self._count_to(self._stalls, (phase,), total)

    def count_dropped_frames(self, frame: str, count: int) -> None:
        """Frames of that type that came for an older attempt, or about a sequence that is over."""
        self._dropped_frames.labels(frame).inc(count)

    # ── told by the router role: nodes ───────────────────────────────────────────────────────────────────────────────

    def set_node(self, node: str, role: str, up: bool) -> None:
        """The node's link is up or down. What is down shows no blocks and no sequences."""
        self._node_up.labels(node, role).set(up)
        if not up:
            for gauge in (
                self._draining,
                self._slow_thread,
                self._blocks,
                self._usage,
                self._backlog,
                self._breakeven,
                self._indexed,
                *self._sequences.values(),
            ):
                gauge.remove_by_labels({"node": node})

    def set_slow_thread(self, node: str, thread: str, seconds: float) -> None:
        """The node's thread has not got on for so long; 0: it does again."""
        self._slow_thread.labels(node, thread).set(seconds)

    def set_draining(self, node: str, is_draining: bool) -> None:
        """It finishes what it has, and takes nothing new."""
        self._draining.labels(node).set(is_draining)

    def set_pair(self, writer: str, target: str, is_ready: bool) -> None:
        """Whether the one node may push KV to the other."""
        self._kv_path_up.labels(writer, target).set(is_ready)

    def count_refused_links(self, by: str, cause: str, total: int) -> None:
        """Since the start of the node or router that refused them."""
        self._count_to(self._refused_links, (by, cause), total)

    def count_prefix_pushes(self, writer: str, target: str, outcome: str, total: int) -> None:
        """Prefixes that the one was asked to push to the other, and what became of them, since the router's start."""
        self._count_to(self._prefix_pushes, (writer, target, outcome), total)

    def count_pushed_prefixes(self, writer: str, target: str, tokens: int, kv_bytes: int) -> None:
        """What came of them, since the router's start."""
        self._count_to(self._prefix_push_tokens, (writer, target), tokens)
        self._count_to(self._prefix_push_bytes, (writer, target), kv_bytes)

    def forget_pair(self, writer: str, target: str) -> None:
        """One of the two is gone."""
        self._kv_path_up.remove(writer, target)

    def set_blocks(self, node: str, counts: Mapping[BlockState, int], num_blocks: int) -> None:
        """Of a pool of `num_blocks`."""
        for state, count in counts.items():
            self._blocks.labels(node, state).set(count)
        self._usage.labels(node).set(1 - (counts["free"] + counts["cached"]) / num_blocks)

    def set_sequences(self, node: str, counts: Mapping[SequenceState, int]) -> None:
        for state, count in counts.items():
            self._sequences[state].labels(node).set(count)

    def set_backlog(self, node: str, num_tokens: int) -> None:
        """Prompt tokens that wait in the node's engine, or are half computed there."""
        self._backlog.labels(node).set(num_tokens)

    def set_breakeven(self, node: str, num_tokens: int) -> None:
        """From so many uncached tokens on a prompt would have cost less elsewhere when the decode node last decided."""
        self._breakeven.labels(node).set(num_tokens)

    def set_indexed(self, node: str, num_blocks: int) -> None:
        """Blocks that the router's index has of the node."""
        self._indexed.labels(node).set(num_blocks)

    def count_preemptions(self, node: str, total: int) -> None:
        """`total` is the node's own count since its start; so are those of the next."""
        self._count_to(self._preemptions, (node,), total)

    def count_verified(self, node: str, *, blocks: int, failures: int) -> None:
        """Totals of the node, as above."""
        self._count_to(self._verified, (node,), blocks)
        self._count_to(self._corrupt, (node,), failures)

    def count_prefixes(self, node: str, *, queried_tokens: int, hit_tokens: int, evicted_blocks: int) -> None:
        self._count_to(self._prefix_queries, (node,), queried_tokens)
        self._count_to(self._prefix_hits, (node,), hit_tokens)
        self._count_to(self._evictions, (node,), evicted_blocks)

    def _count_to(self, counter: Counter, labels: tuple[str, ...], total: int) -> None:
        """A total that falls begins anew."""
        seen = self._totals.get((counter, labels), 0)
        counter.labels(*labels).inc(total - seen if total >= seen else total)
        self._totals[counter, labels] = total

    def render(self) -> bytes:
        """The exposition that `/metrics` serves, of type `content_type`."""
        return generate_latest(self._registry)


def _seconds(name: str, what: str, buckets: tuple[float, ...], registry: CollectorRegistry, labels: list[str] | None = None) -> Histogram:
    return Histogram(f"disaggd_{name}_seconds", what, labels or [], buckets=buckets, registry=registry)


def _lengths(name: str, what: str, registry: CollectorRegistry) -> Histogram:
    return Histogram(f"disaggd_{name}", what, buckets=_LENGTH_BUCKETS, registry=registry)


def _per_node(name: str, what: str, registry: CollectorRegistry, *labels: str) -> Gauge:
    return Gauge(f"disaggd_{name}", what, ["node", *labels], registry=registry)
