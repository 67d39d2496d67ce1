"""A decode node that holds part of a prompt: what it decides, what it grants, and what it keeps meanwhile."""

import pytest

from disaggd.cluster.protocol import (
    Abort,
    Cancel,
    Decided,
    Grant,
    Granted,
    LocalPrefill,
    NeedPrefill,
    NoRoom,
    Quiesced,
    Released,
    RequestGrant,
    Room,
    Tokens,
)
from disaggd.ids import NodeName, SeqId
from disaggd.transfer import messages as transfer
from disaggd.transfer.notification import FirstToken
from tests.support.decode_scripts import AGENT, P0, Node, S, Staging, delivered, generate, granted, is_empty, landed, make_decode_node
from tests.support.role_nodes import BLOCK, HASHER, expected, next_token, prompt

WARM = SeqId("warm")
LONG = prompt(60)


def warm_node(num_tokens: int = 40, num_blocks: int = 64, staging: Staging | None = None) -> Node:
    """A decode node that has served the first `num_tokens` tokens of `LONG`."""
    node = make_decode_node(num_blocks, staging, HASHER)
    node.say(generate(LONG[:num_tokens], WARM, policy="local", max_tokens=1))
    node.run()
    node.clear()
    return node


def ask(node: Node, tokens: list[int], **options: object) -> Grant:
    node.say(generate(tokens, S, **options), RequestGrant(S, 0, P0))
    return node.last(Granted).grant


def arrive(node: Node, grant: Grant, tokens: list[int]) -> None:
    node.event(transfer.Landed(grant.token, FirstToken(next_token(tokens)), 0))


# ── decisions ──


def test_the_decision_counts_only_what_is_not_cached() -> None:
    node = warm_node()
    node.say(generate(LONG[:56]))
    assert node.last(Decided).num_cached == 40
    assert node.last(Decided).reason.startswith("short: 16 uncached")
    node.run()
    assert delivered(node) == expected(LONG[:56], 4)
    assert is_empty(node)


def test_a_prompt_of_another_salt_is_not_cached() -> None:
    node = warm_node()
    node.say(generate(LONG[:56], salt="theirs"))
    assert node.last(NeedPrefill).num_cached == 0


def test_a_local_prefill_reports_its_span_and_what_was_cached_just_before_its_first_token() -> None:
    node = warm_node()
    node.say(generate(LONG[:56]))
    node.after(0.25)
    node.step()
    kinds = [type(frame) for _, frame in node.sent]
    assert kinds == [Decided, LocalPrefill, Tokens]
    assert node.last(LocalPrefill) == LocalPrefill(S, 0, 40, 250.0, 0.0)
    node.run()
    assert len(node.frames(LocalPrefill)) == 1


def test_a_prefill_over_several_steps_is_timed_from_the_first_to_the_last() -> None:
    node = make_decode_node()
    node.say(generate(LONG[:40], policy="local"))
    for _ in range(3):
        node.after(0.5)
        node.step()
    assert node.last(LocalPrefill) == LocalPrefill(S, 0, 0, 500.0, 1000.0)


def test_a_remote_sequence_reports_no_local_prefill() -> None:
    node = make_decode_node(hasher=HASHER)
    landed(node, granted(node))
    node.run()
    assert node.frames(LocalPrefill) == []


# ── grants ──


def test_a_grant_leaves_out_what_is_cached() -> None:
    node = warm_node()
    grant = ask(node, LONG, policy="remote")
    assert node.last(NeedPrefill).num_cached == 40
    assert (grant.first_token_index, len(grant.block_ids)) == (40, 6)  # 20 tokens, and one more
    assert node.submitted(transfer.Expect) == [transfer.Expect(grant.token, P0, AGENT, 5)]
    gauges = node.role.gauges()
    assert (gauges.blocks_granted, gauges.blocks_used, gauges.blocks_cached) == (6, 10, 0)
    arrive(node, grant, LONG)
    sequence = node.engine.sequences[S]
    assert (sequence.num_cached, sequence.num_computed, len(sequence.block_table)) == (40, 60, 16)
    node.run()
    assert delivered(node) == expected(LONG, 4)
    assert is_empty(node)
    gauges = node.role.gauges()
    assert (gauges.prefix_queried_tokens, gauges.prefix_hit_tokens) == (40 + 60, 40)


def test_the_last_block_of_a_cached_prompt_is_pushed_all_the_same() -> None:
    node = warm_node()
    grant = ask(node, LONG[:40], policy="remote")
    assert (grant.first_token_index, len(grant.block_ids)) == (36, 2)
    assert node.submitted(transfer.Expect)[-1].num_blocks == 1
    arrive(node, grant, LONG[:40])
    node.run()
    assert delivered(node) == expected(LONG[:40], 4)
    assert is_empty(node)


def test_what_landed_can_be_found_by_the_next_one() -> None:
    node = make_decode_node(hasher=HASHER)
    arrive(node, ask(node, LONG), LONG)
    node.say(generate(LONG, SeqId("next")))
    assert node.last(Decided).num_cached == 56


def test_a_grant_that_has_not_landed_has_left_nothing() -> None:
    node = make_decode_node(hasher=HASHER)
    ask(node, LONG)
    node.say(generate(LONG, SeqId("next"), policy="remote"))
    assert node.last(NeedPrefill).num_cached == 0
    assert node.pool.hashes() == []


@pytest.mark.parametrize("end", ["abort", "withdraw", "fence", "expiry", "link"])
def test_the_prefix_is_given_back_however_the_grant_ends(end: str) -> None:
    node = warm_node()
    grant = ask(node, LONG, policy="remote")
    if end == "abort":
        node.say(Abort(S, 0))
        assert node.last(Cancel).token == grant.token
        assert (node.role.gauges().blocks_quarantined, node.role.gauges().blocks_cached) == (6, 10)
        node.say(Quiesced(grant.token, NodeName("d0"), clean=True))
    elif end == "withdraw":
        node.say(RequestGrant(S, 0, P0))
        assert node.last(Granted).grant.first_token_index == 40
        assert (node.role.gauges().blocks_granted, node.role.gauges().blocks_used) == (6, 10)
        node.say(Abort(S, 0), Quiesced(node.last(Granted).grant.token, NodeName("d0"), clean=True))
    elif end == "fence":
        node.event(transfer.Fenced(P0, AGENT))
    elif end == "expiry":
        node.after(5.1)
        node.say(Quiesced(grant.token, NodeName("d0"), clean=True))
    else:
        node.link_down()
        node.say(Quiesced(grant.token, NodeName("d0"), clean=True))
    assert is_empty(node)
    assert node.role.gauges().blocks_cached == 10


def test_a_prefix_that_a_grant_leaves_out_is_not_evicted() -> None:
    node = warm_node(num_blocks=20)
    grant = ask(node, LONG, policy="remote")
    node.say(generate(prompt(16, seed=3), SeqId("other"), policy="local", max_tokens=1))
    node.run()
    assert node.pool.find(HASHER.digests(LONG[:40])) == node.role._placed[S].prefix
    arrive(node, grant, LONG)
    node.run()
    assert delivered(node) == expected(LONG, 4)


def test_cached_blocks_that_a_grant_takes_are_no_room_for_it() -> None:
    """10 blocks are cached and 5 free; it lacks 6, and what it leaves out is not to be evicted for them."""
    node = warm_node(num_blocks=18)
    held = node.pool.allocate(3)
    assert held is not None
    node.invariant = lambda: None
    node.say(generate(LONG, policy="remote"), RequestGrant(S, 0, P0))
    assert node.last(NoRoom).seq == S
    node.pool.release(held)
    node.after(0.0)
    assert node.frames(Room) == [Room()]


# ── through staging memory ──


def test_staged_a_grant_names_only_what_is_pushed_and_the_prefix_waits_for_the_copy() -> None:
    staging = Staging(8)
    node = warm_node(staging=staging)
    grant = ask(node, LONG, policy="remote")
    assert (grant.first_token_index, len(grant.block_ids)) == (40, 5)
    assert (node.role.gauges().blocks_granted, node.role.gauges().blocks_used) == (6, 10)
    arrive(node, grant, LONG)
    (landed_blocks, blocks), *_ = staging.under_way
    assert len(landed_blocks) == len(blocks) == 5
    staging.finish()
    node.after(0.0)
    sequence = node.engine.sequences[S]
    assert (sequence.num_cached, len(sequence.block_table)) == (40, 16)
    assert sequence.block_table[10:15] == list(blocks)
    node.run()
    assert delivered(node) == expected(LONG, 4)
    assert is_empty(node)


def test_staged_an_abort_during_the_copy_gives_back_both() -> None:
    staging = Staging(8)
    node = warm_node(staging=staging)
    arrive(node, ask(node, LONG, policy="remote"), LONG)
    node.say(Abort(S, 0))
    staging.finish()
    node.after(0.0)
    assert is_empty(node)
    assert node.pool.find(HASHER.digests(LONG[:48])) != []
    assert len(node.pool.find(HASHER.digests(LONG))) == 10


def test_staged_a_prompt_whose_prefix_was_evicted_before_its_grant_is_placed_again() -> None:
    """8 blocks of staging memory never hold all of it: it was taken on for what it lacked then."""
    node = warm_node(num_blocks=24, staging=Staging(8))
    node.say(generate(LONG, policy="remote"))
    assert node.last(NeedPrefill).num_cached == 40
    node.pool.clear()
    node.say(RequestGrant(S, 0, P0))
    assert node.last(Released).reason.startswith("the prefix that was cached here is gone")
    node.say(generate(LONG, attempt=1, policy="remote"))
    assert node.last(Decided).reason == f"staging: 60 uncached tokens > {8 * BLOCK} that can be received"


def test_staged_a_refused_grant_whose_prefix_was_evicted_is_asked_for_again_and_then_released() -> None:
    node = warm_node(num_blocks=24, staging=Staging(8))
    held = node.pool.allocate(12)
    assert held is not None
    node.invariant = lambda: None
    node.say(generate(LONG, policy="remote"), RequestGrant(S, 0, P0))
    assert node.last(NoRoom).seq == S
    node.after(0.0)
    assert node.frames(Room) == []
    node.pool.clear()
    node.after(0.0)
    assert node.frames(Room) == [Room()]
    node.say(RequestGrant(S, 0, P0))
    assert node.last(Released).seq == S
