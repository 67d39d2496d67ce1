"""A router's metrics after everything that can happen has happened once: for whoever compares them with what is written of them."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry

from disaggd.observe.metrics import Metrics
from tests.support.receipts import remote_receipt


def exercise() -> CollectorRegistry:
    """Every verb of `Metrics`, called once."""
    registry = CollectorRegistry()
    metrics = Metrics(registry, "1.0", "tiny")
    metrics.count_http("/v1/completions", 200)
    metrics.count_unauthorized("wrong", 1)
    metrics.count_unreadable_keys()
    metrics.count_key_request("alice", "admitted")
    metrics.count_key_tokens("alice", 100, 10)
    metrics.count_slow_client("stalled")
    metrics.count_refused_connection("too_many")
    with metrics.open_request():
        metrics.observe_first_token(0.1)
        metrics.observe_inter_token(0.01)
        metrics.observe_request(1.0)
    metrics.observe_finish(remote_receipt())
    metrics.set_queue(1, 100, 0.5)
    metrics.set_stalls(1, {"queued": 1})
    metrics.count_queue_drops("full", 1)
    metrics.count_prefix_pushes("d0", "p0", "landed", 1)
    metrics.count_pushed_prefixes("d0", "p0", 64, 4096)
    metrics.count_dropped_frames("Tokens", 1)
    metrics.set_node("d0", "decode", True)
    metrics.set_slow_thread("d0", "compute", 12.0)
    metrics.set_draining("d0", True)
    metrics.set_pair("p0", "d0", True)
    metrics.count_refused_links("p0", "secret", 1)
    metrics.set_blocks("d0", {"free": 1, "cached": 1, "used": 1, "granted": 1, "held": 1, "quarantined": 1}, 6)
    metrics.set_sequences("d0", {"waiting": 1, "running": 1, "queued": 1})
    metrics.set_backlog("d0", 100)
    metrics.set_indexed("d0", 1)
    metrics.set_breakeven("d0", 700)
    metrics.count_preemptions("d0", 1)
    metrics.count_verified("d0", blocks=28, failures=1)
    metrics.count_prefixes("d0", queried_tokens=100, hit_tokens=50, evicted_blocks=1)
    return registry


def exposed(registry: CollectorRegistry) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(name as PromQL has it, type, labels) of each metric."""
    for family in registry.collect():
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        yield family.name + ("_total" if family.type == "counter" else ""), family.type, tuple(sorted(labels))
