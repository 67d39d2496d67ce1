"""Writes deploy/grafana/disaggd.json: `python tools/dashboard.py`. Panels are data here; Grafana's JSON is made of them.

With several routers each tells of all nodes, and of its own requests: what nodes have is a `max` over routers, what requests
do a `sum`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent.parent / "deploy" / "grafana" / "disaggd.json"
COLUMNS = 24
HEIGHT = 8
PER_LINE = 3
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
RATE = "[$__rate_interval]"
NODES = '{node=~"$node"}'


@dataclass(frozen=True)
class Query:
    """One expression and what its series are called."""

    expression: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One graph."""

    title: str
    description: str
    unit: str
    """Of Grafana's unit ids."""
    queries: tuple[Query, ...]
    is_stacked: bool = False
    most: float | None = None


def rate(metric: str, by: str = "", where: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{where}{RATE}))"


def quantiles(metric: str, *shares: float, by: str = "") -> tuple[Query, ...]:
    """Of a histogram; `by` is a label that its series are told apart by."""
    labels = f"le, {by}" if by else "le"
    name = f"{{{{{by}}}}} " if by else ""
    rates = f"sum by ({labels}) (rate({metric}_bucket{RATE}))"
    return tuple(Query(f"histogram_quantile({share}, {rates})", f"{name}p{share * 100:g}") for share in shares)


def of_nodes(metric: str, by: str = "node") -> str:
    return f"max by ({by}) ({metric}{NODES})"


def pair_quantiles(metric: str, *shares: float) -> tuple[Query, ...]:
    return tuple(
        Query(
            f"histogram_quantile({share}, sum by (le, prefill, decode) (rate({metric}_bucket{RATE})))",
            f"{{{{prefill}}}} → {{{{decode}}}} p{share * 100:g}",
        )
        for share in shares
    )


ROWS: dict[str, tuple[Panel, ...]] = {
    "What users see": (
        Panel(
            "Time to first token",
            "From a request's arrival. Grows with the prefill queue and with longer prompts.",
            "s",
            quantiles("disaggd_time_to_first_token_seconds", 0.5, 0.9, 0.99),
        ),
        Panel(
            "Inter-token latency",
            "Between two deliveries to a stream. Its tail is local prefills, preemptions, and transfers that end after the first token.",
            "s",
            quantiles("disaggd_inter_token_latency_seconds", 0.5, 0.9, 0.99),
        ),
        Panel(
            "Whole requests",
            "From arrival to last token, and per output token.",
            "s",
            (
                *quantiles("disaggd_e2e_request_latency_seconds", 0.5, 0.99),
                Query(quantiles("disaggd_request_time_per_output_token_seconds", 0.5)[0].expression, "per output token p50"),
            ),
        ),
        Panel(
            "Requests",
            "Ended per second, by how. error and abort deserve a look.",
            "reqps",
            (Query(rate("disaggd_request_success_total", "finished_reason"), "{{finished_reason}}"),),
            is_stacked=True,
        ),
        Panel(
            "Tokens",
            "Of ended requests, per second.",
            "short",
            (
                Query(rate("disaggd_prompt_tokens_total"), "prompt"),
                Query(rate("disaggd_prompt_tokens_cached_total"), "of them cached"),
                Query(rate("disaggd_generation_tokens_total"), "output"),
            ),
        ),
        Panel(
            "Refusals",
            "429: the prefill queue or max_requests is full. 503: no decode node. 499: the client left first.",
            "reqps",
            (Query(rate("disaggd_http_requests_total", "status", '{status!~"2.."}'), "{{status}}"),),
        ),
        Panel("Open requests", "Near max_requests the next ones are refused.", "short", (Query("sum (disaggd_open_requests)", "open"),)),
        Panel(
            "Refused for their API key",
            "Wrong: a client whose key was withdrawn, or somebody who guesses. Limits: a client that does not hold back.",
            "reqps",
            (
                Query(rate("disaggd_unauthorized_total", "cause"), "{{cause}}"),
                Query(rate("disaggd_unreadable_api_keys_total"), "the keys' file cannot be read"),
                Query(rate("disaggd_api_key_requests_total", "key, outcome", '{outcome!="admitted"}'), "{{key}}: {{outcome}}"),
            ),
        ),
        Panel(
            "Tokens by API key",
            "Of requests that are over.",
            "short",
            (Query(rate("disaggd_api_key_tokens_total", "key, kind"), "{{key}}: {{kind}}"),),
        ),
        Panel(
            "Stalled",
            "Sequences that stand still now; and those that began to, per second, by where. The routers' logs name them.",
            "short",
            (
                Query("sum (disaggd_num_requests_stalled)", "now"),
                Query(rate("disaggd_stalled_requests_total", "phase"), "per second: {{phase}}"),
            ),
        ),
        Panel(
            "Clients that were cut",
            "They sent or read too slowly, or their connection was closed unheard.",
            "reqps",
            (
                Query(rate("disaggd_slow_clients_total", "why"), "{{why}}"),
                Query(rate("disaggd_refused_connections_total", "why"), "{{why}}"),
            ),
        ),
    ),
    "The decision": (
        Panel(
            "Where prompts were prefilled, and why",
            "queue_full, no_prefill_node and retries mean that prefill nodes are missing or failing.",
            "reqps",
            (Query(rate("disaggd_decisions_total", "decision, reason"), "{{decision}}: {{reason}}"),),
            is_stacked=True,
        ),
        Panel(
            "Prediction error of the time to first token",
            "Share of the actual time. Over 0.5 at p90 the cost model does not follow the load.",
            "percentunit",
            quantiles("disaggd_ttft_prediction_error_ratio", 0.5, 0.9, by="decision"),
        ),
        Panel(
            "Break-even",
            "From so many uncached tokens on a prompt would have cost less elsewhere when its decode node last decided.",
            "short",
            (Query(of_nodes("disaggd_breakeven_tokens"), "{{node}}"),),
        ),
        Panel(
            "Where the time went",
            "Medians of the parts of a request.",
            "s",
            (
                Query(quantiles("disaggd_request_queue_time_seconds", 0.5)[0].expression, "waits for its prefill"),
                Query(quantiles("disaggd_request_prefill_time_seconds", 0.5)[0].expression, "prefill"),
                Query(quantiles("disaggd_request_decode_time_seconds", 0.5)[0].expression, "decode"),
            ),
        ),
        Panel(
            "Lengths",
            "Medians and tails of prompts and outputs.",
            "short",
            (
                *(Query(one.expression, f"prompt {one.legend}") for one in quantiles("disaggd_request_prompt_tokens", 0.5, 0.9)),
                *(Query(one.expression, f"output {one.legend}") for one in quantiles("disaggd_request_generation_tokens", 0.5, 0.9)),
            ),
        ),
    ),
    "The prefill queue": (
        Panel(
            "Jobs that wait",
            "Stays up: too few prefill nodes, or a decode node without room.",
            "short",
            (Query("sum (disaggd_prefill_queue_depth)", "jobs"),),
        ),
        Panel("Tokens that wait", "Of those jobs.", "short", (Query("sum (disaggd_prefill_queue_tokens)", "tokens"),)),
        Panel(
            "Time in the queue",
            "And since the arrival of the oldest that waits now.",
            "s",
            (
                *quantiles("disaggd_prefill_queue_time_seconds", 0.5, 0.99),
                Query("max (disaggd_prefill_queue_oldest_seconds)", "oldest waiting"),
            ),
        ),
        Panel(
            "Drops and retries",
            "Jobs that nobody will compute, and attempts that came to nothing.",
            "reqps",
            (Query(rate("disaggd_prefill_queue_drops_total", "reason"), "{{reason}}"), Query(rate("disaggd_retries_total"), "retries")),
        ),
        Panel(
            "Late frames",
            "About attempts that are over: a few come with every abort and retry.",
            "short",
            (Query(rate("disaggd_dropped_frames_total", "frame"), "{{frame}}"),),
        ),
    ),
    "KV blocks": (
        Panel(
            "Blocks by state",
            "Of the chosen nodes together. Quarantined for more than seconds: a prefill node hangs.",
            "short",
            (Query(f"sum by (state) (max by (node, state) (disaggd_kv_blocks{NODES}))", "{{state}}"),),
            is_stacked=True,
        ),
        Panel(
            "Pool in use",
            "Neither free nor cached. Near 1, preemptions follow.",
            "percentunit",
            (Query(of_nodes("disaggd_kv_cache_usage_perc"), "{{node}}"),),
            most=1,
        ),
        Panel(
            "Preemptions",
            "Sequences that will be computed again for want of blocks.",
            "short",
            (Query(f"max by (node) (rate(disaggd_num_preemptions_total{NODES}{RATE}))", "{{node}}"),),
        ),
        Panel(
            "Verified blocks",
            "Blocks that landed with right and with wrong checksums, with [transfer] verify. Any wrong one is a fault of a host.",
            "short",
            (
                Query(f"sum(max by (node) (rate(disaggd_kv_blocks_verified_total{NODES}{RATE})))", "right"),
                Query(f"max by (node) (rate(disaggd_kv_checksum_failures_total{NODES}{RATE}))", "wrong at {{node}}"),
            ),
        ),
    ),
    "Prefix cache": (
        Panel(
            "Hit rate",
            "Tokens found, of those of the sequences that a node admitted or granted.",
            "percentunit",
            (
                Query(
                    f"max by (node) (rate(disaggd_prefix_cache_hits_total{NODES}{RATE})) / "
                    f"max by (node) (rate(disaggd_prefix_cache_queries_total{NODES}{RATE}) > 0)",
                    "{{node}}",
                ),
            ),
            most=1,
        ),
        Panel(
            "Evictions",
            "Cached blocks given to other sequences, per second. As fast as prompts come: the pool holds no working set.",
            "short",
            (Query(f"max by (node) (rate(disaggd_prefix_cache_evictions_total{NODES}{RATE}))", "{{node}}"),),
        ),
        Panel(
            "Blocks that the router routes by",
            "What its index has of each node.",
            "short",
            (Query(of_nodes("disaggd_cache_index_blocks"), "{{node}}"),),
        ),
    ),
    "Transfer": (
        Panel(
            "KV moved",
            "Per pair of nodes.",
            "Bps",
            (Query(rate("disaggd_kv_transferred_bytes_total", "prefill, decode"), "{{prefill}} → {{decode}}"),),
        ),
        Panel(
            "Transfer time",
            "From first write to last, most of it beside the prefill.",
            "s",
            pair_quantiles("disaggd_kv_transfer_time_seconds", 0.5, 0.99),
        ),
        Panel(
            "Exposed transfer",
            "What came after the first token: the gap before the second.",
            "s",
            pair_quantiles("disaggd_kv_transfer_exposed_time_seconds", 0.5, 0.99),
        ),
        Panel(
            "Prefixes pushed back",
            "KV of prompts' beginnings, from decode nodes to prefill nodes that lacked them; and the tokens that were not computed.",
            "short",
            (
                Query(rate("disaggd_prefix_push_bytes_total", "writer, target"), "bytes {{writer}} → {{target}}"),
                Query(rate("disaggd_prefix_push_tokens_total", "writer, target"), "tokens {{writer}} → {{target}}"),
            ),
        ),
        Panel(
            "Prefix pushes",
            "What became of them; where they did not land the tokens were computed.",
            "short",
            (Query(rate("disaggd_prefix_pushes_total", "outcome"), "{{outcome}}"),),
        ),
        Panel(
            "KV paths",
            "1: the one node may push to the other.",
            "short",
            (Query("max by (writer, target) (disaggd_kv_path_up)", "{{writer}} → {{target}}"),),
            most=1,
        ),
    ),
    "Nodes": (
        Panel(
            "Links",
            "1: the router has a link to the node; and the node is about to stop.",
            "short",
            (
                Query(of_nodes("disaggd_node_up", "node, role"), "{{node}} ({{role}})"),
                Query(f"{of_nodes('disaggd_node_draining')} > 0", "{{node}}: draining"),
            ),
            most=1,
        ),
        Panel(
            "Refused links",
            "By the node or router that refused. With every node up somebody else tries; else the log of either end says what differs.",
            "reqps",
            (Query(rate("disaggd_refused_links_total", "by, cause"), "{{by}}: {{cause}}"),),
        ),
        Panel(
            "Threads that do not get on",
            "For so long a node's compute or transfer thread has been in one layer, or one call. At stuck_s the node ends.",
            "s",
            (Query(f"{of_nodes('disaggd_node_thread_silent_seconds', 'node, thread')} > 0", "{{node}}: {{thread}}"),),
        ),
        Panel("Running", "Sequences that engines compute.", "short", (Query(of_nodes("disaggd_num_requests_running"), "{{node}}"),)),
        Panel(
            "Waiting",
            "In engines, for blocks or a place; and at decode nodes, for a prefill elsewhere.",
            "short",
            (
                Query(of_nodes("disaggd_num_requests_waiting"), "{{node}}"),
                Query(f"{of_nodes('disaggd_num_requests_prefilled_elsewhere')} > 0", "{{node}}: prefilled elsewhere"),
            ),
        ),
        Panel(
            "Prompt tokens in engines",
            "That wait, or are half computed.",
            "short",
            (Query(of_nodes("disaggd_prefill_backlog_tokens"), "{{node}}"),),
        ),
        Panel(
            "Routers",
            "CPU seconds per second: a router is one thread.",
            "percentunit",
            (Query(f"rate(process_cpu_seconds_total{RATE}) and on (instance) disaggd_info", "{{instance}}"),),
        ),
        Panel(
            "Memory of routers",
            "Resident.",
            "bytes",
            (Query("process_resident_memory_bytes and on (instance) disaggd_info", "{{instance}}"),),
        ),
    ),
}


def dashboard() -> dict[str, Any]:
    return {
        "uid": "disaggd",
        "title": "disaggd",
        "description": "What users see, and where in the cluster it comes from. docs/metrics.md explains each metric.",
        "tags": ["disaggd", "llm"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_datasource(), _nodes()]},
        "annotations": {"list": []},
        "panels": list(_panels()),
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "refresh": 1, "hide": 0}


def _nodes() -> dict[str, Any]:
    return {
        "name": "node",
        "label": "Nodes",
        "type": "query",
        "datasource": DATASOURCE,
        "definition": "label_values(disaggd_node_up, node)",
        "query": {"query": "label_values(disaggd_node_up, node)", "refId": "nodes"},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "hide": 0,
    }


def _panels() -> Iterator[dict[str, Any]]:
    number, y = 0, 0
    for title, panels in ROWS.items():
        number += 1
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": _place(0, y, COLUMNS, 1)}
        y += 1
        for index, panel in enumerate(panels):
            number += 1
            width = COLUMNS // PER_LINE
            line, column = divmod(index, PER_LINE)
            yield _panel(number, panel, _place(column * width, y + line * HEIGHT, width, HEIGHT))
        y += -(-len(panels) // PER_LINE) * HEIGHT


def _place(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "min": 0,
        "color": {"mode": "palette-classic"},
        "custom": {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 30 if panel.is_stacked else 5,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.is_stacked else "none", "group": "A"},
        },
    }
    if panel.most is not None:
        defaults["max"] = panel.most
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": DATASOURCE, "expr": query.expression, "legendFormat": query.legend}
            for index, query in enumerate(panel.queries)
        ],
    }


if __name__ == "__main__":
    TARGET.write_text(json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
