"""Cancels, tombstones and lost routers: prefill says what became of a grant, once nothing of it is in flight."""

import pytest

from disaggd.cluster.protocol import Abort, Cancel, JobEnded, Prefilled, Quiesced
from disaggd.ids import GrantToken
from disaggd.roles.compute import LinkId
from disaggd.transfer import messages as transfer
from tests.support.prefill_scripts import D0, P0, S, T, grant_for, handles_done, is_idle, prefill, push_ended, ready_node
from tests.support.role_nodes import prompt

CANCEL = Cancel(T, P0, D0)


@pytest.mark.parametrize("clean", [True, False])
def test_a_cancel_is_answered_when_the_last_handle_has_ended(clean: bool) -> None:
    node = ready_node()
    node.say(prefill(prompt(40), grant_for(40)))
    node.step()
    node.say(CANCEL)
    assert node.commands[-1] == transfer.CancelPush(T)
    assert not node.frames(Quiesced) and not node.engine.sequences
    handles_done(node, kv_bytes=10 if clean else 0)
    assert not node.frames(Quiesced)
    push_ended(node, clean=clean, finished=False)
    assert node.frames(Quiesced) == [Quiesced(T, D0, clean)]
    assert (node.last(JobEnded).clean, node.last(JobEnded).reason) == (False, "cancelled by decode")
    assert is_idle(node)


def test_a_cancel_after_the_first_token_stops_what_is_left_of_the_push() -> None:
    node = ready_node()
    node.say(prefill(prompt(10), grant_for(10)))
    node.run()
    node.say(CANCEL)
    assert node.commands[-1] == transfer.CancelPush(T)
    handles_done(node)
    push_ended(node)
    assert node.last(Quiesced) == Quiesced(T, D0, True)


def test_a_cancel_of_an_unknown_grant_is_clean_and_refuses_the_job_that_comes_later() -> None:
    node = ready_node()
    node.say(CANCEL)
    assert node.sent == [(1, Quiesced(T, D0, True))]
    node.say(prefill(prompt(10), grant_for(10)))
    assert (node.last(JobEnded).clean, node.last(JobEnded).reason) == (False, "the grant was revoked before its job came")
    node.run()
    assert not node.frames(Prefilled) and node.commands == [] and is_idle(node)


@pytest.mark.parametrize("clean", [True, False])
def test_a_cancel_of_a_push_that_has_ended_is_answered_with_what_happened(clean: bool) -> None:
    node = ready_node()
    node.say(prefill(prompt(10), grant_for(10)))
    node.run()
    handles_done(node)
    push_ended(node, clean=clean)
    node.clear()
    node.say(CANCEL, CANCEL)
    assert node.sent == [(1, Quiesced(T, D0, clean))] * 2


def test_every_router_that_cancels_gets_its_answer() -> None:
    node = ready_node()
    node.link_up(LinkId(2))
    node.say(prefill(prompt(40), grant_for(40)), CANCEL)
    node.say(CANCEL, link=LinkId(2))
    push_ended(node, finished=False)
    assert [(link, frame) for link, frame in node.sent if isinstance(frame, Quiesced)] == [(link, Quiesced(T, D0, True)) for link in (1, 2)]


def test_an_abort_and_a_cancel_of_one_job_end_it_once() -> None:
    node = ready_node()
    node.say(prefill(prompt(40), grant_for(40)), Abort(S, 0), CANCEL, Abort(S, 0))
    push_ended(node, finished=False)
    assert len(node.frames(JobEnded)) == len(node.frames(Quiesced)) == 1
    assert node.last(JobEnded).reason == "aborted", "what came first"


def test_a_lost_router_stops_its_pushes_and_decode_hears_of_it_over_the_wire() -> None:
    node = ready_node()
    node.say(prefill(prompt(40), grant_for(40)))
    node.step()
    node.link_down()
    assert node.commands[-1] == transfer.CancelPush(T) and not node.engine.sequences
    assert not node.submitted(transfer.QuiesceByWire), "handles are in flight"
    handles_done(node)
    push_ended(node, finished=False)
    assert node.commands[-1] == transfer.QuiesceByWire(T, D0, True)
    assert is_idle(node)


def test_a_quiesce_that_may_have_been_lost_with_its_router_is_said_again_over_the_wire() -> None:
    node = ready_node()
    node.say(prefill(prompt(40), grant_for(40)), CANCEL)
    push_ended(node, clean=False, finished=False)
    node.clear()
    node.link_down()
    assert node.commands == [transfer.QuiesceByWire(T, D0, False)]


def test_a_push_that_stops_half_way_says_so_over_the_wire() -> None:
    """Decode may have lost the router that would carry its `Cancel`; without this a healthy pair would be fenced."""
    node = ready_node()
    node.say(prefill([1] * 8, grant_for(8)))
    node.say(Abort(S, 0))
    push_ended(node, finished=False, kv_bytes=0)
    assert node.submitted(transfer.QuiesceByWire) == [transfer.QuiesceByWire(T, D0, True)]


def test_a_lost_router_leaves_the_jobs_of_another_alone() -> None:
    node = ready_node()
    node.link_up(LinkId(2))
    node.say(prefill(prompt(40), grant_for(40)), link=LinkId(2))
    node.say(prefill(prompt(10), None, "mine", max_tokens=1))
    node.link_down(LinkId(1))
    assert set(node.engine.sequences) == {S}
    node.run()
    assert [link for link, frame in node.sent if isinstance(frame, Prefilled)] == [2]


def test_old_tombstones_are_forgotten_and_new_ones_are_not() -> None:
    node = ready_node()
    for i in range(4097):
        node.say(Cancel(GrantToken(b"%d" % i), P0, D0))
    node.say(prefill(prompt(10), grant_for(10, GrantToken(b"0"))))
    assert node.submitted(transfer.BeginPush), "only so many are kept"
    node.say(prefill(prompt(10), grant_for(10, GrantToken(b"4096")), "later"))
    assert not node.last(JobEnded).clean
