"""Which decode node gets a request, and which prefill node a job."""

import msgspec
import pytest

from disaggd.cluster.routing import (
    STEP_TOKENS,
    DecodeCandidate,
    PrefillCandidate,
    RoundRobin,
    RoutingWeights,
    SessionTable,
    choose_decode,
    choose_prefill,
    slowness,
)
from disaggd.ids import NodeName

A, B, C = NodeName("a"), NodeName("b"), NodeName("c")

EVEN = RoutingWeights(prefill=1.0, load=1.0)


def decode(name: NodeName, uncached: int = 0, load_blocks: float = 0, *, is_full: bool = False) -> DecodeCandidate:
    """Of blocks of 16 tokens."""
    return DecodeCandidate(name=name, is_full=is_full, uncached_tokens=16 * uncached, load_tokens=int(16 * load_blocks), block_size=16)


def prefill(name: NodeName, backlog_s: float, prefill_s: float) -> PrefillCandidate:
    return PrefillCandidate(name=name, backlog_s=backlog_s, prefill_s=prefill_s)


# ── decode ──


def test_the_node_that_holds_the_prompt_is_taken_while_its_load_is_worth_it() -> None:
    assert choose_decode([decode(A, 20, 10), decode(B, 2, 27)], EVEN) == B
    assert choose_decode([decode(A, 20, 10), decode(B, 2, 29)], EVEN) == A


def test_the_weights_say_what_load_is_worth() -> None:
    nodes = [decode(A, 20, 10), decode(B, 2, 15)]
    assert choose_decode(nodes, RoutingWeights(prefill=1.0, load=1.0)) == B
    assert choose_decode(nodes, RoutingWeights(prefill=0.1, load=1.0)) == A
    assert choose_decode(nodes, RoutingWeights(prefill=1.0, load=4.0)) == A


def test_prompts_that_a_node_has_yet_to_prefill_come_before_the_request() -> None:
    busy = DecodeCandidate(name=A, is_full=False, uncached_tokens=32, backlog_tokens=16 * 30, load_tokens=0, block_size=16)
    assert choose_decode([busy, decode(B, 20, 0)], EVEN) == B
    assert choose_decode([busy, decode(B, 40, 0)], EVEN) == A


def test_a_full_node_comes_last_however_cheap() -> None:
    assert choose_decode([decode(A, 0, 0, is_full=True), decode(B, 50, 50)], EVEN) == B
    assert choose_decode([decode(A, 0, 0, is_full=True), decode(B, 50, 50, is_full=True)], EVEN) == A


def test_equals_are_chosen_by_load_then_by_name() -> None:
    assert choose_decode([decode(C), decode(B), decode(A)], EVEN) == A
    assert choose_decode([decode(A, 0, 1), decode(B, 1, 0)], EVEN) == B


def test_a_conversation_stays_while_the_costs_are_about_the_same() -> None:
    nodes = [decode(A, 10, 10), decode(B, 10, 12)]
    assert choose_decode(nodes, EVEN) == A
    assert choose_decode(nodes, EVEN, session_node=B) == B, "22 blocks against 20: within a block and 5 %"
    assert choose_decode([decode(A, 10, 10), decode(B, 10, 13)], EVEN, session_node=B) == A


def test_a_conversation_leaves_a_node_that_is_full_or_gone() -> None:
    assert choose_decode([decode(A), decode(B, is_full=True)], EVEN, session_node=B) == A
    assert choose_decode([decode(A), decode(B)], EVEN, session_node=C) == A


def test_in_turns_each_node_comes_once_before_any_comes_again() -> None:
    turns = RoundRobin()
    nodes = [decode(C), decode(A, 50, 50), decode(B)]
    assert [turns.choose(nodes) for _ in range(4)] == [A, B, C, A]


def test_in_turns_a_full_node_is_left_out_if_not_all_are() -> None:
    turns = RoundRobin()
    assert [turns.choose([decode(A), decode(B, is_full=True), decode(C)]) for _ in range(3)] == [A, C, A]
    assert [turns.choose([decode(A, is_full=True), decode(B, is_full=True)]) for _ in range(2)] == [B, A]


def test_a_block_size_decides_nothing() -> None:
    """A prompt of 30 tokens leaves less of a block of 48 empty than of one of 64."""
    large = DecodeCandidate(name=A, is_full=False, uncached_tokens=30, load_tokens=0, block_size=64)
    small = DecodeCandidate(name=B, is_full=False, uncached_tokens=30, load_tokens=0, block_size=48)
    assert choose_decode([large, small], EVEN) == A
    assert choose_decode([large, msgspec.structs.replace(small, load_tokens=1)], EVEN) == A
    assert choose_decode([msgspec.structs.replace(large, load_tokens=1), small], EVEN) == B
    assert choose_decode([msgspec.structs.replace(large, backlog_tokens=1), small], EVEN) == B


def test_a_conversation_stays_within_a_block_of_its_own_node() -> None:
    small = DecodeCandidate(name=A, is_full=False, uncached_tokens=640, load_tokens=640, block_size=16)
    large = DecodeCandidate(name=B, is_full=False, uncached_tokens=640, load_tokens=1280, block_size=64)
    assert choose_decode([small, large], EVEN) == A
    assert choose_decode([small, msgspec.structs.replace(large, load_tokens=0)], EVEN) == B
    assert choose_decode([small, msgspec.structs.replace(large, load_tokens=700)], EVEN, session_node=B) == B, "within a block of its own"


# ── speeds ──


def slow(name: NodeName, times: float, uncached_tokens: int = 100, load_tokens: int = 0) -> DecodeCandidate:
    return DecodeCandidate(
        name=name, is_full=False, uncached_tokens=uncached_tokens, load_tokens=load_tokens, block_size=16, slowness=times
    )


def test_a_slow_node_gets_a_request_when_the_fast_one_is_that_much_busier() -> None:
    """Ten steps of the fast node's, which reads as much as `STEP_TOKENS` of KV in one: it may have nine times that besides."""
    assert choose_decode([slow(A, 10), slow(B, 1)], EVEN) == B
    assert choose_decode([slow(A, 10), slow(B, 1, load_tokens=9 * STEP_TOKENS - 1)], EVEN) == B
    assert choose_decode([slow(A, 10), slow(B, 1, load_tokens=9 * STEP_TOKENS + 1)], EVEN) == A


def test_what_a_slow_node_carries_slows_it_down_the_more() -> None:
    assert choose_decode([slow(A, 10, load_tokens=100), slow(B, 1, load_tokens=9 * STEP_TOKENS + 999)], EVEN) == B
    assert choose_decode([slow(A, 10, load_tokens=100), slow(B, 1, load_tokens=9 * STEP_TOKENS + 1001)], EVEN) == A


def test_a_long_prompt_goes_where_it_is_cached_even_if_that_is_slow() -> None:
    weights = RoutingWeights(prefill=1.0, load=0.1)
    assert choose_decode([slow(A, 3, 0), slow(B, 1, 800)], weights) == B
    assert choose_decode([slow(A, 3, 0), slow(B, 1, 840)], weights) == A, "more than 0.1 · 2 · STEP_TOKENS"


def test_a_conversation_leaves_a_slow_node_for_an_idle_fast_one() -> None:
    weights = RoutingWeights(prefill=1.0, load=0.1)
    assert choose_decode([slow(A, 10, 10), slow(B, 1, 200)], weights, session_node=A) == B


def test_nodes_of_one_speed_are_told_apart_by_nothing_of_it() -> None:
    assert slowness({A: 0.010, B: 0.0199}) == {A: 1.0, B: 1.0}, "measurements differ"
    assert slowness({A: 0.0003, B: 0.0039}) == {A: 1.0, B: 1.0}, "nobody tells such steps apart"
    assert slowness({A: None, B: None}) == {A: 1.0, B: 1.0}
    assert slowness({A: 0.3, B: None}) == {A: 1.0, B: 1.0}


def test_a_node_is_as_slow_as_its_steps_are_longer_than_the_fastest_nodes() -> None:
    assert slowness({A: 0.030, B: 0.010, C: 0.015}) == {A: pytest.approx(3.0), B: 1.0, C: 1.0}
    assert slowness({A: 0.030, B: 0.010, C: None}) == {A: pytest.approx(3.0), B: 1.0, C: pytest.approx(3.0)}, "it got to no end"


# ── prefill ──


def test_a_job_goes_where_it_is_finished_first() -> None:
    assert choose_prefill([prefill(A, 2.0, 1.0), prefill(B, 0.5, 1.0)]) == B
    assert choose_prefill([prefill(A, 2.0, 0.1), prefill(B, 1.5, 1.0)]) == A, "its cache is worth the wait"


def test_of_equals_the_less_busy_takes_the_job() -> None:
    assert choose_prefill([prefill(A, 1.0, 0.5), prefill(B, 0.5, 1.0)]) == B
    assert choose_prefill([prefill(B, 1.0, 1.0), prefill(A, 1.0, 1.0)]) == A


def test_without_candidates_nobody_is_chosen() -> None:
    assert choose_prefill([]) is None


# ── sessions ──


def test_the_table_knows_the_last_node_of_a_conversation() -> None:
    table = SessionTable(2)
    table.remember("one", A)
    table.remember("one", B)
    assert (table.node_of("one"), table.node_of("two"), len(table)) == (B, None, 1)


def test_requests_without_a_session_leave_no_trace() -> None:
    table = SessionTable(2)
    table.remember(None, A)
    assert (table.node_of(None), len(table)) == (None, 0)


def test_the_table_forgets_whoever_was_silent_longest() -> None:
    table = SessionTable(2)
    for session in ("one", "two", "one", "three"):
        table.remember(session, A)
    assert [table.node_of(session) for session in ("one", "two", "three")] == [A, None, A]
