"""A prefill node that is sent the beginning of a prompt: it computes the rest, and whatever fails it computes all of it."""

from collections.abc import Callable

import pytest

from disaggd.cluster.hello import OpenPair, PairAgent, PairReady
from disaggd.cluster.protocol import Abort, Cancel, JobEnded, Prefilled, PrefixEnded, PrefixGrant, PrefixSource, Progress, Quiesced
from disaggd.ids import AgentId, Incarnation, NodeName, SeqId
from disaggd.roles.compute import LinkId
from disaggd.transfer import messages as transfer
from disaggd.transfer.layout import PoolPlace
from tests.support.endpoints import endpoint
from tests.support.prefill_scripts import D0, INTAKE, P0, Node, S, grant_for, handles_done, is_idle, prefill, push_ended, taking_node
from tests.support.role_nodes import BYTES_PER_BLOCK, LEASE_S, LINK, QUIESCE_S, next_token, prompt

FROM_D0 = PrefixSource(D0, 12)
LENGTH = 22


def asked(node: Node, num_tokens: int = 12, length: int = LENGTH, seq: SeqId = S) -> PrefixGrant:
    """A job that waits for its first `num_tokens` tokens."""
    node.say(prefill(prompt(length), None, seq, prefix=PrefixSource(D0, num_tokens)))
    return node.last(PrefixGrant)


def landed(node: Node, frame: PrefixGrant) -> None:
    node.event(transfer.Landed(frame.grant.token, None, len(frame.grant.block_ids) * BYTES_PER_BLOCK))


def computed_by(node: Node, length: int = LENGTH) -> int:
    """Runs the job to its first token; returns how many tokens it did not have to compute."""
    node.run()
    assert node.last(Prefilled).token == next_token(prompt(length))
    return node.last(Prefilled).num_cached


def test_a_prefix_is_granted_awaited_and_found() -> None:
    node = taking_node()
    frame = asked(node)
    assert (frame.seq, frame.attempt) == (S, 0)
    assert (frame.grant.target, frame.grant.writer, frame.grant.agent_id) == (P0, D0, INTAKE)
    assert (frame.grant.first_token_index, len(frame.grant.block_ids), frame.grant.lease_s) == (0, 3, LEASE_S)
    assert node.submitted(transfer.Expect) == [transfer.Expect(frame.grant.token, D0, INTAKE, 3, brings_token=False)]
    assert node.role.gauges().blocks_granted == 3
    node.step()
    assert not node.engine.has_work, "it waits"
    node.now += 0.25
    landed(node, frame)
    assert node.frames(PrefixEnded) == [PrefixEnded(S, 0, "landed", "", 12, 3 * BYTES_PER_BLOCK, 250.0)]
    assert computed_by(node) == 12
    assert is_idle(node)


def test_nothing_is_found_before_all_of_it_has_landed() -> None:
    node = taking_node()
    asked(node)
    node.say(prefill(prompt(LENGTH), None, SeqId("other")))
    assert computed_by(node) == 0


def test_only_what_is_lacked_is_granted() -> None:
    node = taking_node()
    node.say(prefill(prompt(9), None, SeqId("before")))
    node.run()
    frame = asked(node)
    assert (frame.grant.first_token_index, len(frame.grant.block_ids)) == (8, 1)
    landed(node, frame)
    assert node.last(PrefixEnded).num_tokens == 4
    assert computed_by(node) == 12


def test_the_last_token_is_always_computed() -> None:
    node = taking_node()
    frame = asked(node, num_tokens=12, length=12)
    assert len(frame.grant.block_ids) == 2
    landed(node, frame)
    assert computed_by(node, 12) == 8


def test_a_prefix_is_held_until_its_sequence_begins() -> None:
    """Whoever takes blocks before its turn would else evict it."""
    node = taking_node()
    landed(node, asked(node))
    everything = node.pool.allocate(node.pool.num_available)
    assert everything is not None
    node.pool.release(everything)
    assert computed_by(node) == 12
    assert is_idle(node)


def test_what_is_pushed_on_is_what_was_pushed_here() -> None:
    """The job's own grant leaves out what decode has: the same tokens."""
    node = taking_node()
    node.say(prefill(prompt(LENGTH), grant_for(LENGTH, first_token_index=12), prefix=FROM_D0))
    landed(node, node.last(PrefixGrant))
    node.clear()
    node.run()
    assert [push.target for push in node.submitted(transfer.PushBlocks)] == [(100, 101, 102)] * 2
    handles_done(node)
    push_ended(node)
    assert node.last(JobEnded).clean
    assert is_idle(node)


# ── without ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_cached_by_now_is_not_asked_for() -> None:
    node = taking_node()
    node.say(prefill(prompt(LENGTH), None, SeqId("before")))
    node.run()
    node.say(prefill(prompt(LENGTH), None, prefix=FROM_D0))
    assert not node.frames(PrefixGrant)
    assert node.last(PrefixEnded).outcome == "cached"
    assert computed_by(node) == 20


def test_a_node_without_room_computes_by_itself() -> None:
    """Blocks for this job alone would do; not for the one that is before it."""
    node = taking_node(num_blocks=10)
    node.say(prefill(prompt(20, seed=1), None, SeqId("first")), prefill(prompt(LENGTH), None, prefix=FROM_D0))
    assert not node.frames(PrefixGrant)
    assert node.last(PrefixEnded).outcome == "no_room"
    assert computed_by(node) == 0
    assert is_idle(node)


def test_a_node_that_decode_does_not_reach_computes_by_itself() -> None:
    node = taking_node()
    node.event(transfer.Fenced(D0, INTAKE))
    node.say(prefill(prompt(LENGTH), None, prefix=FROM_D0))
    assert node.last(PrefixEnded).outcome == "unreachable"
    assert computed_by(node) == 0


def test_a_job_that_is_refused_says_that_it_awaits_nothing() -> None:
    node = taking_node()
    node.say(prefill(prompt(1000), None, prefix=FROM_D0))
    assert [type(frame) for _, frame in node.sent] == [PrefixEnded, JobEnded]
    assert node.last(PrefixEnded).outcome == "stopped"


FAILURES: dict[str, Callable[[Node, PrefixGrant], None]] = {
    "lease": lambda node, frame: node.after(LEASE_S),
    "contradiction": lambda node, frame: node.event(transfer.LandingFailed(frame.grant.token, "twice")),
    "fence": lambda node, frame: node.event(transfer.Fenced(D0, INTAKE)),
    "declined": lambda node, frame: node.say(Quiesced(frame.grant.token, P0, True)),
    "unclean": lambda node, frame: node.say(Quiesced(frame.grant.token, P0, False)),
    "wire": lambda node, frame: node.event(transfer.QuiescedByWire(frame.grant.token, True, D0)),
    "restart": lambda node, frame: node.say(OpenPair(D0, Incarnation("d0-second"), 1)),
}
FREED = {"fence", "declined", "wire"}


@pytest.mark.parametrize("failure", FAILURES)
def test_whatever_fails_the_job_goes_on_at_once_and_computes_all(failure: str) -> None:
    node = taking_node()
    frame = asked(node)
    node.clear()
    FAILURES[failure](node, frame)
    ended = node.last(PrefixEnded)
    assert (ended.outcome, ended.num_tokens, ended.kv_bytes) == ("failed", 0, 0)
    assert computed_by(node) == 0
    assert node.role.gauges().blocks_quarantined == (0 if failure in FREED else 3)
    assert [type(frame) for _, frame in node.sent][:2] == [Cancel, PrefixEnded], "the router forgets the grant with the latter"


def quarantined(node: Node) -> PrefixGrant:
    frame = asked(node)
    node.after(LEASE_S)
    node.run()
    node.clear()
    assert node.role.gauges().blocks_quarantined == 3
    return frame


def test_quarantined_blocks_come_back_by_a_clean_quiesce() -> None:
    node = taking_node()
    frame = quarantined(node)
    node.say(Quiesced(frame.grant.token, P0, True))
    assert node.role.gauges().blocks_quarantined == 0
    assert node.submitted(transfer.Forget) == [transfer.Forget(frame.grant.token)]
    assert is_idle(node)


def test_what_lands_after_all_is_freed_and_not_found() -> None:
    node = taking_node()
    frame = quarantined(node)
    cached = set(node.pool.hashes())
    landed(node, frame)
    assert set(node.pool.hashes()) == cached
    assert is_idle(node)


@pytest.mark.parametrize("is_told", [True, False])
def test_a_node_that_does_not_quiesce_cleanly_is_fenced(is_told: bool) -> None:
    node = taking_node()
    frame = quarantined(node)
    if is_told:
        node.say(Quiesced(frame.grant.token, P0, False))
        node.after(0)
    else:
        node.after(QUIESCE_S)
    assert node.submitted(transfer.Fence) == [transfer.Fence(D0, INTAKE)]
    assert node.role.gauges().blocks_quarantined == 3
    node.event(transfer.Fenced(D0, INTAKE))
    assert is_idle(node)


def test_signs_of_life_renew_the_lease() -> None:
    node = taking_node()
    frame = asked(node)
    node.after(LEASE_S - 1)
    node.say(Progress((frame.grant.token,)))
    node.after(LEASE_S - 1)
    assert not node.frames(PrefixEnded)
    assert node.role.next_deadline() == node.now + 1


@pytest.mark.parametrize("has_landed", [False, True])
def test_an_aborted_job_leaves_nothing_behind(has_landed: bool) -> None:
    node = taking_node()
    frame = asked(node)
    if has_landed:
        landed(node, frame)
    node.clear()
    node.say(Abort(S, 0))
    assert not node.engine.sequences
    if has_landed:
        assert [type(frame) for _, frame in node.sent] == [JobEnded]
        assert is_idle(node)
        return
    assert [type(frame) for _, frame in node.sent] == [Cancel, PrefixEnded, JobEnded]
    assert node.last(Cancel) == Cancel(frame.grant.token, D0, P0)
    assert node.last(PrefixEnded).outcome == "stopped"
    node.say(Quiesced(frame.grant.token, P0, True))
    assert is_idle(node)


def test_a_lost_router_quarantines_and_decode_ends_it_by_wire() -> None:
    node = taking_node()
    frame = asked(node)
    node.link_down()
    assert node.role.gauges().blocks_quarantined == 3
    node.event(transfer.QuiescedByWire(frame.grant.token, True, D0))
    assert is_idle(node)


def test_a_peer_cannot_say_of_anothers_prefix_that_it_is_quiet() -> None:
    node = taking_node()
    frame = asked(node)
    node.link_down()
    node.event(transfer.QuiescedByWire(frame.grant.token, True, NodeName("d1")))
    assert node.role.gauges().blocks_quarantined == 3
    node.event(transfer.QuiescedByWire(frame.grant.token, True, D0))
    assert is_idle(node)


def test_another_attempt_asks_anew() -> None:
    node = taking_node()
    first = asked(node)
    node.say(prefill(prompt(LENGTH), None, attempt=1, prefix=FROM_D0))
    second = node.last(PrefixGrant)
    assert second.attempt == 1
    assert not set(first.grant.block_ids) & set(second.grant.block_ids)
    landed(node, second)
    assert computed_by(node) == 12


def test_held_prefixes_never_keep_everybody_waiting() -> None:
    """The one that is first lacks what the others hold: these let go, for what they hold can be computed."""
    node = taking_node(num_blocks=12, max_step_tokens=64)
    for name in "ab":
        landed(node, asked(node, length=13, seq=SeqId(name)))
    node.say(prefill(prompt(40, seed=5), None, SeqId("big")))
    big = node.engine.sequences[SeqId("big")]
    node.engine._scheduler.waiting.sort(key=lambda sequence: sequence is not big)
    node.step()
    assert node.engine.is_stalled and node.role.next_deadline() == node.now
    node.after(0)
    node.run()
    assert len(node.frames(Prefilled)) == 3
    assert is_idle(node)


# ── pairs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_pairs_are_opened_and_probed_for_every_router() -> None:
    node = taking_node()
    node.link_up(LinkId(2))
    node.clear()
    node.say(OpenPair(D0, Incarnation("d0-first"), 1))
    assert node.submitted(transfer.OpenPair) == [transfer.OpenPair(D0, Incarnation("d0-first"), 1)]
    place, agent = PoolPlace(0, 64), AgentId("new")
    node.event(transfer.PairOpened(D0, Incarnation("d0-first"), endpoint(agent, b"m", place)), transfer.PairProbed(D0, agent))
    agent_frame = PairAgent(D0, Incarnation("d0-first"), endpoint(agent, b"m", place))
    assert node.sent == [(link, frame) for frame in (agent_frame, PairReady(D0, agent)) for link in (LINK, LinkId(2))]


def test_a_corrupt_prefix_is_counted_and_never_found() -> None:
    node = taking_node(verify=True)
    frame = asked(node)
    assert frame.grant.verify and node.submitted(transfer.Expect)[-1].verify == frame.grant.block_ids
    node.event(transfer.LandingFailed(frame.grant.token, "the checksums of 1 block differ", num_corrupt=1))
    assert computed_by(node) == 0
    assert node.last(PrefixEnded).outcome == "failed"
    assert (node.role.gauges().checksum_failures, node.role.gauges().blocks_quarantined) == (1, 3)
    node.say(Quiesced(frame.grant.token, P0, True))
    assert is_idle(node)


def test_a_verified_prefix_is_counted() -> None:
    node = taking_node(verify=True)
    frame = asked(node)
    node.event(transfer.Landed(frame.grant.token, None, 3 * BYTES_PER_BLOCK, num_verified=3))
    assert node.role.gauges().blocks_verified == 3
    assert computed_by(node) == 12
