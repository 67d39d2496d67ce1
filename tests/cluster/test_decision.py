"""Local or remote, and the code that says why."""

import msgspec
import pytest

from disaggd.cluster.decision import (
    FORGOTTEN,
    MAX_TOKENS,
    UNTRIED,
    Decision,
    DecisionRule,
    LocalSide,
    Override,
    Policy,
    Situation,
    breakeven_tokens,
    decide,
)
from disaggd.cluster.offer import PrefillCost, RemoteOffer, TransferCost
from disaggd.ids import NodeName

LONG, SHORT = 513, 512
COST = PrefillCost(0.005, 0.4e-3, 0.0)
UNHURRIED = 100.0
"""A TTFT target that nothing puts at risk: seconds decide alone."""
FIXED: list[Policy] = ["threshold", "always", "never"]
ALL: list[Policy] = ["adaptive", *FIXED]


def offer(
    depth: int = 0, full: bool = False, wait: float = 0.0, cached: int = 0, slowness: float = 1.0, per_byte: float = 1e-9
) -> RemoteOffer:
    """Of a prefill node as fast as we are, times `slowness`."""
    cost = PrefillCost(*(slowness * getattr(COST, field) for field in COST.__struct_fields__))
    return RemoteOffer(NodeName("p0"), 1, depth, full, wait, cached, cost, TransferCost(0.002, per_byte), may_grant=False)


def idle(**change: float) -> LocalSide:
    waits = {"wait_s": change.get("backlog_s", 0.0)}
    side = LocalSide(prefill_cost=COST, backlog_s=0.0, wait_s=0.0, num_decodes=0, step_s=0.0, share_s=0.2, breaks_itl=False)
    return msgspec.structs.replace(side, **(waits | change))


def busy(num_decodes: int = 8, **change: float) -> LocalSide:
    """Beside decodes: steps of 15 ms, of another 15 ms for a prompt."""
    return idle(num_decodes=num_decodes, step_s=0.015, share_s=0.015, **change)


def situation(num_tokens: int, **change: object) -> Situation:
    base = Situation(num_tokens=num_tokens, offer=offer(), ttft_target_s=2.0, bytes_per_token=12_288, local=idle())
    return msgspec.structs.replace(base, **change)


def verdict(policy: Policy, asked: Situation) -> tuple[bool, str]:
    decision = decide(DecisionRule(policy=policy), asked)
    return decision.remote, decision.reason.partition(":")[0]


# ── what every policy has in common, and the fixed ones ──────────────────────────────────────────────────────────────


def code(
    num_tokens: int, policy: Policy = "threshold", override: Override = "auto", depth: int = 0, max_remote_tokens: int | None = None
) -> tuple[bool, str]:
    return verdict(policy, situation(num_tokens, offer=offer(depth), override=override, max_remote_tokens=max_remote_tokens))


def test_the_threshold_is_the_last_local_length_of_what_is_not_cached() -> None:
    assert code(SHORT) == (False, "short")
    assert code(LONG) == (True, "long")
    assert verdict("threshold", situation(LONG + 64, num_cached=65)) == (False, "short")


def test_a_full_queue_makes_long_prompts_local() -> None:
    assert code(LONG, depth=15) == (True, "long")
    assert code(LONG, depth=16) == (False, "queue_full")


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("override", ["auto", "local", "remote"])
def test_without_a_prefill_node_every_policy_and_every_wish_is_local(policy: Policy, override: Override) -> None:
    assert not verdict(policy, situation(LONG, offer=None, override=override))[0]


def test_the_reason_names_the_missing_prefill_node() -> None:
    assert verdict("threshold", situation(LONG, offer=None)) == (False, "no_prefill_node")
    assert verdict("adaptive", situation(LONG, offer=None)) == (False, "no_prefill_node")


def test_always_and_never_look_at_no_length_and_no_queue() -> None:
    assert code(1, "always", depth=99) == (True, "policy")
    assert code(10_000, "never") == (False, "policy")


@pytest.mark.parametrize("policy", ALL)
def test_a_requests_own_wish_wins_over_any_policy(policy: Policy) -> None:
    assert code(LONG, policy, "local") == (False, "requested")
    assert code(1, policy, "remote", depth=99) == (True, "requested")


@pytest.mark.parametrize("policy", ["adaptive", "threshold", "always"])
@pytest.mark.parametrize("override", ["auto", "remote"])
def test_what_cannot_be_received_at_once_is_local_whatever_is_wished(policy: Policy, override: Override) -> None:
    remote = situation(LONG, override=override, local=busy(), max_remote_tokens=LONG)
    assert verdict(policy, remote)[0]
    assert verdict(policy, msgspec.structs.replace(remote, max_remote_tokens=LONG - 1)) == (False, "staging")


def test_the_reason_says_how_much_can_be_received() -> None:
    decision = decide(DecisionRule(policy="threshold"), situation(9000, max_remote_tokens=6912))
    assert decision.reason == "staging: 9000 uncached tokens > 6912 that can be received"


@pytest.mark.parametrize("policy", ALL)
def test_whatever_decides_says_what_was_predicted(policy: Policy) -> None:
    predicted = decide(DecisionRule(policy=policy), situation(1000, local=busy(2))).predicted
    assert predicted is not None
    assert predicted.remote_ttft_s == pytest.approx(0.405)
    assert predicted.local_ttft_s == pytest.approx(0.405 + 28 * 0.015)
    assert predicted.local_damage_s == pytest.approx(2 * 0.405)


# ── adaptive ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("unknown", [{"local": None}, {"offer": msgspec.structs.replace(offer(), prefill_cost=None)}])
def test_until_both_ways_are_known_it_goes_by_the_threshold(unknown: dict[str, object]) -> None:
    assert verdict("adaptive", situation(SHORT, **unknown)) == (False, "short")
    assert verdict("adaptive", situation(LONG, **unknown)) == (True, "long")


@pytest.mark.parametrize(
    ("why", "asked", "expected"),
    [
        ("an idle node prefills by itself: no hop, no transfer", situation(64, ttft_target_s=UNHURRIED), (False, "cheaper")),
        ("streams would stand still", situation(1000, local=busy()), (True, "cheaper")),
        ("even for a short prompt, if there are many", situation(64, local=busy(64)), (True, "cheaper")),
        ("a prefill node that is much slower", situation(1000, offer=offer(slowness=5), local=busy(1)), (False, "cheaper")),
        ("one that has the prompt cached", situation(1000, offer=offer(cached=960)), (True, "cheaper")),
        ("what decode has cached", situation(1000, num_cached=960, local=busy(2)), (False, "cheaper")),
        ("others before it here", situation(1000, local=idle(backlog_s=1.0)), (True, "cheaper")),
        ("others before it there", situation(1000, offer=offer(wait=1.0), local=busy(1), ttft_target_s=UNHURRIED), (False, "cheaper")),
        (
            "a slow wire keeps the second token waiting",
            situation(1000, offer=offer(per_byte=200e-9), local=busy(1), ttft_target_s=UNHURRIED),
            (False, "cheaper"),
        ),
        ("no room in the queue", situation(1000, offer=offer(full=True), local=busy()), (False, "queue_full")),
    ],
)
def test_the_cheaper_way_is_taken(why: str, asked: Situation, expected: tuple[bool, str]) -> None:
    assert verdict("adaptive", asked) == expected, why


def test_a_target_that_only_one_way_meets_outweighs_seconds() -> None:
    crowded = situation(1000, offer=offer(wait=2.0), local=busy())  # 2.4 s there, 0.8 s and much delay here
    assert verdict("adaptive", crowded) == (False, "target")
    assert verdict("adaptive", situation(1000, offer=offer(wait=2.0), local=busy(), ttft_target_s=10.0)) == (True, "cheaper")


def test_streams_whose_itl_would_break_outweigh_one_first_token() -> None:
    crowded = situation(1000, offer=offer(wait=2.0), local=busy(breaks_itl=True))
    assert verdict("adaptive", crowded) == (True, "cheaper")
    assert verdict("adaptive", situation(1000, offer=offer(wait=0.3), local=busy(1, breaks_itl=True))) == (True, "cheaper")


def test_a_node_that_is_busy_soon_keeps_its_room_for_those_to_come() -> None:
    """Both ways meet the target; a long prompt here would make the next ones late, a short one would not."""
    assert verdict("adaptive", situation(2000, offer=offer(wait=0.1))) == (True, "target")
    assert verdict("adaptive", situation(200, offer=offer(wait=0.1))) == (False, "cheaper")


def test_a_second_token_that_the_wire_would_keep_too_long_is_a_target_missed() -> None:
    """0.6 s on a wire that begins with the prompt, which takes 0.4; here 8 streams stand still for 0.4 s each, in bearable steps."""
    slow = situation(1000, offer=offer(per_byte=50e-9), local=busy())
    assert verdict("adaptive", slow) == (True, "cheaper")
    assert verdict("adaptive", msgspec.structs.replace(slow, itl_target_s=0.05)) == (False, "target")
    assert verdict("adaptive", msgspec.structs.replace(slow, itl_target_s=0.5)) == (True, "cheaper")


def test_a_wire_carries_whole_blocks() -> None:
    """Of 65 tokens two: 0.08 s instead of 0.04, of which the prompt hides 0.03."""
    short = situation(65, offer=offer(per_byte=50e-9), local=busy(4), itl_target_s=0.05)
    assert verdict("adaptive", short) == (True, "cheaper")
    assert verdict("adaptive", msgspec.structs.replace(short, block_size=64)) == (False, "target")


def test_prompts_before_it_make_the_steps_longer_that_a_second_token_waits_for() -> None:
    """Half a target each: with what is exposed of the transfer that is too much, where steps of decodes alone would not be."""
    near = situation(200, offer=offer(per_byte=38e-9), local=busy(1), itl_target_s=0.05)
    assert verdict("adaptive", near) == (True, "cheaper")
    assert verdict("adaptive", msgspec.structs.replace(near, local=busy(1, backlog_s=0.01))) == (False, "target")


def test_a_request_that_misses_both_targets_is_lost_once() -> None:
    """So the way that is quicker by seconds decides, when all would miss something."""
    lost = situation(1000, offer=offer(wait=3.0, per_byte=50e-9), local=idle(backlog_s=4.0), itl_target_s=0.05)
    assert verdict("adaptive", lost) == (True, "cheaper")


def test_a_prompt_that_is_late_on_both_ways_waits_where_it_makes_nobody_late() -> None:
    late = situation(4000, local=busy(0, backlog_s=2.5, wait_s=2.5), offer=offer(wait=20.0))
    assert verdict("adaptive", late) == (True, "target"), "others come, and are in time if it is not in their way"
    soon = situation(200, local=busy(0, backlog_s=0.5, wait_s=0.5), offer=offer(wait=20.0))
    assert verdict("adaptive", soon) == (False, "cheaper"), "they are"
    hours = situation(4000, local=busy(0, backlog_s=2.5, wait_s=2.5), offer=offer(wait=60.0))
    assert verdict("adaptive", hours) == (False, "cheaper"), "how late it is still counts"


def test_the_risk_grows_before_the_target_is_missed() -> None:
    at_risk = situation(1000, offer=offer(wait=1.4), local=busy(4))  # 1.8 s there: might be late; 0.8 s and 1.6 s of delay here
    assert verdict("adaptive", at_risk) == (False, "target")


def test_a_target_that_is_past_decides_nothing() -> None:
    late = situation(1000, offer=offer(wait=2.0), local=busy(), ttft_target_s=-1.0)
    assert verdict("adaptive", late) == (True, "cheaper")


def test_the_reason_tells_all_four_costs() -> None:
    decision = decide(DecisionRule(), situation(1000, local=busy(2)))
    assert decision.reason == "cheaper: here 825 ms, 810 ms of delay to others; elsewhere 405 ms, 2 ms of KV"


# ── trying what was not tried ────────────────────────────────────────────────────────────────────────────────────────


def test_a_way_that_costs_little_is_tried_now_and_then() -> None:
    near = situation(1000, offer=offer(wait=0.1), ttft_target_s=UNHURRIED, since_remote=UNTRIED - 1)
    assert verdict("adaptive", near) == (False, "cheaper")
    assert verdict("adaptive", msgspec.structs.replace(near, since_remote=UNTRIED)) == (True, "explore")
    assert verdict("adaptive", situation(1000, offer=offer(cached=500), ttft_target_s=UNHURRIED, since_local=UNTRIED)) == (False, "explore")


@pytest.mark.parametrize("dear", [{"offer": offer(wait=5.0)}, {"offer": offer(slowness=6)}, {"offer": offer(wait=1.5)}])
def test_a_way_that_costs_much_is_tried_rarely(dear: dict[str, object]) -> None:
    assert not verdict("adaptive", situation(1000, since_remote=FORGOTTEN - 1, **dear))[0]
    assert verdict("adaptive", situation(1000, since_remote=FORGOTTEN, **dear)) == (True, "explore")


def test_the_way_that_is_taken_anyway_needs_no_trying() -> None:
    assert verdict("adaptive", situation(1000, offer=offer(wait=0.1), ttft_target_s=UNHURRIED, since_local=1000)) == (False, "cheaper")


@pytest.mark.parametrize("policy", FIXED)
def test_other_policies_try_nothing(policy: Policy) -> None:
    asked = situation(1000, since_local=1000, since_remote=1000)
    assert verdict(policy, asked) == verdict(policy, msgspec.structs.replace(asked, since_local=0, since_remote=0))


# ── the break-even ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_at_the_break_even_the_verdict_changes() -> None:
    asked = situation(1000, offer=offer(wait=0.05), local=busy(1), ttft_target_s=1e6)
    tokens = breakeven_tokens(asked)
    assert tokens is not None and 32 < tokens < 256

    def at(num_tokens: int) -> Decision:
        return decide(DecisionRule(), msgspec.structs.replace(asked, num_tokens=num_tokens))

    assert (at(tokens - 1).remote, at(tokens).remote) == (False, True)
    assert at(1000).predicted is not None and at(1000).predicted.breakeven_tokens == tokens


def test_a_longer_wait_and_a_slower_wire_move_it_up() -> None:
    quick, queued = situation(1000, local=busy(1)), situation(1000, offer=offer(wait=0.1), local=busy(1))
    slow = situation(1000, offer=offer(wait=0.1, per_byte=100e-9), local=busy(1))
    found = [breakeven_tokens(asked) for asked in (quick, queued, slow)]
    assert found == sorted(found, key=lambda tokens: tokens or 0) and len(set(found)) == 3


def test_what_never_pays_is_told_by_the_longest_and_what_is_unknown_not_at_all() -> None:
    assert breakeven_tokens(situation(1000, offer=offer(wait=10_000.0))) == MAX_TOKENS
    assert breakeven_tokens(situation(1000, local=None)) is None
    assert breakeven_tokens(situation(1000, offer=None)) is None
