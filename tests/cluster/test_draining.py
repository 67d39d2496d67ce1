"""Nodes that are about to stop: they get nothing new, keep what they have begun, and are let go when nobody needs them."""

import pytest

from disaggd.cluster.moves import DECODE_PATIENCE_S
from disaggd.cluster.protocol import Abort, Decided, Dismiss, Draining, Generate, Landed, Prefill, Released, RequestGrant, unpack_tokens
from disaggd.cluster.request import Phase
from disaggd.errors import Unavailable
from disaggd.ids import NodeName
from tests.support.routing import D0, D1, P0, P1, Routing, grant_for, make_grant


def is_dismissed(routing: Routing, name: NodeName) -> bool:
    """After the tick in which the router looks who may go."""
    routing.dispatcher.tick()
    return bool(routing.frames(name, Dismiss))


@pytest.mark.parametrize("name", [P0, D0])
def test_a_node_without_work_is_let_go_at_once_and_once(name: NodeName) -> None:
    routing = Routing(decodes=(D0, D1))
    routing.say(name, Draining())
    assert routing.frames(name, Dismiss) == [Dismiss()]
    routing.dispatcher.tick()
    assert routing.frames(name, Dismiss) == [Dismiss()]


# ── prefill nodes ──


def test_a_draining_prefill_node_keeps_its_jobs_until_their_kv_has_landed() -> None:
    routing = Routing()
    client = routing.prefilling()
    routing.say(P0, Draining())
    routing.first_token(client, 50)
    routing.job_ended(client)
    assert not is_dismissed(routing, P0), "the last piece may be on the wire still"
    routing.say(D0, Landed(client.seq, 0))
    assert is_dismissed(routing, P0)
    assert (routing.record(client).attempt, routing.record(client).retries) == (0, 0)


def test_a_job_whose_client_has_gone_is_waited_for_until_its_push_has_ended() -> None:
    routing = Routing()
    client = routing.prefilling(max_tokens=1)
    routing.say(P0, Draining())
    routing.dispatcher.end(client.seq, "abort")
    assert not is_dismissed(routing, P0)
    routing.job_ended(client, clean=False)
    assert is_dismissed(routing, P0)


def test_a_grant_that_was_fenced_just_when_its_client_went_keeps_nobody() -> None:
    """Decode then has nothing to cancel any more: that it released the grant is all that is heard of it."""
    routing = Routing()
    client = routing.prefilling()
    routing.dispatcher.end(client.seq, "abort")
    routing.job_ended(client, clean=False)
    for name in (P0, D0):
        routing.say(name, Draining())
        assert not is_dismissed(routing, name)
    routing.say(D0, Released(client.seq, 0, "its prefill node was fenced", is_fenced=True))
    assert is_dismissed(routing, P0) and is_dismissed(routing, D0)


def test_a_draining_prefill_node_gets_no_job_and_another_does() -> None:
    routing = Routing(prefills=(P0, P1))
    routing.say(P0, Draining())
    client = routing.queued()
    assert routing.last(D0, RequestGrant) == RequestGrant(client.seq, 0, P1)
    assert all(grant_for(frame) != P0 for frame in routing.frames(D0, Generate))


def test_a_grant_for_a_node_that_drains_meanwhile_is_asked_for_once_more_for_another() -> None:
    routing = Routing(prefills=(P0, P1))
    client = routing.queued()
    first = routing.last(D0, RequestGrant).prefill
    other = {P0: P1, P1: P0}[first]
    routing.say(first, Draining())
    routing.granted(client)
    assert not routing.frames(first, Prefill)
    assert routing.last(D0, RequestGrant) == RequestGrant(client.seq, 0, other)
    routing.granted(client)
    assert routing.last(other, Prefill).seq == client.seq
    assert routing.record(client).retries == 0
    assert is_dismissed(routing, first)


def test_a_grant_that_rode_along_for_a_node_that_drains_meanwhile_is_not_forwarded() -> None:
    routing = Routing(prefills=(P0, P1))
    client = routing.submit()
    assert grant_for(routing.last(D0, Generate)) == P0
    routing.say(P0, Draining())
    routing.need_prefill(client, make_grant(client))
    assert not routing.frames(P0, Prefill)
    assert routing.last(D0, RequestGrant) == RequestGrant(client.seq, 0, P1)


def test_when_the_last_prefill_node_drains_what_waits_for_it_is_prefilled_by_decode_at_once() -> None:
    routing = Routing(credit=100)
    begun, waiting = routing.prefilling(90), routing.queued(90)
    routing.say(P0, Draining())
    assert routing.record(begun).phase is Phase.PREFILLING
    generate = routing.is_retried(waiting)
    assert (generate.policy, generate.offer, routing.record(waiting).retries) == ("local", None, 0)
    later = routing.submit()
    assert routing.generated(later).offer is None


# ── decode nodes ──


def test_a_draining_decode_node_finishes_its_streams_and_gets_no_new_ones() -> None:
    routing = Routing(decodes=(D0, D1))
    client = routing.decoding()
    assert routing.decode_of(client) == D0
    routing.tokens(client, 0, 50)
    routing.say(D0, Draining())
    assert [routing.decode_of(routing.submit()) for _ in range(3)] == [D1] * 3
    assert not is_dismissed(routing, D0)
    routing.tokens(client, 1, 51, finish="stop")
    assert (client.tokens, client.finish) == ([50, 51], "stop")
    assert is_dismissed(routing, D0)


def test_a_prefill_under_way_still_lands_at_a_draining_decode_node() -> None:
    routing = Routing(decodes=(D0, D1))
    client = routing.prefilling()
    decode = routing.decode_of(client)
    routing.say(decode, Draining())
    routing.say(decode, Landed(client.seq, 0))
    assert (routing.decode_of(client), routing.record(client).attempt) == (decode, 0)


def test_what_a_draining_decode_node_has_not_begun_goes_to_another_and_that_is_no_retry() -> None:
    routing = Routing(credit=100)
    clients = [routing.queued(90), routing.queued(90), routing.submit()]
    phases = [routing.record(client).phase for client in clients]
    assert phases == [Phase.GRANTING, Phase.QUEUED, Phase.PLACED]
    routing.decode_up(D1)
    routing.pair_all()
    routing.say(D0, Draining())
    for client in clients:
        record = routing.record(client)
        assert (record.decode, record.attempt, record.retries) == (D1, 1, 0)
        assert Abort(client.seq, 0) in routing.frames(D0, Abort)
    assert is_dismissed(routing, D0)


def test_where_no_other_decode_node_is_new_requests_are_refused_and_old_ones_go_on() -> None:
    routing = Routing(credit=100)
    running, granting, waiting = routing.decoding(), routing.queued(90), routing.queued(90)
    routing.say(D0, Draining())
    with pytest.raises(Unavailable, match="every decode node is draining"):
        routing.submit()
    assert [routing.record(client).attempt for client in (running, granting, waiting)] == [0, 0, 0]
    routing.granted(granting)
    routing.down(P0)
    routing.say(D0, Released(granting.seq, 0, "its prefill failed"))
    assert routing.is_retried(granting).offer is None, "there is nowhere else to go"
    assert not is_dismissed(routing, D0)


def test_both_of_a_pair_may_drain_in_any_order_and_their_requests_end_well() -> None:
    for order in ((P0, D0), (D0, P0)):
        routing = Routing(credit=100)
        pushed, waiting = routing.prefilling(90), routing.queued(90)
        for name in order:
            routing.say(name, Draining())
        routing.first_token(pushed, 50)
        routing.job_ended(pushed)
        routing.say(D0, Landed(pushed.seq, 0))
        assert is_dismissed(routing, P0)
        routing.tokens(pushed, 0, 50, 51, finish="stop")
        assert routing.is_retried(waiting).policy == "local"
        routing.say(D0, Decided(waiting.seq, 1, "no_prefill_node: none", 0))
        assert not is_dismissed(routing, D0)
        routing.tokens(waiting, 0, 60, finish="stop")
        assert is_dismissed(routing, D0)
        assert [client.finish for client in (pushed, waiting)] == ["stop", "stop"]


def test_what_is_left_when_a_decode_node_stops_goes_on_elsewhere_without_a_retry() -> None:
    routing = Routing(decodes=(D0, D1))
    client = routing.decoding()
    routing.tokens(client, 0, 50)
    routing.say(D0, Draining())
    routing.down(D0)
    assert unpack_tokens(routing.is_retried(client).tokens) == [*range(40), 50]
    assert (routing.decode_of(client), routing.record(client).retries) == (D1, 0)


def test_what_is_left_when_the_last_decode_node_stops_fails_loudly_unless_one_comes_back() -> None:
    for comes_back in (True, False):
        routing = Routing()
        client = routing.decoding()
        routing.say(D0, Draining())
        routing.down(D0)
        if comes_back:
            routing.decode_up(D0, incarnation="second")
            routing.is_retried(client)
        routing.now += DECODE_PATIENCE_S + 0.1
        routing.dispatcher.tick()
        assert (client.error is None) == comes_back


def test_a_node_that_was_let_go_gets_nothing_not_even_for_want_of_others() -> None:
    routing = Routing(decodes=(D0, D1))
    routing.say(D0, Draining())
    client = routing.decoding()
    routing.clear()
    routing.down(D1)
    assert not routing.frames(D0, Generate)
    assert routing.record(client).decode is None


def test_a_request_for_one_token_needs_its_decode_node_no_more_once_it_is_prefilled_elsewhere() -> None:
    routing = Routing(decodes=(D0, D1))
    client = routing.prefilling(max_tokens=1)
    decode = routing.decode_of(client)
    routing.down(decode)
    routing.decode_up(decode, incarnation="second")
    routing.first_token(client, 50, "length")
    assert (client.tokens, client.finish) == ([50], "length")
    assert all(peer.load_tokens == 0 for peer in routing.dispatcher.decodes.values())
