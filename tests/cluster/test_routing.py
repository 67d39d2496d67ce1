"""Which decode node gets a request, and which prefill node a job."""

import msgspec

from disaggd.cluster.routing import (
    DecodeCandidate,
    PrefillCandidate,
    RoundRobin,
    RoutingWeights,
    SessionTable,
    choose_decode,
    choose_prefill,
)
from disaggd.ids import NodeName

A, B, C = NodeName("a"), NodeName("b"), NodeName("c")

EVEN = RoutingWeights(prefill=1.0, load=1.0)


def decode(name: NodeName, uncached: int = 0, load_blocks: float = 0, *, is_full: bool = False) -> DecodeCandidate:
    return DecodeCandidate(name=name, is_full=is_full, uncached_blocks=uncached, load_tokens=int(16 * load_blocks), block_size=16)


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
    busy = DecodeCandidate(name=A, is_full=False, uncached_blocks=2, backlog_tokens=16 * 30, load_tokens=0, block_size=16)
    assert choose_decode([busy, decode(B, 20, 0)], EVEN) == B
    assert choose_decode([busy, decode(B, 40, 0)], EVEN) == A


def test_a_full_node_comes_last_however_cheap() -> None:
    assert choose_decode([decode(A, 0, 0, is_full=True), decode(B, 50, 50)], EVEN) == B
    assert choose_decode([decode(A, 0, 0, is_full=True), decode(B, 50, 50, is_full=True)], EVEN) == A


def test_equals_are_chosen_by_load_then_by_name() -> None:
    assert choose_decode([decode(C), decode(B), decode(A)], EVEN) == A
    assert choose_decode([decode(A, 1, 0.9), decode(B, 1, 0.6)], EVEN) == B, "both have a block of load"


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


def test_blocks_of_nodes_count_by_what_they_hold() -> None:
    """A prompt of 640 tokens is 40 blocks here and 10 there; what decides is the rest."""
    small = DecodeCandidate(name=A, is_full=False, uncached_blocks=40, load_tokens=640, block_size=16)
    large = DecodeCandidate(name=B, is_full=False, uncached_blocks=10, load_tokens=1280, block_size=64)
    assert choose_decode([small, large], EVEN) == A
    assert choose_decode([small, msgspec.structs.replace(large, load_tokens=0)], EVEN) == B
    assert choose_decode([small, msgspec.structs.replace(large, load_tokens=700)], EVEN, session_node=B) == B, "within a block of its own"


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
