"""Local or remote, and the code that says why."""

import pytest

from disaggd.cluster.decision import DecisionRule, Override, Policy, decide

LONG, SHORT = 513, 512


def code(
    num_uncached: int,
    policy: Policy = "threshold",
    override: Override = "auto",
    nodes: int = 1,
    depth: int = 0,
    max_remote_tokens: int | None = None,
) -> tuple[bool, str]:
    rule = DecisionRule(policy=policy)
    decision = decide(rule, num_uncached, prefill_nodes=nodes, queue_depth=depth, override=override, max_remote_tokens=max_remote_tokens)
    return decision.remote, decision.reason.partition(":")[0]


def test_the_threshold_is_the_last_local_length() -> None:
    assert code(SHORT) == (False, "short")
    assert code(LONG) == (True, "long")


def test_a_full_queue_makes_long_prompts_local() -> None:
    assert code(LONG, depth=15) == (True, "long")
    assert code(LONG, depth=16) == (False, "queue_full")


@pytest.mark.parametrize("policy", ["threshold", "always", "never"])
@pytest.mark.parametrize("override", ["auto", "local", "remote"])
def test_without_a_prefill_node_every_policy_and_every_wish_is_local(policy: Policy, override: Override) -> None:
    assert not code(LONG, policy, override, nodes=0)[0]


def test_the_reason_names_the_missing_prefill_node() -> None:
    assert code(LONG, nodes=0) == (False, "no_prefill_node")


def test_always_and_never_look_at_no_length_and_no_queue() -> None:
    assert code(1, "always", depth=99) == (True, "policy")
    assert code(10_000, "never") == (False, "policy")


@pytest.mark.parametrize("policy", ["threshold", "always", "never"])
def test_a_requests_own_wish_wins_over_any_policy(policy: Policy) -> None:
    assert code(LONG, policy, "local") == (False, "requested")
    assert code(1, policy, "remote", depth=99) == (True, "requested")


@pytest.mark.parametrize("policy", ["threshold", "always"])
@pytest.mark.parametrize("override", ["auto", "remote"])
def test_what_cannot_be_received_at_once_is_local_whatever_is_wished(policy: Policy, override: Override) -> None:
    assert code(LONG, policy, override, max_remote_tokens=LONG)[0]
    assert code(LONG, policy, override, max_remote_tokens=LONG - 1) == (False, "staging")


def test_the_reason_says_how_much_can_be_received() -> None:
    decision = decide(DecisionRule(), 9000, prefill_nodes=1, queue_depth=0, max_remote_tokens=6912)
    assert decision.reason == "staging: 9000 uncached tokens > 6912 that can be received"
