"""The decode role over scripted frames, transfer events and time: decisions, grants, landings, tokens."""

import pytest

from disaggd.cluster.hello import OpenPair, PairAgent, PairReady
from disaggd.cluster.protocol import (
    Abort,
    Cancel,
    Decided,
    Granted,
    Landed,
    NeedPrefill,
    NoRoom,
    PrefillLost,
    Refused,
    Released,
    RequestGrant,
    Room,
    Tokens,
)
from disaggd.engine.sequence import SequenceState
from disaggd.ids import AgentId, Incarnation, NodeName, SeqId
from disaggd.roles.compute import LinkId
from disaggd.transfer import messages as transfer
from disaggd.transfer.notification import FirstToken
from tests.support.decode_scripts import AGENT, P0, PLACE, Node, S, delivered, generate, granted, is_empty, landed, make_decode_node
from tests.support.endpoints import endpoint
from tests.support.role_nodes import LEASE_S, VOCAB_SIZE, expected, next_token, prompt

# ── decisions ──


def test_a_short_prompt_is_prefilled_here() -> None:
    node = make_decode_node()
    node.say(generate(prompt(16)))
    decided = node.last(Decided)
    assert (decided.seq, decided.attempt, decided.reason.partition(":")[0]) == (S, 0, "short")
    node.run()
    assert delivered(node) == expected(prompt(16), 4)
    assert node.frames(Tokens)[-1].runs[0].finish_reason == "length"
    assert is_empty(node)


def test_a_long_prompt_is_parked_and_holds_no_blocks_until_a_grant_is_asked_for() -> None:
    node = make_decode_node()
    node.say(generate(prompt(17)))
    assert node.last(NeedPrefill).grant is None
    assert node.engine.sequences[S].state is SequenceState.QUEUED
    assert node.pool.num_free == node.pool.num_blocks


@pytest.mark.parametrize(("options", "code"), [({"nodes": 0}, "no_prefill_node"), ({"depth": 4}, "queue_full")])
def test_a_long_prompt_stays_here_when_it_cannot_go_elsewhere(options: dict[str, int], code: str) -> None:
    node = make_decode_node()
    node.say(generate(prompt(100), **options))
    assert node.last(Decided).reason.partition(":")[0] == code
    node.run()
    assert delivered(node) == expected(prompt(100), 4)


def test_a_request_may_override_the_decision() -> None:
    node = make_decode_node()
    node.say(generate(prompt(3), SeqId("a"), policy="remote"), generate(prompt(200), SeqId("b"), policy="local", max_tokens=1))
    assert (node.last(NeedPrefill).seq, node.last(Decided).seq) == ("a", "b")


@pytest.mark.parametrize("nodes", [0, 1])
def test_a_prompt_that_the_pool_can_never_hold_is_refused_with_both_numbers(nodes: int) -> None:
    node = make_decode_node(num_blocks=8)
    node.say(generate(prompt(32), nodes=nodes))
    refused = node.last(Refused)
    assert refused.code == "context_length_exceeded" and "32" in refused.message and "31" in refused.message
    assert is_empty(node) and len(node.sent) == 1


def test_a_retry_continues_the_indexes_of_what_was_sent() -> None:
    node = make_decode_node()
    tokens = prompt(10)
    sent = expected(tokens, 3)
    node.say(generate(tokens + sent, num_prompt=10, max_tokens=5, attempt=1))
    node.run()
    runs = [run for frame in node.frames(Tokens) for run in frame.runs]
    assert [(run.start, run.tokens) for run in runs] == [(i, (token,)) for i, token in enumerate(expected(tokens, 5))][3:]
    assert runs[-1].finish_reason == "length"


def test_a_newer_attempt_replaces_an_older_one_and_an_older_one_changes_nothing() -> None:
    node = make_decode_node()
    grant = granted(node)
    node.say(generate(prompt(20), attempt=1))
    assert node.last(Cancel).token == grant.token
    node.clear()
    node.say(generate(prompt(20), attempt=1), generate(prompt(20), attempt=0), Abort(S, 0), PrefillLost(S, 0))
    assert node.engine.sequences[S].attempt == 1
    assert node.sent == [(1, Released(S, 0, "unknown sequence"))]


def test_one_output_token_is_left_to_the_prefill_node_alone() -> None:
    node = make_decode_node()
    node.say(generate(prompt(20), max_tokens=1, grant_for=P0))
    assert node.last(NeedPrefill).grant is None
    assert is_empty(node)
    node.say(Abort(S, 0))


def test_the_last_token_of_a_retry_needs_no_grant_either() -> None:
    node = make_decode_node()
    node.say(generate(prompt(23), num_prompt=20, max_tokens=4, attempt=1, grant_for=P0))
    assert node.last(NeedPrefill).grant is None
    assert is_empty(node)


# ── grants ──


@pytest.mark.parametrize(("length", "need"), [(19, 5), (20, 6), (21, 6)])
def test_a_grant_holds_the_prompt_and_the_first_generated_token(length: int, need: int) -> None:
    node = make_decode_node()
    grant = granted(node, length=length)
    assert len(set(grant.block_ids)) == need
    assert (grant.writer, grant.target, grant.agent_id, grant.first_token_index, grant.lease_s) == (P0, "d0", AGENT, 0, LEASE_S)
    assert len(grant.token) == 16
    assert node.role.gauges().blocks_granted == need
    assert node.pool.num_free == node.pool.num_blocks - need


def test_what_shall_land_is_expected_before_the_grant_leaves() -> None:
    """The bytes of the prompt's blocks; the block of the token generated first may lie beyond them."""
    node = make_decode_node()
    grant = granted(node, length=20)
    assert node.commands == [transfer.Expect(grant.token, P0, AGENT, 5)]


def test_every_grant_has_a_token_of_its_own() -> None:
    node = make_decode_node()
    tokens = {granted(node, SeqId(str(i))).token for i in range(8)}
    assert len(tokens) == 8


def test_a_grant_may_ride_on_need_prefill() -> None:
    node = make_decode_node()
    node.say(generate(prompt(20), grant_for=P0))
    grant = node.last(NeedPrefill).grant
    assert grant is not None and len(grant.block_ids) == 6
    landed(node, grant)
    assert delivered(node) == expected(prompt(20), 1)


def test_asking_again_takes_back_the_grant_that_rode_along() -> None:
    node = make_decode_node()
    node.say(generate(prompt(20), grant_for=P0))
    first = node.last(NeedPrefill).grant
    node.say(RequestGrant(S, 0, P0))
    assert first is not None and node.last(Granted).grant.token != first.token
    assert node.role.gauges().blocks_granted == 6 and node.role.gauges().blocks_quarantined == 0
    landed(node, first)
    assert node.frames(Tokens) == []


def test_no_grant_for_a_prefill_node_that_has_no_agent_here() -> None:
    node = make_decode_node()
    node.say(generate(prompt(20), grant_for=NodeName("p9")))
    assert node.last(NeedPrefill).grant is None
    node.say(RequestGrant(S, 0, NodeName("p9")))
    assert node.last(NoRoom) == NoRoom(S, 0)


def test_a_fenced_agent_is_granted_no_more() -> None:
    node = make_decode_node()
    node.event(transfer.Fenced(P0, AGENT))
    node.say(generate(prompt(20), grant_for=P0))
    assert node.last(NeedPrefill).grant is None
    node.event(transfer.PairOpened(P0, Incarnation("p0-first"), endpoint(AgentId("agent-2"), b"", PLACE)))
    node.say(RequestGrant(S, 0, P0))
    assert node.last(Granted).grant.agent_id == "agent-2"


def test_a_grant_for_an_unknown_sequence_is_released() -> None:
    node = make_decode_node()
    node.say(RequestGrant(S, 0, P0))
    assert node.last(Released) == Released(S, 0, "no such sequence waits for a grant")


# ── room ──


def test_without_room_the_router_hears_of_it_and_again_when_there_is_some() -> None:
    node = make_decode_node(num_blocks=16)
    first = granted(node, SeqId("first"), 36)
    node.say(generate(prompt(36)), RequestGrant(S, 0, P0))
    assert node.last(NoRoom) == NoRoom(S, 0)
    node.after(0.1)
    assert node.frames(Room) == []
    landed(node, first, 36)
    node.say(Abort(SeqId("first"), 0))
    node.after(0.1)
    assert node.frames(Room) == [Room()]
    node.after(0.1)
    assert len(node.frames(Room)) == 1, "once for each NoRoom"
    node.say(RequestGrant(S, 0, P0))
    assert node.last(Granted).seq == S


def test_room_is_due_as_soon_as_a_step_has_freed_it() -> None:
    """Nothing may come in any more: the thread must not fall asleep over it."""
    node = make_decode_node(num_blocks=16)
    node.say(generate(prompt(16), SeqId("local"), max_tokens=2))
    node.step()
    node.say(generate(prompt(48)), RequestGrant(S, 0, P0))
    assert node.frames(NoRoom) and node.role.next_deadline() is None
    node.run()
    assert node.role.next_deadline() == node.now


def test_what_comes_free_is_kept_for_a_grant_that_has_waited_long() -> None:
    """Later grants, though there is room for them, and younger local sequences would else starve it."""
    node = make_decode_node(num_blocks=16)
    out = granted(node, SeqId("out"), 36)
    node.say(generate(prompt(48)), RequestGrant(S, 0, P0, earmark=True))
    assert node.last(NoRoom) == NoRoom(S, 0)
    small, local = SeqId("small"), SeqId("local")
    node.say(generate(prompt(17), small), RequestGrant(small, 0, P0), generate(prompt(4), local, max_tokens=1))
    assert node.last(NoRoom) == NoRoom(small, 0), "5 of 6 free blocks are too many, when 13 are kept"
    assert delivered(node, local) == []
    node.step()
    assert delivered(node, local) == []
    landed(node, out, 36)
    node.say(Abort(SeqId("out"), 0))
    node.after(0.1)
    assert node.frames(Room) == [Room()]
    node.say(RequestGrant(small, 0, P0))
    assert node.last(NoRoom) == NoRoom(small, 0), "not before the other"
    node.say(RequestGrant(S, 0, P0))
    assert node.last(Granted).seq == S
    node.run()
    assert len(delivered(node, local)) == 1


def test_a_router_that_was_refused_another_grant_meanwhile_is_told_of_room_again() -> None:
    """It thinks the node full since, and asks nobody; the one that blocks are kept for would wait for ever."""
    node = make_decode_node(num_blocks=16)
    out = granted(node, SeqId("out"), 36)
    node.say(generate(prompt(48)), RequestGrant(S, 0, P0, earmark=True))
    landed(node, out, 36)
    node.say(Abort(SeqId("out"), 0))
    node.after(0.1)
    assert node.frames(Room) == [Room()]
    other = SeqId("other")
    node.say(generate(prompt(48), other), RequestGrant(other, 0, P0, earmark=True))
    assert node.last(NoRoom) == NoRoom(other, 0)
    node.after(0.1)
    assert node.frames(Room) == [Room(), Room()]
    node.after(0.1)
    assert len(node.frames(Room)) == 2, "it knows"


def test_nothing_is_kept_for_a_sequence_that_is_gone() -> None:
    node = make_decode_node(num_blocks=16)
    granted(node, SeqId("out"), 36)
    local = SeqId("local")
    node.say(generate(prompt(48)), RequestGrant(S, 0, P0, earmark=True), generate(prompt(4), local, max_tokens=1))
    node.step()
    assert delivered(node, local) == [] and not node.engine.has_work
    node.say(Abort(S, 0))
    node.run()
    assert len(delivered(node, local)) == 1


def test_steps_are_short_from_a_grant_to_the_first_step_of_its_sequence() -> None:
    """Its first token is with the client meanwhile, who counts the time to the second."""
    node = make_decode_node()
    pace = node.engine.pace
    node.after(0.1)
    assert not pace.is_expecting
    grant = granted(node, S, 20)
    node.after(0.1)
    assert pace.is_expecting
    landed(node, grant, 20)
    node.after(0.0)
    assert pace.is_expecting, "the next step is its first"
    node.step()
    node.after(0.0)
    assert not pace.is_expecting


def test_growth_of_running_sequences_comes_before_grants() -> None:
    """Free blocks must leave one for each running sequence and 5 % of the pool."""
    node = make_decode_node(num_blocks=20)
    node.say(generate(prompt(16), SeqId("local"), max_tokens=50))
    node.step()
    assert node.pool.num_free == 16
    node.say(generate(prompt(59)), RequestGrant(S, 0, P0))
    assert node.frames(NoRoom), "15 blocks and one to grow into, and one spare, are more than 16"
    node.say(generate(prompt(55), SeqId("smaller")), RequestGrant(SeqId("smaller"), 0, P0))
    assert node.last(Granted).seq == "smaller"


# ── landing ──


def test_a_landed_sequence_continues_from_the_pushed_blocks() -> None:
    node = make_decode_node()
    grant = granted(node)
    node.now += 0.25
    landed(node, grant)
    assert node.last(Landed) == Landed(S, 0)
    assert delivered(node) == expected(prompt(20), 1), "the first token starts at index 0 here too"
    assert node.engine.sequences[S].block_table == list(grant.block_ids)
    assert node.role.gauges().blocks_granted == 0
    node.run()
    assert delivered(node) == expected(prompt(20), 4)
    assert is_empty(node)


def test_the_landing_is_told_before_its_tokens() -> None:
    node = make_decode_node()
    landed(node, granted(node))
    kinds = [type(frame) for _, frame in node.sent]
    assert kinds.index(Landed) < kinds.index(Tokens)


def test_a_first_token_that_ends_the_sequence_here_finishes_it() -> None:
    node = make_decode_node()
    grant = granted(node, stop=(next_token(prompt(20)),))
    landed(node, grant)
    assert node.last(Tokens).runs[0].finish_reason == "stop"
    assert is_empty(node)


def test_a_first_token_beyond_the_vocabulary_is_never_computed() -> None:
    """A peer's notification brings it; the model's table ends there, and with the lookup the node would."""
    node = make_decode_node()
    node.event(transfer.Landed(granted(node).token, FirstToken(VOCAB_SIZE), 0))
    assert "beyond the vocabulary" in node.last(Released).reason
    assert is_empty(node)


def test_one_frame_a_step_carries_the_tokens_of_all_sequences_of_a_router() -> None:
    node = make_decode_node()
    other = LinkId(2)
    node.link_up(other)
    node.say(generate(prompt(3, 1), SeqId("a")), generate(prompt(4, 2), SeqId("b")))
    node.say(generate(prompt(5, 3), SeqId("c")), link=other)
    node.clear()
    node.step()
    runs = {link: [run.seq for run in frame.runs] for link, frame in node.sent if isinstance(frame, Tokens)}
    assert runs == {1: ["a", "b"], 2: ["c"]}
    assert len(node.frames(Tokens)) == 2


# ── pairs ──


def test_a_router_that_opens_a_pair_gets_the_agent_and_hears_of_its_probe() -> None:
    node = make_decode_node()
    node.say(OpenPair(P0, Incarnation("p0-first"), 1))
    assert node.commands == [transfer.OpenPair(P0, Incarnation("p0-first"), 1)]
    node.event(transfer.PairOpened(P0, Incarnation("p0-first"), endpoint(AGENT, b"metadata", PLACE)))
    assert node.last(PairAgent) == PairAgent(P0, Incarnation("p0-first"), endpoint(AGENT, b"metadata", PLACE))
    node.event(transfer.PairProbed(P0, AGENT))
    assert node.last(PairReady) == PairReady(P0, AGENT)


def test_the_grants_of_a_restarted_prefill_node_are_given_up_at_once_and_freed_by_the_fence() -> None:
    node = make_decode_node()
    granted(node)
    node.say(OpenPair(P0, Incarnation("p0-second"), 1))
    assert node.last(Released).seq == S
    assert node.role.gauges().blocks_quarantined == 6
    node.event(transfer.Fenced(P0, AGENT), transfer.PairOpened(P0, Incarnation("p0-second"), endpoint(AgentId("agent-2"), b"", PLACE)))
    assert is_empty(node)


def test_opening_a_pair_again_touches_no_grant() -> None:
    node = make_decode_node()
    granted(node)
    node.say(OpenPair(P0, Incarnation("p0-first"), 1))
    assert not node.frames(Released) and node.role.gauges().blocks_granted == 6


@pytest.mark.parametrize("order", [("old", "young"), ("young", "old")])
@pytest.mark.parametrize("num_local", [6, 8, 10])
def test_earmarks_out_of_order_and_older_prompts_between_them_do_not_wait_for_each_other(order: tuple[str, str], num_local: int) -> None:
    """One did not go before older local prompts, these not before the other, and that not before the one: all stood still."""
    node = make_decode_node(16)
    node.say(generate(prompt(50, 9), SeqId("busy"), policy="local", max_tokens=6))
    node.step()
    node.say(generate(prompt(38, 1), SeqId("old"), policy="remote", max_tokens=2))
    for i in range(num_local):
        node.say(generate(prompt(38, 2 + i), SeqId(f"local-{i}"), policy="local", max_tokens=2))
    node.say(generate(prompt(30, 77), SeqId("young"), policy="remote", max_tokens=2))
    node.say(*(RequestGrant(SeqId(name), 0, P0, earmark=True) for name in order))
    for _ in range(100):
        node.step()
        node.after(0.1)
        for name in order:
            grant_and_land(node, SeqId(name))
    assert is_empty(node)


def grant_and_land(node: Node, seq: SeqId) -> None:
    """The router asks again for whoever waits for a grant, and what is granted lands at once."""
    placed = node.role._placed.get(seq)
    if placed is None or placed.sequence.state is not SequenceState.QUEUED:
        return
    if placed.grant is None:
        node.say(RequestGrant(seq, 0, P0, earmark=True))
    if (token := placed.grant) is not None:
        node.event(transfer.Landed(token, FirstToken(5), 0))


def test_a_grant_for_a_sequence_that_is_computed_here_is_refused_and_nothing_else() -> None:
    """No router of ours asks for one; whoever else has found the port may."""
    node = make_decode_node()
    node.say(generate(prompt(10), policy="local"), RequestGrant(S, 0, P0, earmark=True), RequestGrant(S, 0, P0))
    assert len(node.frames(Released)) == 2 and not node.frames(Granted)
    node.run()
    assert delivered(node) == expected(prompt(10), 4)
