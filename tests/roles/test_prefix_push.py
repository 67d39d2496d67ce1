"""A decode node that is asked for the prefix which it has cached: pushed from blocks that it holds, or refused so that nobody waits."""

import pytest

from disaggd.cluster.hello import ConnectPair, PairLost, PairReady
from disaggd.cluster.protocol import Abort, Cancel, Gauges, Grant, Granted, Progress, PushPrefix, Quiesced, RequestGrant
from disaggd.ids import AgentId, BlockId, GrantToken, Incarnation, NodeName, SeqId
from disaggd.roles.compute import LinkId
from disaggd.transfer import messages as transfer
from disaggd.transfer.layout import PoolPlace, Span
from tests.support.decode_scripts import P0, Node, S, generate, is_empty, landed, make_decode_node
from tests.support.endpoints import endpoint
from tests.support.role_nodes import BLOCK, HASHER, KV, LAYER_GROUPS, LEASE_S, LINK, QUIESCE_S, prompt

D0 = NodeName("d0")
T = GrantToken(b"prefix")
INTAKE = AgentId("intake-1")
LENGTH = 40
NUM_CACHED = 20


def pushing_node(num_blocks: int = 64) -> Node:
    """A node with `NUM_CACHED` tokens of the prompt cached, and a sequence granted that it has left them out of."""
    node = make_decode_node(num_blocks, hasher=HASHER)
    node.say(ConnectPair(P0, Incarnation("p0-first"), endpoint(INTAKE, b"", PoolPlace(0, 64)), KV), PairReady(P0, INTAKE))
    node.say(generate(prompt(NUM_CACHED), SeqId("before"), policy="local", max_tokens=1))
    node.run()
    node.say(generate(prompt(LENGTH), max_tokens=2), RequestGrant(S, 0, P0))
    assert node.last(Granted).grant.first_token_index == NUM_CACHED
    node.clear()
    return node


def prefix_grant(first: int = 0, count: int = NUM_CACHED // BLOCK, token: GrantToken = T) -> Grant:
    """Of p0: its block 100 + i for the i-th that it wants."""
    return Grant(token, P0, D0, INTAKE, first * BLOCK, tuple(BlockId(100 + i) for i in range(count)), LEASE_S)


def ask(node: Node, grant: Grant | None = None, seq: SeqId = S, attempt: int = 0, link: LinkId = LINK) -> None:
    node.say(PushPrefix(seq, attempt, grant or prefix_grant()), link=link)


def handles_end(node: Node, *, clean: bool = True, finished: bool = True) -> None:
    """What the transfer thread says of all that it was given."""
    for push in node.submitted(transfer.PushBlocks):
        node.event(transfer.HandleDone(push.token, push.source.blocks, 10))
    node.event(transfer.PushEnded(T, clean, finished, 10, node.now, node.now))


def held(node: Node) -> int:
    gauges: Gauges = node.role.gauges()
    return gauges.blocks_held


def test_what_is_cached_is_pushed_at_once_and_in_order() -> None:
    node, grant = pushing_node(), prefix_grant()
    ask(node, grant)
    prefix = tuple(node.role._placed[S].prefix)
    assert node.commands == [
        transfer.BeginPush(T, P0, INTAKE, LEASE_S),
        *(
            transfer.PushBlocks(T, layers, Span(prefix[blocks], 0, num_tokens), grant.block_ids[blocks])
            for layers in LAYER_GROUPS
            for blocks, num_tokens in ((slice(0, 4), 4 * BLOCK), (slice(4, 5), BLOCK))
        ),
        transfer.FinishPush(T, None),
    ]
    assert not node.sent


def test_only_what_is_asked_for_is_pushed() -> None:
    node = pushing_node()
    ask(node, prefix_grant(first=3, count=2))
    prefix = node.role._placed[S].prefix
    assert [push.source.blocks for push in node.submitted(transfer.PushBlocks)] == [tuple(prefix[3:5])] * 2
    assert {push.target for push in node.submitted(transfer.PushBlocks)} == {(100, 101)}


def test_a_push_that_landed_is_nobodys_matter_any_more() -> None:
    node = pushing_node()
    ask(node)
    handles_end(node)
    assert not node.frames(Quiesced) and not node.submitted(transfer.QuiesceByWire)
    node.say(Abort(S, 0))
    node.say(Quiesced(node.frames(Cancel)[0].token, D0, True))
    assert is_empty(node)


def test_blocks_stay_while_they_are_read() -> None:
    node = pushing_node()
    ask(node)
    node.say(Abort(S, 0))
    assert held(node) == NUM_CACHED // BLOCK, "the sequence is gone, its prefix is read on"
    handles_end(node)
    assert held(node) == 0


def test_the_sequence_may_run_before_the_push_has_ended() -> None:
    node = pushing_node()
    grant = node.role._placed[S].grant
    assert grant is not None
    ask(node)
    landed(node, Grant(grant, D0, P0, AgentId("agent-1"), NUM_CACHED, (), LEASE_S), LENGTH)
    node.run()
    handles_end(node)
    assert is_empty(node)


@pytest.mark.parametrize(
    ("grant", "seq", "attempt"),
    [
        pytest.param(prefix_grant(), SeqId("unknown"), 0, id="unknown sequence"),
        pytest.param(prefix_grant(), S, 1, id="another attempt"),
        pytest.param(prefix_grant(count=6), S, 0, id="more than is held"),
        pytest.param(Grant(T, P0, D0, AgentId("other"), 0, (BlockId(1),), LEASE_S), S, 0, id="another agent"),
        pytest.param(Grant(T, P0, D0, INTAKE, -BLOCK, (BlockId(1),), LEASE_S), S, 0, id="before the beginning"),
        pytest.param(Grant(T, P0, D0, INTAKE, 1, (BlockId(1),), LEASE_S), S, 0, id="amid a block"),
    ],
)
def test_what_cannot_be_pushed_is_refused_so_that_nobody_waits(grant: Grant, seq: SeqId, attempt: int) -> None:
    node = pushing_node()
    ask(node, grant, seq, attempt)
    assert node.last(Quiesced) == Quiesced(T, P0, True)
    assert not node.submitted(transfer.BeginPush)
    ask(node)
    assert not node.submitted(transfer.BeginPush), "what was refused is not pushed later: its blocks may be others' by now"


def test_a_grant_that_was_cancelled_before_it_came_is_refused() -> None:
    node = pushing_node()
    node.say(Cancel(T, D0, P0))
    ask(node)
    assert node.frames(Quiesced) == [Quiesced(T, P0, True)] * 2
    assert not node.submitted(transfer.BeginPush)


def test_a_grant_that_comes_twice_is_stopped_and_then_quiesced() -> None:
    node = pushing_node()
    ask(node)
    ask(node)
    assert not node.frames(Quiesced), "writes are in flight"
    assert node.submitted(transfer.CancelPush) == [transfer.CancelPush(T)]
    handles_end(node, finished=False)
    assert set(node.frames(Quiesced)) == {Quiesced(T, P0, True)}


def test_a_cancel_is_answered_when_nothing_is_in_flight() -> None:
    node = pushing_node()
    ask(node)
    node.say(Cancel(T, D0, P0))
    assert not node.frames(Quiesced)
    handles_end(node, clean=False, finished=False)
    assert set(node.frames(Quiesced)) == {Quiesced(T, P0, False)}
    assert node.submitted(transfer.QuiesceByWire) == [transfer.QuiesceByWire(T, P0, False)]


def test_a_push_that_failed_is_told_without_being_asked() -> None:
    """The prefill node would else wait until its lease has run out."""
    node = pushing_node()
    ask(node)
    node.event(transfer.PairFailed(P0, INTAKE, "connection reset"))
    handles_end(node, clean=False)
    assert node.frames(Quiesced) == [Quiesced(T, P0, False)]
    assert node.frames(PairLost) == [PairLost(P0, INTAKE, "connection reset")]


def test_a_lost_router_stops_its_pushes_and_the_wire_says_so() -> None:
    node = pushing_node()
    node.link_up(LinkId(2))
    ask(node)
    node.link_down(LinkId(2))
    assert not node.submitted(transfer.CancelPush)
    node.link_down()
    assert node.submitted(transfer.CancelPush) == [transfer.CancelPush(T)]
    handles_end(node, finished=False)
    assert node.submitted(transfer.QuiesceByWire) == [transfer.QuiesceByWire(T, P0, True)]


def test_leases_are_renewed_while_it_pushes_in_the_middle_of_steps_too() -> None:
    node = pushing_node()
    ask(node)
    node.after(LEASE_S / 5)
    assert node.frames(Progress) == [Progress((T,))]
    node.say(generate(prompt(8, seed=3), SeqId("local")))
    node.now += LEASE_S / 5
    node.step()
    assert len(node.frames(Progress)) == 2
    assert node.role.next_deadline() == node.now + LEASE_S / 5


def test_a_prefill_node_that_hangs_loses_its_path() -> None:
    node = pushing_node()
    ask(node)
    node.say(Cancel(T, D0, P0))
    node.after(QUIESCE_S)
    assert node.submitted(transfer.ClosePair) == [transfer.ClosePair(P0)]
    assert node.last(PairLost).agent_id == INTAKE
