"""A push over scripted orders of posts, ends, cancels and leases."""

import pytest

from disaggd.ids import AgentId, GrantToken, HandleId, NodeName
from disaggd.transfer.messages import Leg, Sent
from disaggd.transfer.push import MOVES, Push, PushState

LEG, OTHER = Leg(1, 0, range(2, 3), "direct"), Leg(1, 1, range(3, 4), "repacked")


@pytest.fixture
def push() -> Push:
    return Push(token=GrantToken(bytes(16)), peer=NodeName("d0"), agent_id=AgentId("a"), lease_s=5.0, lease_until=5.0)


def test_pieces_are_numbered_in_order_and_the_first_token_closes_the_count(push: Push) -> None:
    push.posted(LEG, 0.0)
    push.posted(LEG, 0.1)
    push.finish(set())
    assert not push.may_post


def test_done_only_when_finished_and_every_handle_has_ended(push: Push) -> None:
    push.posted(LEG, 1.0)
    push.posted(LEG, 2.0)
    push.ended(LEG, 10, 3.0)
    push.finish(set())
    assert not push.settle()
    push.ended(LEG, 20, 4.0)
    assert push.settle()
    assert not push.settle(), "a push ends once"
    assert (push.state, push.clean, push.kv_bytes, push.first_post_at, push.last_done_at) == (PushState.DONE, True, 30, 1.0, 4.0)


def test_active_push_with_nothing_in_flight_is_not_over(push: Push) -> None:
    push.posted(LEG, 0.0)
    push.ended(LEG, 10, 0.1)
    assert not push.settle()


def test_cancelled_before_anything_was_posted_is_clean(push: Push) -> None:
    push.drain()
    assert push.settle()
    assert (push.clean, push.finished, push.first_post_at) == (True, False, None)


def test_cancelled_push_waits_for_its_handles(push: Push) -> None:
    push.posted(LEG, 0.0)
    push.drain()
    assert not push.may_post
    assert not push.settle()
    push.ended(LEG, 10, 1.0)
    assert push.settle()
    assert (push.clean, push.finished, push.kv_bytes) == (True, False, 10)


def test_one_failed_handle_makes_it_unclean_and_brings_no_bytes(push: Push) -> None:
    push.posted(LEG, 0.0)
    push.posted(LEG, 0.0)
    push.ended(LEG, None, 1.0)
    push.ended(LEG, 10, 2.0)
    push.drain()
    assert push.settle()
    assert (push.clean, push.kv_bytes) == (False, 10)


def test_nothing_is_posted_after_the_lease(push: Push) -> None:
    push.expire(4.9)
    assert push.may_post
    push.expire(5.0)
    assert push.state is PushState.DRAINING


def test_renewed_lease_starts_anew_but_an_expired_one_does_not_come_back(push: Push) -> None:
    push.renew(4.0)
    assert push.lease_until == 9.0
    push.renew(9.0)
    assert push.lease_until == 9.0
    push.expire(9.0)
    assert not push.may_post


def test_finished_push_needs_no_lease(push: Push) -> None:
    push.posted(LEG, 0.0)
    push.finish(set())
    push.expire(1e6)
    assert push.state is PushState.ACTIVE
    push.ended(LEG, 10, 1e6)
    assert push.settle()
    assert push.finished


def test_a_finished_push_is_not_over_before_what_its_last_piece_is_behind(push: Push) -> None:
    push.finish({HandleId(3), HandleId(4)})
    assert not push.settle()
    push.behind.discard(HandleId(3))
    assert not push.settle()
    push.behind.discard(HandleId(4))
    assert push.settle() and push.finished


def test_a_last_piece_that_is_behind_others_bytes_goes_down_with_the_pair(push: Push) -> None:
    push.finish({HandleId(3)})
    push.lose_pair()
    assert push.settle()
    assert (push.clean, push.finished) == (True, False)


def test_a_last_piece_that_has_gone_out_survives_the_pair(push: Push) -> None:
    push.posted(LEG, 0.0)
    push.finish(set())
    push.lose_pair()
    push.ended(LEG, 10, 1.0)
    assert push.settle()
    assert (push.clean, push.finished) == (True, True)


def test_table_of_moves_is_the_drawn_one() -> None:
    moves = {(before, after) for before, afters in MOVES.items() for after in afters}
    active, draining, done = PushState.ACTIVE, PushState.DRAINING, PushState.DONE
    assert moves == {(active, done), (active, draining), (draining, done)}


def test_what_went_over_each_leg_is_told_apart(push: Push) -> None:
    push.posted(OTHER, 1.0)
    push.posted(LEG, 2.0)
    push.posted(OTHER, 3.0)
    push.ended(OTHER, 10, 4.0)
    assert push.sent == (Sent(OTHER, 10, 1.0, 4.0),), "nothing has come over the other"
    push.ended(OTHER, 20, 5.0)
    push.ended(LEG, 30, 6.0)
    assert push.sent == (Sent(LEG, 30, 2.0, 6.0), Sent(OTHER, 30, 1.0, 5.0))
    assert (push.kv_bytes, push.first_post_at, push.last_done_at) == (60, 1.0, 6.0)
