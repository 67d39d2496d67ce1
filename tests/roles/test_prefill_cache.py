"""A prefill node that holds part of a prompt: it computes the rest, and pushes all that decode lacks."""

from disaggd.cluster.protocol import Prefilled
from disaggd.ids import BlockId, GrantToken, SeqId
from disaggd.transfer import messages as transfer
from tests.support.prefill_scripts import Node, S, grant_for, handles_done, is_idle, prefill, push_ended, ready_node
from tests.support.role_nodes import HASHER, LAYER_GROUPS, next_token, prompt

WARM = SeqId("warm")
LONG = prompt(60)


def warm_node(num_tokens: int = 40, num_blocks: int = 64, max_step_tokens: int = 16) -> Node:
    """A prefill node that has computed the first `num_tokens` tokens of `LONG`."""
    node = ready_node(num_blocks, max_step_tokens, hasher=HASHER)
    node.say(prefill(LONG[:num_tokens], None, WARM, max_tokens=1))
    node.run()
    node.clear()
    return node


def pushed(node: Node, layers: range) -> list[tuple[BlockId, BlockId]]:
    """(source, target) of these layers, in order."""
    pushes = [push for push in node.submitted(transfer.PushBlocks) if push.layers == layers]
    return [pair for push in pushes for pair in zip(push.source.blocks, push.target, strict=True)]


def test_what_was_cached_is_pushed_beside_what_is_computed_each_block_once() -> None:
    node = warm_node()
    node.say(prefill(LONG, grant_for(60)))
    sequence = node.engine.sequences[S]
    node.step()
    table = list(sequence.block_table)
    node.run()
    assert node.last(Prefilled).num_cached == 40
    assert node.last(Prefilled).token == next_token(LONG)
    for layers in LAYER_GROUPS:
        assert pushed(node, layers) == [(table[i], BlockId(100 + i)) for i in range(15)]
    handles_done(node)
    push_ended(node)
    assert is_idle(node)


def test_no_handle_is_larger_than_what_a_step_fills() -> None:
    node = warm_node(max_step_tokens=16)
    node.say(prefill(LONG, grant_for(60)))
    node.run()
    assert [len(push.source.blocks) for push in node.submitted(transfer.PushBlocks) if push.layers == LAYER_GROUPS[0]] == [4, 4, 2, 4, 1]


def test_cached_blocks_wait_for_nothing_that_is_being_computed() -> None:
    node = ready_node(mark=lambda: lambda: False, hasher=HASHER)
    node.say(prefill(LONG[:40], None, WARM, max_tokens=1))
    node.run()
    node.say(prefill(LONG, grant_for(60)))
    node.run()
    ready = [push.is_ready() for push in node.submitted(transfer.PushBlocks) if push.layers == LAYER_GROUPS[0]]
    assert ready == [True, True, True, False, False]


def test_what_decode_has_is_not_pushed_whether_it_was_cached_here_or_not() -> None:
    node = warm_node()
    node.say(prefill(LONG, grant_for(60, first_token_index=24)))
    sequence = node.engine.sequences[S]
    node.step()
    table = list(sequence.block_table)
    node.run()
    for layers in LAYER_GROUPS:
        assert pushed(node, layers) == [(table[6 + i], BlockId(100 + i)) for i in range(9)]
    other = warm_node()
    other.say(prefill(LONG, grant_for(60, first_token_index=52)))
    other.run()
    for layers in LAYER_GROUPS:
        assert [target for _, target in pushed(other, layers)] == [100, 101]


def test_a_whole_prompt_that_is_cached_has_its_last_block_computed_and_all_of_it_pushed() -> None:
    node = warm_node()
    node.say(prefill(LONG[:40], grant_for(40)))
    node.step()
    assert node.last(Prefilled).num_cached == 36
    assert [target for _, target in pushed(node, LAYER_GROUPS[1])] == [BlockId(100 + i) for i in range(10)]


def test_twins_are_computed_once_and_pushed_twice() -> None:
    node = ready_node(hasher=HASHER)
    grants = {name: GrantToken(name.encode()) for name in ("a", "b")}
    for name, token in grants.items():
        node.say(prefill(LONG, grant_for(60, token), SeqId(name)))
    node.run()
    assert [frame.num_cached for frame in node.frames(Prefilled)] == [0, 56]
    for token in grants.values():
        mine = [push for push in node.submitted(transfer.PushBlocks) if push.token == token and push.layers == LAYER_GROUPS[0]]
        assert [target for push in mine for target in push.target] == [BlockId(100 + i) for i in range(15)]


def test_a_cancelled_push_leaves_the_cached_blocks_cached() -> None:
    node = warm_node()
    node.say(prefill(LONG, grant_for(60)))
    node.step()
    handles_done(node)
    push_ended(node, clean=True, finished=False)
    assert is_idle(node)
    assert len(node.pool.find(HASHER.digests(LONG))) == 14  # the step had filled four more


def test_pushed_blocks_are_evicted_deepest_first_in_whatever_order_their_handles_ended() -> None:
    node = ready_node(num_blocks=16, hasher=HASHER)
    node.say(prefill(LONG, grant_for(60)))
    node.run()
    handles_done(node)
    push_ended(node)
    node.say(prefill(prompt(20, seed=5), None, SeqId("other"), max_tokens=1))
    node.run()
    assert len(node.pool.find(HASHER.digests(LONG))) == 11


def test_a_revoked_job_of_a_cached_prompt_holds_nothing() -> None:
    node = warm_node()
    node.say(prefill(LONG, grant_for(60)))
    node.link_down()
    push_ended(node, clean=True, finished=False)
    assert is_idle(node)
