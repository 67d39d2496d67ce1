"""Local or remote: where a prompt is prefilled. Pure functions; the decode node decides, because it knows its own cache.

Knows no node, no link and no clock.
"""

from typing import Literal

import msgspec

Policy = Literal["threshold", "always", "never"]
Override = Literal["auto", "local", "remote"]


class DecisionRule(msgspec.Struct, frozen=True, kw_only=True):
    """What the configuration says."""

    policy: Policy = "threshold"
    max_local_prefill_tokens: int = 512
    max_prefill_queue: int = 16


class Decision(msgspec.Struct, frozen=True):
    """The verdict, and what explains it in the receipt: `code: sentence`. Metrics count the code."""

    remote: bool
    reason: str


def decide(
    rule: DecisionRule,
    num_uncached: int,
    *,
    prefill_nodes: int,
    queue_depth: int,
    override: Override = "auto",
    max_remote_tokens: int | None = None,
) -> Decision:
    """Remote iff more than `max_local_prefill_tokens` tokens are uncached and the prefill queue is shorter than its limit.

    `prefill_nodes` counts those that this decode node can receive from now; with none of them every policy is local. So it is for
    more than `max_remote_tokens`, which the node has no memory to receive.
    """
    if override == "local":
        return Decision(False, "requested: local prefill")
    if rule.policy == "never" and override != "remote":
        return Decision(False, "policy: never remote")
    if prefill_nodes == 0:
        return Decision(False, "no_prefill_node: none is reachable")
    if max_remote_tokens is not None and num_uncached > max_remote_tokens:
        return Decision(False, f"staging: {num_uncached} uncached tokens > {max_remote_tokens} that can be received")
    if override == "remote":
        return Decision(True, "requested: remote prefill")
    if rule.policy == "always":
        return Decision(True, "policy: always remote")
    if num_uncached <= rule.max_local_prefill_tokens:
        return Decision(False, f"short: {num_uncached} uncached tokens ≤ {rule.max_local_prefill_tokens}")
    if queue_depth >= rule.max_prefill_queue:
        return Decision(False, f"queue_full: {queue_depth} jobs wait ≥ {rule.max_prefill_queue}")
    return Decision(True, f"long: {num_uncached} uncached tokens > {rule.max_local_prefill_tokens}")
