"""A prefill node and a decode node whose blocks differ in size: every token is pushed once, in whole blocks of the target's."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disaggd.cluster.hello import ConnectPair, PairReady
from disaggd.cluster.protocol import Grant, Granted, JobEnded, PrefixGrant, PrefixSource, PushPrefix, Quiesced, RequestGrant
from disaggd.engine.scheduler import StepPlan
from disaggd.ids import BlockId, GrantToken, Incarnation, SeqId
from disaggd.transfer import messages as transfer
from tests.support import decode_scripts, prefill_scripts
from tests.support.decode_scripts import generate, make_decode_node
from tests.support.endpoints import endpoint
from tests.support.prefill_scripts import D0, INTAKE, P0, S, T, grant_for, handles_done, is_idle, prefill, push_ended, ready_node
from tests.support.role_nodes import LAYER_GROUPS, LEASE_S, expected, hasher_of, kv_of, prompt
from tests.support.role_pair import RolePair

SIZES = [(16, 64), (64, 16), (48, 64), (64, 48)]
"""Of the writer, and of the target."""
both = pytest.mark.parametrize(("ours", "theirs"), SIZES)

Slot = tuple[int, BlockId, int]
"""A layer, a block, and a place for a token in it."""


def moves(pushes: list[transfer.PushBlocks], ours: int, theirs: int) -> list[tuple[Slot, Slot]]:
    """Every token that is pushed, from where to where."""
    found = []
    for push in pushes:
        span = push.source
        assert 0 <= span.start < ours and len(span.blocks) == -(-(span.start + span.num_tokens) // ours)
        assert len(push.target) == -(-span.num_tokens // theirs)
        for layer in push.layers:
            for i in range(span.num_tokens):
                at = span.start + i
                found.append(((layer, span.blocks[at // ours], at % ours), (layer, push.target[i // theirs], i % theirs)))
    return found


def check_moves(pushes: list[transfer.PushBlocks], table: list[BlockId], tokens: range, ours: int, theirs: int) -> None:
    """Tokens of a sequence whose blocks are `table` went to blocks 100, 101, … of the target, each once, and none else."""
    wanted = {
        ((layer, table[token // ours], token % ours), (layer, BlockId(100 + (token - tokens.start) // theirs), token % theirs))
        for layer in range(3)
        for token in tokens
    }
    found = moves(pushes, ours, theirs)
    assert len(found) == len(wanted) and set(found) == wanted


def table_of(node: prefill_scripts.Node) -> list[BlockId]:
    """The blocks of the sequence that is computed from now on, which are gone from it when that is over."""
    table: list[BlockId] = []
    layers_done = node.role.layers_done

    def noted(plan: StepPlan, layers: range) -> None:
        table[:] = plan.chunks[0].sequence.block_table
        layers_done(plan, layers)

    node.role.layers_done = noted  # type: ignore[method-assign]
    return table


# ── a job ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def pushed_by_a_job(length: int, num_cached: int, left_out: int, ours: int, theirs: int, step: int) -> None:
    """A job of `length` tokens, of which the prefill node and the decode node have their parts already: what it pushes, checked."""
    node = ready_node(400, step, hasher=hasher_of(ours), block_size=ours, target_size=theirs)
    if num_cached:
        node.say(prefill(prompt(num_cached), None, SeqId("warm"), max_tokens=1))
        node.run()
        node.clear()
    node.say(prefill(prompt(length), grant_for(length, first_token_index=left_out, block_size=theirs)))
    table = table_of(node)
    node.run()
    pushes = node.submitted(transfer.PushBlocks)
    assert all(push.source.num_tokens <= -(-step // theirs) * theirs for push in pushes), "staging memory has room for no more"
    check_moves(pushes, table, range(left_out, length), ours, theirs)
    handles_done(node)
    push_ended(node)
    assert node.last(JobEnded).clean and is_idle(node)


@both
@pytest.mark.parametrize("length", [1, 16, 63, 64, 65, 200, 384])
def test_each_token_is_pushed_once_to_its_place(ours: int, theirs: int, length: int) -> None:
    pushed_by_a_job(length, 0, 0, ours, theirs, step=96)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), ours=st.integers(1, 20), theirs=st.integers(1, 20), length=st.integers(1, 120), cached=st.integers(0, 120))
def test_whatever_the_sizes_the_steps_and_what_is_cached_where(
    data: st.DataObject, ours: int, theirs: int, length: int, cached: int
) -> None:
    left_out = data.draw(st.integers(0, (length - 1) // theirs), "blocks that decode has") * theirs
    step = data.draw(st.integers(ours, 3 * ours + 5), "tokens of a step")
    pushed_by_a_job(length, min(cached, length), left_out, ours, theirs, step)


def test_what_fills_no_block_of_decodes_waits_for_the_next_chunk() -> None:
    node = ready_node(64, 96, block_size=48, target_size=64)
    node.say(prefill(prompt(200), grant_for(200, block_size=64)))
    ends = []
    while node.engine.has_work:
        node.step()
        ends.append(sum(push.source.num_tokens for push in node.submitted(transfer.PushBlocks) if push.layers == LAYER_GROUPS[0]))
    assert ends == [64, 192, 200], "of 96, 192 and 200 tokens that were computed"


def test_a_block_that_is_pushed_in_two_parts_is_held_for_both() -> None:
    node = ready_node(64, 96, block_size=48, target_size=64)
    node.say(prefill(prompt(128), grant_for(128, block_size=64)))
    node.run()
    first, second = [push for push in node.submitted(transfer.PushBlocks) if push.layers == LAYER_GROUPS[0]]
    assert first.source.blocks[-1] == second.source.blocks[0]
    for push in node.submitted(transfer.PushBlocks):
        if push.source == first.source:
            node.event(transfer.HandleDone(T, push.source.blocks, 10))
    assert node.role.gauges().blocks_held == 2


@both
def test_a_grant_is_measured_in_blocks_of_its_targets(ours: int, theirs: int) -> None:
    node = ready_node(64, 96, block_size=ours, target_size=theirs)
    node.say(prefill(prompt(200), grant_for(199 - theirs, block_size=theirs)))
    assert "does not hold 200 tokens" in node.last(JobEnded).reason
    node.say(prefill(prompt(200), grant_for(200, GrantToken(b"amid"), first_token_index=theirs // 2, block_size=theirs), SeqId("amid")))
    assert "does not hold 200 tokens" in node.last(JobEnded).reason


@both
def test_a_grant_expects_blocks_of_its_own_pool(ours: int, theirs: int) -> None:
    """Whatever they are written from."""
    node = make_decode_node(block_size=theirs, max_step_tokens=96)
    node.say(generate(prompt(200), max_tokens=2), RequestGrant(S, 0, P0))
    (expect,) = node.submitted(transfer.Expect)
    assert expect.num_blocks == -(-200 // theirs)
    assert len(node.last(Granted).grant.block_ids) == -(-201 // theirs)


# ── a prefix, from decode to prefill ─────────────────────────────────────────────────────────────────────────────────


def holding_node(block_size: int, theirs: int, length: int) -> decode_scripts.Node:
    """A decode node that has granted a sequence, and left out what it has of it: as much as fills blocks of its own."""
    node = make_decode_node(hasher=hasher_of(block_size), block_size=block_size, max_step_tokens=96)
    node.say(ConnectPair(P0, Incarnation("p0-first"), endpoint(INTAKE), kv_of(theirs)), PairReady(P0, INTAKE))
    node.say(generate(prompt(length), SeqId("before"), policy="local", max_tokens=1))
    node.run()
    node.say(generate(prompt(length + 10), max_tokens=2), RequestGrant(S, 0, P0))
    assert node.last(Granted).grant.first_token_index == length // block_size * block_size
    node.clear()
    return node


def prefix_grant(tokens: range, block_size: int) -> Grant:
    return Grant(T, P0, D0, INTAKE, tokens.start, tuple(BlockId(100 + i) for i in range(len(tokens) // block_size)), LEASE_S)


@both
def test_a_prefix_is_pushed_in_whole_blocks_of_the_prefill_nodes(ours: int, theirs: int) -> None:
    node = holding_node(ours, theirs, 200)
    tokens = range(theirs, 200 // ours * ours // theirs * theirs)
    node.say(PushPrefix(S, 0, prefix_grant(tokens, theirs)))
    check_moves(node.submitted(transfer.PushBlocks), node.role._placed[S].prefix, tokens, ours, theirs)
    assert node.commands[-1] == transfer.FinishPush(T, None)


@both
def test_more_of_a_prefix_than_is_held_is_refused(ours: int, theirs: int) -> None:
    node = holding_node(ours, theirs, 200)
    node.say(PushPrefix(S, 0, prefix_grant(range(0, (200 // ours * ours // theirs + 1) * theirs), theirs)))
    assert not node.submitted(transfer.BeginPush) and node.last(Quiesced) == Quiesced(T, P0, True)


@both
def test_a_prefill_node_wants_what_fills_its_own_blocks(ours: int, theirs: int) -> None:
    """`theirs` is decode's, which holds so many whole blocks of its own."""
    node = prefill_scripts.taking_node(64, 96, block_size=ours)
    held = 200 // theirs * theirs
    node.say(prefill(prompt(300), None, prefix=PrefixSource(D0, held)))
    grant = node.last(PrefixGrant).grant
    assert (grant.first_token_index, len(grant.block_ids)) == (0, held // ours)
    assert node.submitted(transfer.Expect)[0].num_blocks == held // ours
    node.event(transfer.Landed(grant.token, None, 1))
    assert node.engine.cache.find(node.engine.sequences[S]) == list(grant.block_ids)


# ── both together ────────────────────────────────────────────────────────────────────────────────────────────────────


@both
def test_prompts_and_prefixes_go_both_ways_and_every_token_is_right(ours: int, theirs: int) -> None:
    pair = RolePair(64, prefill_size=ours, decode_size=theirs, max_step_tokens=96)
    pair.submit(prompt(200), 2, "local")
    pair.come_to_rest()
    pair.submit(prompt(300), 4, "remote")
    pair.come_to_rest()
    assert [client.tokens for client, _, _ in pair.clients] == [expected(prompt(200), 2), expected(prompt(300), 4)]
    assert pair.dispatcher.prefixes.outcomes == {(D0, P0, "landed"): 1}
    assert pair.nodes[P0].node.engine.cache.hit_tokens == 201 // theirs * theirs // ours * ours
