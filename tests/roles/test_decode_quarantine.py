"""Grants that are given up: nobody uses their blocks before no late write can reach them, and then somebody may."""

from collections.abc import Callable

import pytest

from disaggd.cluster.protocol import Abort, Cancel, Gauges, Landed, PrefillLost, Progress, Quiesced, Released, RequestGrant, Tokens
from disaggd.ids import AgentId, Incarnation, NodeName, SeqId
from disaggd.transfer import messages as transfer
from disaggd.transfer.notification import FirstToken
from tests.support.decode_scripts import AGENT, P0, PLACE, Node, S, delivered, generate, granted, is_empty, landed, make_decode_node
from tests.support.endpoints import endpoint
from tests.support.role_nodes import LEASE_S, QUIESCE_S, expected, prompt

D0 = NodeName("d0")


def quarantined(node: Node) -> int:
    gauges: Gauges = node.role.gauges()
    return gauges.blocks_quarantined


# ── how a grant is given up ──


def lease_runs_out(node: Node) -> None:
    node.after(LEASE_S)


def prefill_is_lost(node: Node) -> None:
    node.say(PrefillLost(S, 0))


def landing_fails(node: Node) -> None:
    (token,) = node.role._grants._records
    node.event(transfer.LandingFailed(token, "piece 3 twice"))


@pytest.mark.parametrize("give_up", [lease_runs_out, prefill_is_lost, landing_fails])
def test_a_grant_that_is_given_up_is_quarantined_cancelled_and_its_sequence_released(give_up: Callable[[Node], None]) -> None:
    node = make_decode_node()
    grant = granted(node)
    node.clear()
    give_up(node)
    assert quarantined(node) == 6 and node.pool.num_free == 58
    assert not node.engine.sequences
    assert [frame for _, frame in node.sent] == [Cancel(grant.token, P0, D0), Released(S, 0, node.last(Released).reason)]
    assert node.commands == []  # the landing goes on being counted: the whole of it, or a quiesce, frees the blocks


def test_progress_renews_the_lease() -> None:
    node = make_decode_node()
    grant = granted(node)
    for _ in range(5):
        node.after(LEASE_S * 0.9)
        node.say(Progress((grant.token,)))
    assert not node.frames(Released)
    node.after(LEASE_S)
    assert node.frames(Released)


def test_the_lease_is_the_next_deadline() -> None:
    node = make_decode_node()
    assert node.role.next_deadline() is None
    granted(node)
    assert node.role.next_deadline() == node.now + LEASE_S


@pytest.mark.parametrize("state", ["queued", "granted", "landed", "running"])
def test_an_abort_frees_what_nobody_writes_and_quarantines_the_rest(state: str) -> None:
    node = make_decode_node()
    if state == "queued":
        node.say(generate(prompt(20)))
    else:
        grant = granted(node)
        if state != "granted":
            landed(node, grant)
        if state == "running":
            node.step()
    node.clear()
    node.say(Abort(S, 0))
    assert not node.engine.sequences
    if state == "granted":
        assert [frame for _, frame in node.sent] == [Cancel(grant.token, P0, D0)]
        assert quarantined(node) == 6
        node.say(Quiesced(grant.token, D0, True))
    assert is_empty(node) and quarantined(node) == 0


def test_a_lost_router_takes_its_sequences_with_it() -> None:
    node = make_decode_node()
    granted(node, SeqId("granted"))
    node.say(generate(prompt(3), SeqId("local")), generate(prompt(20), SeqId("queued")))
    node.link_down()
    assert not node.engine.sequences
    assert quarantined(node) == 6


def test_a_lost_router_leaves_another_routers_sequences_alone() -> None:
    node = make_decode_node()
    node.link_up(2)
    node.say(generate(prompt(3), SeqId("mine")), link=2)
    node.link_down()
    node.run()
    assert delivered(node, SeqId("mine")) == expected(prompt(3), 4)


# ── the arbiter ──


def test_asked_about_a_lost_prefill_decode_keeps_what_has_landed() -> None:
    node = make_decode_node()
    landed(node, granted(node))
    node.clear()
    node.say(PrefillLost(S, 0))
    assert [type(frame) for _, frame in node.sent] == [Landed]
    node.run()
    assert expected(prompt(20), 4)[1:] == [token for frame in node.frames(Tokens) for run in frame.runs for token in run.tokens]


def test_what_landed_and_was_preempted_later_is_kept_too() -> None:
    node = make_decode_node()
    landed(node, granted(node))
    sequence = node.engine.sequences[S]
    node.engine._scheduler._preempt(sequence)
    assert sequence.num_computed == 0
    node.say(PrefillLost(S, 0))
    assert not node.frames(Released)
    node.run()
    assert delivered(node) == expected(prompt(20), 4)


def test_asked_about_a_sequence_without_a_grant_decode_releases_it() -> None:
    node = make_decode_node()
    node.say(generate(prompt(20)), PrefillLost(S, 0))
    assert node.last(Released).seq == S
    assert is_empty(node)


def test_asked_about_an_unknown_sequence_decode_says_that_it_has_nothing() -> None:
    node = make_decode_node()
    node.say(PrefillLost(S, 0))
    assert node.last(Released) == Released(S, 0, "unknown sequence")


# ── how a quarantine ends ──


def given_up(node: Node, seq: SeqId = S) -> bytes:
    grant = granted(node, seq)
    node.say(PrefillLost(seq, 0))
    node.clear()
    return grant.token


@pytest.mark.parametrize("wire", [False, True])
def test_a_clean_quiesce_in_either_form_frees_the_blocks(wire: bool) -> None:
    node = make_decode_node()
    token = given_up(node)
    if wire:
        node.event(transfer.QuiescedByWire(token, True, P0))
    else:
        node.say(Quiesced(token, D0, True))
    assert is_empty(node) and quarantined(node) == 0


def test_a_peer_cannot_say_of_anothers_grant_that_it_is_quiet() -> None:
    node = make_decode_node()
    token = given_up(node)
    node.event(transfer.QuiescedByWire(token, True, NodeName("p1")))
    assert quarantined(node) == 6
    node.event(transfer.QuiescedByWire(token, True, P0))
    assert is_empty(node)


@pytest.mark.parametrize("wire", [False, True])
def test_an_unclean_quiesce_frees_nothing_and_fences_at_once(wire: bool) -> None:
    node = make_decode_node()
    token = given_up(node)
    if wire:
        node.event(transfer.QuiescedByWire(token, False, P0))
    else:
        node.say(Quiesced(token, D0, False))
    node.after(0.0)
    assert quarantined(node) == 6
    assert node.commands == [transfer.Fence(P0, AGENT)]
    node.event(transfer.Fenced(P0, AGENT))
    assert is_empty(node)


def test_without_any_quiesce_the_agent_is_fenced_once_when_the_wait_is_over() -> None:
    node = make_decode_node()
    given_up(node), given_up(node, SeqId("other"))
    node.after(QUIESCE_S * 0.9)
    assert node.commands == []
    assert node.role.next_deadline() == pytest.approx(node.now + QUIESCE_S * 0.1)
    for _ in range(3):
        node.after(QUIESCE_S)
    assert node.commands == [transfer.Fence(P0, AGENT)]
    assert quarantined(node) == 12
    node.event(transfer.Fenced(P0, AGENT))
    assert is_empty(node)


def test_a_quiesced_grant_fences_nobody() -> None:
    node = make_decode_node()
    node.say(Quiesced(given_up(node), D0, True))
    node.after(QUIESCE_S * 2)
    assert not node.submitted(transfer.Fence)


def test_what_lands_after_it_was_given_up_is_not_used_but_ends_the_quarantine() -> None:
    """The whole set is in, so nothing more will be written: no quiesce, and no fence, is needed."""
    node = make_decode_node()
    token = given_up(node)
    node.event(transfer.Landed(token, FirstToken(5), 480))
    assert node.frames(Landed) == [] and node.frames(Tokens) == []
    assert quarantined(node) == 0 and node.pool.num_free == node.pool.num_blocks


def test_a_landing_that_fails_after_it_was_given_up_changes_nothing() -> None:
    node = make_decode_node()
    token = given_up(node)
    node.say(generate(prompt(20), attempt=1), RequestGrant(S, 1, P0))
    node.clear()
    node.event(transfer.LandingFailed(token, "piece 3 twice"))
    assert node.sent == [] and node.engine.sequences[S].attempt == 1
    assert quarantined(node) == 6


def test_quiescing_a_landed_grant_changes_nothing() -> None:
    node = make_decode_node()
    grant = granted(node)
    landed(node, grant)
    node.say(Quiesced(grant.token, D0, False))
    node.event(transfer.QuiescedByWire(grant.token, False, P0))
    node.run()
    assert delivered(node) == expected(prompt(20), 4)


def test_a_quiesce_over_the_wire_may_come_before_the_router_is_known_to_be_lost() -> None:
    """Prefill lost the router first: the grant is over, and no fence may come of it later."""
    node = make_decode_node()
    grant = granted(node)
    node.event(transfer.QuiescedByWire(grant.token, True, P0))
    assert node.last(Released).seq == S
    assert is_empty(node)
    node.link_down()
    node.after(QUIESCE_S * 2)
    assert not node.submitted(transfer.Fence)


def test_an_unclean_quiesce_over_the_wire_of_a_grant_still_out_ends_in_a_fence() -> None:
    node = make_decode_node()
    grant = granted(node)
    node.event(transfer.QuiescedByWire(grant.token, False, P0))
    node.after(0.0)
    assert quarantined(node) == 6 and node.submitted(transfer.Fence) == [transfer.Fence(P0, AGENT)]


# ── fences ──


def test_a_fence_releases_incomplete_grants_of_its_agent_and_touches_nothing_else() -> None:
    node = make_decode_node()
    node.event(transfer.PairOpened(NodeName("p1"), Incarnation("p1-first"), endpoint(AgentId("agent-9"), b"", PLACE)))
    running, incomplete, other = SeqId("running"), SeqId("incomplete"), SeqId("other")
    landed(node, granted(node, running))
    granted(node, incomplete)
    node.say(generate(prompt(20), other), RequestGrant(other, 0, NodeName("p1")))
    node.clear()
    node.event(transfer.Fenced(P0, AGENT))
    assert [frame.seq for frame in node.frames(Released)] == [incomplete]
    assert node.frames(Cancel) == [], "its blocks are free already"
    assert set(node.engine.sequences) == {running, other}
    assert (node.role.gauges().blocks_granted, quarantined(node)) == (6, 0)


def test_a_landing_that_was_fenced_meanwhile_is_ignored() -> None:
    node = make_decode_node()
    grant = granted(node)
    node.event(transfer.Fenced(P0, AGENT), transfer.Landed(grant.token, FirstToken(5), 480))
    assert node.frames(Tokens) == [] and is_empty(node)


# ── checksums ──


def test_blocks_that_are_pushed_are_to_be_verified_if_the_file_says_so() -> None:
    node = make_decode_node(verify=True)
    grant = granted(node)
    assert grant.verify
    assert node.submitted(transfer.Expect)[-1].verify == grant.block_ids[:5], "20 tokens; the sixth block is for what is generated"
    assert not granted(make_decode_node()).verify


def test_corrupt_blocks_are_counted_quarantined_and_computed_again() -> None:
    node = make_decode_node(verify=True)
    grant = granted(node)
    node.event(transfer.LandingFailed(grant.token, "the checksums of 2 blocks differ", num_corrupt=2))
    gauges = node.role.gauges()
    assert (gauges.checksum_failures, gauges.blocks_verified, gauges.blocks_quarantined) == (2, 0, 6)
    assert node.last(Released).seq == S and node.last(Cancel).token == grant.token
    node.say(Quiesced(grant.token, D0, True))
    assert is_empty(node)


def test_verified_blocks_are_counted() -> None:
    node = make_decode_node(verify=True)
    grant = granted(node)
    node.event(transfer.Landed(grant.token, FirstToken(5), 480, num_verified=5))
    assert node.role.gauges().blocks_verified == 5
