"""A node's part in a check: a grant for a pattern is one as any other, and whatever becomes of it, the router hears so once."""

from collections.abc import Callable

import pytest

from disaggd.cluster.check_frames import CheckPair, PatternGrant, PatternPushed, PatternRead, PushPattern, RankPush, RankRead
from disaggd.cluster.hello import ConnectPair
from disaggd.cluster.protocol import Cancel, Grant, Progress, Quiesced
from disaggd.ids import AgentId, BlockId, GrantToken, Incarnation, NodeName
from disaggd.roles.compute import LinkId
from disaggd.transfer import messages as transfer
from disaggd.transfer.messages import (
    BeginPush,
    CancelPush,
    Expect,
    Fence,
    FinishPush,
    Forget,
    HandleDone,
    Landed,
    LandingFailed,
    Leg,
    PushBlocks,
    PushEnded,
    QuiesceByWire,
    Sent,
)
from tests.support import decode_scripts, prefill_scripts
from tests.support.checks import WRONG, FakePatterns
from tests.support.decode_scripts import Staging, generate, make_decode_node
from tests.support.endpoints import endpoint, span
from tests.support.prefill_scripts import INTAKE, connect, make_prefill_node, taking_node
from tests.support.role_nodes import BYTES_PER_TOKEN, KV, LAYER_GROUPS, LEASE_S, LINK, QUIESCE_S, RoleNode, kv_of, prompt

P0, D0 = NodeName("p0"), NodeName("d0")
AGENT = AgentId("agent-1")
T = GrantToken(b"token")
SALT = 99
CHECK = CheckPair(5, P0, AGENT, 8, SALT)
"""A pattern of two blocks."""
PATTERN_BYTES = 8 * BYTES_PER_TOKEN


def asked(node: decode_scripts.Node, check: CheckPair = CHECK) -> Grant:
    node.say(check)
    return node.last(PatternGrant).grant


def landed(node: RoleNode, grant: Grant) -> None:  # type: ignore[type-arg]
    node.event(Landed(grant.token, None, PATTERN_BYTES))


# ── the target ──


def test_a_pattern_is_granted_expected_and_compared_where_it_landed() -> None:
    patterns = FakePatterns()
    node = make_decode_node(patterns=patterns)
    grant = asked(node)
    assert (grant.target, grant.writer, grant.agent_id, grant.first_token_index, len(grant.block_ids)) == (D0, P0, AGENT, 0, 2)
    assert node.submitted(Expect) == [Expect(grant.token, P0, AGENT, 2, brings_token=False)]
    assert node.role.gauges().blocks_granted == 2
    landed(node, grant)
    assert patterns.compared == [(grant.block_ids, 8, SALT)]
    assert node.frames(PatternRead) == [PatternRead(5, "done", "", (RankRead(0, (), ""),))]
    assert decode_scripts.is_empty(node)


def test_what_is_wrong_is_told_by_rank() -> None:
    patterns = FakePatterns()
    patterns.finds = [None, WRONG]
    node = make_decode_node(patterns=patterns)
    landed(node, asked(node))
    assert node.last(PatternRead).reads == (RankRead(0, (), ""), RankRead(1, (1,), str(WRONG)))


def test_on_a_gpu_it_is_compared_in_the_pool_once_it_is_copied_there() -> None:
    patterns, staging = FakePatterns(), Staging(8)
    node = make_decode_node(staging=staging, patterns=patterns)
    grant = asked(node)
    landed(node, grant)
    [(from_blocks, to_blocks)] = staging.under_way
    assert from_blocks == grant.block_ids and patterns.compared == []
    deadline = node.role.next_deadline()
    assert deadline is not None and deadline <= node.now + 1e-3, "nothing else wakes the thread"
    node.after(0.0)
    assert patterns.compared == []
    staging.finish()
    node.after(0.0)
    assert patterns.compared == [(to_blocks, 8, SALT)]
    assert node.last(PatternRead).step == "done"
    assert decode_scripts.is_empty(node)


def test_a_busy_node_has_no_room_and_keeps_its_blocks_for_its_sequences() -> None:
    node = make_decode_node(num_blocks=6)
    node.say(generate(prompt(16), policy="local", max_tokens=4))
    node.step()
    node.clear()
    node.say(CHECK)
    assert node.frames(PatternRead) == [PatternRead(5, "no_room", "d0: no blocks are free for it", ())]
    assert not node.commands


def test_a_full_staging_memory_has_no_room_either() -> None:
    node = make_decode_node(staging=Staging(1))
    node.say(CHECK)
    assert node.last(PatternRead).step == "no_room"


def test_another_agent_than_the_routers_is_not_checked() -> None:
    node = make_decode_node()
    node.say(CheckPair(5, P0, AgentId("older"), 8, SALT))
    assert node.frames(PatternRead) == [PatternRead(5, "failed", "d0 has another agent for p0 by now", ())]


def lease_runs_out(node: decode_scripts.Node, grant: Grant) -> None:
    node.after(LEASE_S)


def landing_fails(node: decode_scripts.Node, grant: Grant) -> None:
    node.event(LandingFailed(grant.token, "piece 3 came twice"))


@pytest.mark.parametrize("give_up", [lease_runs_out, landing_fails])
def test_a_pattern_that_does_not_land_is_quarantined_cancelled_and_told_of(give_up: Callable[[decode_scripts.Node, Grant], None]) -> None:
    node = make_decode_node()
    grant = asked(node)
    node.clear()
    give_up(node, grant)
    [cancel, read] = [frame for _, frame in node.sent]
    assert cancel == Cancel(grant.token, P0, D0), "before the report: then nobody but the writer answers it"
    assert isinstance(read, PatternRead) and read.step == "failed" and read.reason
    assert node.role.gauges().blocks_quarantined == 2
    node.say(Quiesced(grant.token, D0, True))
    assert node.submitted(Forget) == [Forget(grant.token)]
    assert decode_scripts.is_empty(node)


def test_progress_renews_the_lease() -> None:
    node = make_decode_node()
    grant = asked(node)
    for _ in range(3):
        node.after(LEASE_S * 0.9)
        node.say(Progress((grant.token,)))
    assert not node.frames(PatternRead)
    landed(node, grant)
    assert node.last(PatternRead).step == "done"


@pytest.mark.parametrize("by_wire", [False, True])
def test_a_writer_that_stopped_fails_the_check_and_frees_the_blocks(by_wire: bool) -> None:
    node = make_decode_node()
    grant = asked(node)
    if by_wire:
        node.event(transfer.QuiescedByWire(grant.token, True, P0))
    else:
        node.say(Quiesced(grant.token, D0, True))
    assert node.last(PatternRead).step == "failed"
    assert decode_scripts.is_empty(node)


def test_what_was_not_quiesced_in_time_or_not_clean_is_fenced() -> None:
    node = make_decode_node()
    grant = asked(node)
    node.after(LEASE_S)
    node.after(QUIESCE_S)
    assert node.submitted(Fence) == [Fence(P0, AGENT)]
    node.event(transfer.Fenced(P0, AGENT))
    assert decode_scripts.is_empty(node)
    assert len(node.frames(PatternRead)) == 1
    assert not node.role._checks._intake.knows(grant.token)


def test_a_fence_for_others_sake_ends_the_check() -> None:
    node = make_decode_node()
    asked(node)
    node.event(transfer.Fenced(P0, AGENT))
    assert node.frames(PatternRead) == [PatternRead(5, "failed", "the KV path from p0 was fenced", ())]
    assert decode_scripts.is_empty(node)


def test_a_landing_after_it_was_given_up_frees_the_blocks_and_is_not_told_of_again() -> None:
    patterns = FakePatterns()
    node = make_decode_node(patterns=patterns)
    grant = asked(node)
    node.after(LEASE_S)
    landed(node, grant)
    assert decode_scripts.is_empty(node)
    assert len(node.frames(PatternRead)) == 1 and not patterns.compared


def test_a_lost_router_leaves_the_grant_to_its_writer() -> None:
    node = make_decode_node()
    grant = asked(node)
    node.link_down()
    node.event(transfer.QuiescedByWire(grant.token, True, P0))
    assert decode_scripts.is_empty(node)


def test_a_prefill_node_is_a_target_too() -> None:
    node = taking_node()
    patterns = node.role._checks._intake._patterns
    node.say(CheckPair(6, D0, INTAKE, 8, SALT))
    grant = node.last(PatternGrant).grant
    assert (grant.target, grant.writer) == (P0, D0)
    landed(node, grant)
    assert patterns.compared == [(grant.block_ids, 8, SALT)]
    assert node.last(PatternRead).step == "done"
    assert prefill_scripts.is_idle(node)


# ── the writer ──


TARGET = (BlockId(11), BlockId(10))
GRANT = Grant(T, D0, P0, AGENT, 0, TARGET, LEASE_S)
PUSH = PushPattern(7, GRANT, 8, SALT)
PUSH_BACK = PushPattern(8, Grant(T, P0, D0, AGENT, 0, TARGET, LEASE_S), 8, SALT)

SENT = (
    Sent(Leg(0, 0, range(1), "direct"), PATTERN_BYTES // 2, 10.0, 10.25),
    Sent(Leg(1, 0, range(1, 3), "repacked"), PATTERN_BYTES // 2, 10.0, 10.125),
)
"""By each of the writer's ranks, as a rule."""

Writer = prefill_scripts.Node | decode_scripts.Node


def writer(num_blocks: int = 64, **options: object) -> prefill_scripts.Node:
    """A prefill node that was told to connect to `d0`, and not yet that its agent was probed."""
    node = make_prefill_node(num_blocks, **options)  # type: ignore[arg-type]
    connect(node, AGENT)
    node.clear()
    return node


def decode_writer() -> decode_scripts.Node:
    """A decode node that was told to connect to `p0`."""
    node = make_decode_node()
    node.say(ConnectPair(P0, Incarnation("p0-first"), endpoint(AGENT), KV))
    node.clear()
    return node


def source(node: Writer) -> tuple[BlockId, ...]:
    return node.submitted(PushBlocks)[0].source.blocks


def written(node: Writer, *, clean: bool = True, finished: bool = True) -> None:
    blocks = source(node)
    for _ in LAYER_GROUPS:
        node.event(HandleDone(T, blocks, PATTERN_BYTES))
    node.event(PushEnded(T, clean, finished, PATTERN_BYTES, 10.0, 10.25, SENT))


def test_blocks_are_filled_and_pushed_by_layer_groups_as_all_kv_is() -> None:
    patterns = FakePatterns()
    node = writer(patterns=patterns)
    node.say(PUSH)
    assert patterns.filled == [(source(node), SALT)]
    assert node.submitted(BeginPush) == [BeginPush(T, D0, AGENT, LEASE_S)]
    assert [(push.layers, push.source, push.target) for push in node.submitted(PushBlocks)] == [
        (layers, span(source(node)), TARGET) for layers in LAYER_GROUPS
    ]
    assert node.submitted(FinishPush) == [FinishPush(T, None)]
    assert node.role.gauges().blocks_held == 2
    written(node)
    pushes = RankPush(0, 0, 0, 1, "direct", PATTERN_BYTES // 2, 0.25), RankPush(1, 0, 1, 2, "repacked", PATTERN_BYTES // 2, 0.125)
    assert node.frames(PatternPushed) == [PatternPushed(7, "done", "", "tcp over lo", pushes)]
    assert prefill_scripts.is_idle(node)


def test_it_is_pushed_once_the_device_has_filled_it() -> None:
    is_done = False
    node = writer(mark=lambda: lambda: is_done)
    node.say(PUSH)
    assert not node.submitted(PushBlocks)[0].is_ready()
    is_done = True
    assert node.submitted(PushBlocks)[0].is_ready()


def test_a_busy_writer_has_no_room_and_says_so_to_both() -> None:
    node = writer(num_blocks=6)
    node.say(prefill_scripts.prefill(prompt(20), grant=None))
    node.step()
    node.clear()
    node.say(PUSH)
    assert [frame for _, frame in node.sent] == [
        Quiesced(T, D0, True),
        PatternPushed(7, "no_room", "p0: no blocks are free for it", "tcp over lo", ()),
    ]
    assert not node.commands


@pytest.mark.parametrize(("first", "blocks"), [(0, TARGET[:1]), (0, (*TARGET, BlockId(3))), (4, TARGET)])
def test_a_grant_of_another_size_is_refused(first: int, blocks: tuple[BlockId, ...]) -> None:
    node = writer()
    node.say(PushPattern(7, Grant(T, D0, P0, AGENT, first, blocks, LEASE_S), 8, SALT))
    assert node.last(PatternPushed).step == "failed"
    assert not node.submitted(BeginPush)


def test_a_grant_of_a_node_that_it_was_never_told_to_connect_to_is_refused() -> None:
    node = make_prefill_node()
    node.say(PUSH)
    assert node.last(PatternPushed).step == "failed"
    assert not node.submitted(BeginPush)


def test_a_target_of_larger_blocks_gets_it_in_its_own() -> None:
    node = make_prefill_node()
    connect(node, AGENT, kv=kv_of(16))
    node.say(PushPattern(7, Grant(T, D0, P0, AGENT, 0, TARGET, LEASE_S), 32, SALT))
    first, *_ = node.submitted(PushBlocks)
    assert first.source.num_tokens == 16 and len(first.source.blocks) == 4, "no more than a step's tokens in one write"
    assert {block for push in node.submitted(PushBlocks) for block in push.target} == set(TARGET)
    assert len(node.submitted(PushBlocks)) == 2 * len(LAYER_GROUPS)


def test_a_grant_that_was_revoked_before_is_not_written() -> None:
    node = writer()
    node.say(Cancel(T, P0, D0), PUSH)
    assert node.last(PatternPushed).step == "failed"
    assert not node.submitted(BeginPush)
    assert all(frame.clean for frame in node.frames(Quiesced))


def test_a_cancel_stops_it_and_the_target_hears_when_nothing_is_in_flight() -> None:
    node = writer()
    node.say(PUSH, Cancel(T, P0, D0))
    assert node.submitted(CancelPush) == [CancelPush(T)]
    assert not node.frames(Quiesced)
    written(node, finished=False)
    assert set(node.frames(Quiesced)) == {Quiesced(T, D0, True)}
    assert node.frames(PatternPushed) == [PatternPushed(7, "failed", "the push was stopped", "tcp over lo", ())]
    assert prefill_scripts.is_idle(node)


def test_a_pair_that_is_lost_under_way_fails_it_and_the_target_hears_that_bytes_may_come() -> None:
    node = writer()
    node.say(PUSH)
    written(node, clean=False, finished=False)
    assert node.frames(Quiesced) == [Quiesced(T, D0, False)]
    assert node.last(PatternPushed).reason == "the push failed"
    assert node.submitted(QuiesceByWire) == [QuiesceByWire(T, D0, False)]
    assert prefill_scripts.is_idle(node)


def test_its_lease_is_renewed_on_both_sides_while_it_is_under_way() -> None:
    node = writer()
    node.say(PUSH)
    node.clear()
    node.after(LEASE_S / 2)
    assert node.submitted(transfer.RenewLease) == [transfer.RenewLease(T)]
    assert node.last(Progress) == Progress((T,))


@pytest.mark.parametrize(("make", "push"), [(writer, PUSH), (decode_writer, PUSH_BACK)], ids=["prefill", "decode"])
def test_a_lost_router_stops_it(make: Callable[[], Writer], push: PushPattern) -> None:
    node = make()
    node.say(push)
    node.link_down(LinkId(2))
    assert not node.submitted(CancelPush)
    node.link_down(LINK)
    assert node.submitted(CancelPush) == [CancelPush(T)]
    written(node, finished=False)
    assert node.pool.num_available == node.pool.num_blocks


def test_a_decode_node_is_a_writer_too() -> None:
    node = decode_writer()
    node.say(PUSH_BACK)
    written(node)
    assert node.last(PatternPushed).step == "done"
    assert decode_scripts.is_empty(node)
