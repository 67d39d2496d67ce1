"""A decode node whose pool peers do not write: grants land in staging memory, and are copied into the pool."""

import pytest

from disaggd.cluster.protocol import (
    Abort,
    Cancel,
    Decided,
    Grant,
    Granted,
    Landed,
    NeedPrefill,
    NoRoom,
    PrefillLost,
    Quiesced,
    Released,
    RequestGrant,
    Room,
    Tokens,
)
from disaggd.engine.sequence import SequenceState
from disaggd.ids import NodeName, SeqId
from disaggd.roles.decode_role import COPY_POLL_S
from disaggd.transfer import messages as transfer
from tests.support.decode_scripts import AGENT, P0, Node, S, Staging, delivered, generate, granted, is_empty, landed, make_decode_node
from tests.support.role_nodes import LEASE_S, QUIESCE_S, expected, prompt

D0 = NodeName("d0")
OTHER = SeqId("other")


def staged_node(num_blocks: int = 64, staging_blocks: int = 16) -> tuple[Node, Staging]:
    staging = Staging(staging_blocks)
    return make_decode_node(num_blocks, staging), staging


def copied(node: Node, staging: Staging) -> None:
    staging.finish()
    node.after(0.0)


# ── grants ──


def test_a_grant_names_staging_blocks_for_the_prompt_and_reserves_the_pools_for_one_token_more() -> None:
    node, _ = staged_node(staging_blocks=5)
    grant = granted(node, length=20)
    assert sorted(grant.block_ids) == [0, 1, 2, 3, 4]
    assert node.submitted(transfer.Expect) == [transfer.Expect(grant.token, P0, AGENT, 5)]
    gauges = node.role.gauges()
    assert (gauges.blocks_granted, gauges.blocks_quarantined, gauges.blocks_used, gauges.blocks_free) == (6, 0, 0, 58)


def test_a_prompt_that_can_never_land_is_prefilled_here_and_the_reason_says_so() -> None:
    node, staging = staged_node(staging_blocks=5)
    node.say(generate(prompt(21), policy="remote"))
    assert node.last(Decided).reason == "staging: 21 uncached tokens > 20 that can be received"
    node.run()
    assert delivered(node) == expected(prompt(21), 4)
    assert not staging.copies and not node.frames(NeedPrefill)


def test_without_room_to_land_the_router_hears_of_it_and_again_when_there_is_some() -> None:
    node, staging = staged_node(staging_blocks=8)
    first = granted(node, OTHER)
    node.say(generate(prompt(20)), RequestGrant(S, 0, P0))
    assert node.last(NoRoom) == NoRoom(S, 0), "5 of 8 staging blocks are out, though 58 of the pool's are free"
    landed(node, first)
    node.after(0.1)
    assert not node.frames(Room), "the copy still reads them"
    assert node.role.next_deadline() == node.now + COPY_POLL_S
    copied(node, staging)
    assert node.frames(Room) == [Room()]
    node.say(RequestGrant(S, 0, P0))
    assert node.last(Granted).seq == S


def test_staging_memory_that_comes_free_is_kept_for_a_grant_that_has_waited_long() -> None:
    node, staging = staged_node(staging_blocks=8)
    first, small = granted(node, OTHER), SeqId("small")
    node.say(generate(prompt(20)), RequestGrant(S, 0, P0, earmark=True))
    node.say(generate(prompt(17), small, policy="remote"), RequestGrant(small, 0, P0))
    landed(node, first)
    copied(node, staging)
    node.say(RequestGrant(small, 0, P0))
    assert node.last(NoRoom) == NoRoom(small, 0)
    node.say(RequestGrant(S, 0, P0))
    assert node.last(Granted).seq == S


def test_without_room_in_the_pool_there_is_no_grant_either() -> None:
    node, _ = staged_node(num_blocks=12, staging_blocks=12)
    granted(node, OTHER)
    node.say(generate(prompt(20)), RequestGrant(S, 0, P0))
    assert node.last(NoRoom) == NoRoom(S, 0)


def test_asking_again_takes_both_kinds_of_blocks_back() -> None:
    node, _ = staged_node(staging_blocks=5)
    node.say(generate(prompt(20), grant_for=P0))
    node.say(RequestGrant(S, 0, P0))
    assert node.last(Granted).grant.token != node.last(NeedPrefill).grant.token
    assert node.role.gauges().blocks_granted == 6


# ── landing ──


def test_a_landed_sequence_runs_once_it_is_copied_into_the_pool() -> None:
    node, staging = staged_node()
    node.say(generate(prompt(40), OTHER, policy="local", max_tokens=100))  # so that the pool's block ids are others
    node.step()
    grant = granted(node)
    landed(node, grant)
    node.after(0.001)
    assert node.frames(Landed) == [] and not delivered(node)
    assert node.engine.sequences[S].state is SequenceState.QUEUED
    assert node.role.gauges().blocks_granted == 6
    copied(node, staging)
    assert node.last(Landed) == Landed(S, 0)
    assert delivered(node) == expected(prompt(20), 1)
    table = node.engine.sequences[S].block_table
    assert staging.copies == [(grant.block_ids, tuple(table[:5]))] and len(table) == 6
    assert grant.block_ids != tuple(table[:5])
    assert node.role.gauges().blocks_granted == 0
    node.run()
    assert delivered(node) == expected(prompt(20), 4)
    assert is_empty(node)


def test_a_copy_under_way_keeps_a_place_among_the_running() -> None:
    node, staging = staged_node(staging_blocks=64)
    for i in range(8):
        landed(node, granted(node, SeqId(str(i))))
    node.say(generate(prompt(20)), RequestGrant(S, 0, P0))
    assert node.last(NoRoom) == NoRoom(S, 0), "eight may run"
    copied(node, staging)
    assert node.engine.num_running == 8


def test_copies_end_in_their_order_and_each_resumes_its_own() -> None:
    node, staging = staged_node()
    for seq in (S, OTHER):
        landed(node, granted(node, seq))
    staging.num_done = 1
    node.after(0.0)
    assert [frame.seq for frame in node.frames(Landed)] == [S]
    copied(node, staging)
    assert [frame.seq for frame in node.frames(Landed)] == [S, OTHER]


def test_a_copy_is_asked_about_soon_and_a_lease_in_its_time() -> None:
    node, staging = staged_node()
    granted(node)
    assert node.role.next_deadline() == node.now + LEASE_S
    landed(node, granted(node, OTHER))
    assert node.role.next_deadline() == node.now + COPY_POLL_S
    copied(node, staging)
    assert node.role.next_deadline() == node.now + LEASE_S


# ── giving up ──


def give_up_by_abort(node: Node) -> None:
    node.say(Abort(S, 0))


def give_up_by_a_newer_attempt(node: Node) -> None:
    node.say(generate(prompt(20), attempt=1, policy="local"))
    node.run()


def give_up_with_the_router(node: Node) -> None:
    node.link_down()


GIVE_UP = pytest.mark.parametrize("give_up", [give_up_by_abort, give_up_by_a_newer_attempt, give_up_with_the_router])


@GIVE_UP
def test_a_grant_that_is_given_up_frees_the_pool_at_once_and_the_staging_blocks_when_nobody_writes_them(give_up) -> None:
    node, staging = staged_node()
    grant = granted(node)
    give_up(node)
    assert node.pool.num_free == 64
    assert node.role.gauges().blocks_quarantined == 5
    node.say(Quiesced(grant.token, D0, True))
    assert is_empty(node)
    landed(node, grant)
    assert not staging.copies, "nothing is copied into blocks that are others'"


@GIVE_UP
def test_what_is_given_up_while_it_is_copied_holds_both_kinds_until_it_is(give_up) -> None:
    node, staging = staged_node()
    grant = granted(node)
    landed(node, grant)
    give_up(node)
    node.say(Quiesced(grant.token, D0, True))
    assert node.role.gauges().blocks_granted == 6 and node.role.gauges().blocks_quarantined == 0
    assert not node.frames(Cancel), "all of it is in: there is nothing to stop"
    node.clear()
    copied(node, staging)
    assert is_empty(node)
    assert not node.frames(Landed) and not node.frames(Tokens)


def test_asked_about_a_sequence_that_is_being_copied_decode_keeps_it() -> None:
    node, staging = staged_node()
    landed(node, granted(node))
    node.say(PrefillLost(S, 0))
    assert not node.frames(Released)
    copied(node, staging)
    assert node.frames(Landed) == [Landed(S, 0)]
    node.run()
    assert delivered(node) == expected(prompt(20), 4)


def test_a_fence_touches_no_copy_and_frees_what_had_not_landed() -> None:
    node, staging = staged_node()
    landed(node, granted(node))
    granted(node, OTHER)
    node.event(transfer.Fenced(P0, AGENT))
    assert [frame.seq for frame in node.frames(Released)] == [OTHER]
    assert node.role.gauges().blocks_granted == 6 and node.role.gauges().blocks_quarantined == 0
    copied(node, staging)
    node.run()
    assert delivered(node) == expected(prompt(20), 4)
    assert is_empty(node)


def test_a_quarantine_outlasts_its_pool_blocks_and_ends_with_the_fence() -> None:
    node, _ = staged_node(staging_blocks=5)
    granted(node)
    node.after(LEASE_S)
    assert node.last(Released).seq == S and node.pool.num_free == 64
    node.say(generate(prompt(20), OTHER), RequestGrant(OTHER, 0, P0))
    assert node.last(NoRoom) == NoRoom(OTHER, 0), "the prefill node may still write all of the staging memory"
    node.after(QUIESCE_S)
    assert node.submitted(transfer.Fence) == [transfer.Fence(P0, AGENT)]
    node.event(transfer.Fenced(P0, AGENT))
    assert node.role.gauges().blocks_quarantined == 0
    node.say(Abort(OTHER, 0))
    assert is_empty(node)


def test_what_lands_after_it_was_given_up_is_not_copied_but_ends_the_quarantine() -> None:
    node, staging = staged_node()
    grant: Grant = granted(node)
    node.say(PrefillLost(S, 0))
    landed(node, grant)
    assert not staging.copies
    assert is_empty(node)
