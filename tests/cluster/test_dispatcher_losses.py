"""Nodes that are lost and attempts that fail: what was delivered is never sampled again, and decode is the arbiter."""

import pytest

from disaggd.cluster.moves import DECODE_PATIENCE_S
from disaggd.cluster.offer import PrefillWork
from disaggd.cluster.protocol import (
    Abort,
    Cancel,
    Decided,
    Generate,
    Granted,
    Landed,
    NoRoom,
    Prefill,
    Prefilled,
    PrefillLost,
    Quiesced,
    Released,
    RequestGrant,
    TokenRun,
    Tokens,
    unpack_tokens,
)
from disaggd.cluster.request import Phase
from disaggd.errors import RequestFailed
from tests.support.routing import D0, D1, P0, P1, Client, Routing, grant_for, make_grant


def released(routing: Routing, client: Client) -> Generate:
    """Decode gives the attempt up; returns the next one's `Generate`."""
    routing.say(routing.decode_of(client), Released(client.seq, client.attempt, "its prefill node is lost"))
    return routing.is_retried(client)


# ── no re-sampling ──


def test_a_retry_carries_the_prompt_and_everything_sent() -> None:
    routing = Routing()
    client = routing.prefilling()
    routing.first_token(client, 50)
    generate = released(routing, client)
    assert unpack_tokens(generate.tokens) == [*range(40), 50]
    assert generate.num_prompt_tokens == 40
    assert generate.sampling.seed == 7
    routing.need_prefill(client)
    routing.granted(client)
    prefill = routing.last(P0, Prefill)
    assert (prefill.attempt, unpack_tokens(prefill.tokens), prefill.num_prompt_tokens) == (1, [*range(40), 50], 40)
    routing.first_token(client, 51, start=1)
    assert client.tokens == [50, 51]


def test_frames_of_an_older_attempt_are_dropped() -> None:
    routing = Routing()
    client = routing.prefilling()
    released(routing, client)
    phase = routing.record(client).phase
    routing.clear()
    routing.say(P0, Prefilled(client.seq, 0, 0, 99, None, None, 0, 1.0, 1.0, PrefillWork(10, 50.0)))
    routing.say(D0, Tokens((TokenRun(client.seq, 0, 0, (99,), None, "stop"),)))
    routing.say(D0, Decided(client.seq, 0, "", 0), NoRoom(client.seq, 0), Landed(client.seq, 0), Released(client.seq, 0, ""))
    routing.say(D0, Granted(client.seq, 0, make_grant(client)))
    assert (client.tokens, client.finish, client.error) == ([], None, None)
    assert (routing.record(client).attempt, routing.record(client).phase) == (1, phase)
    assert routing.sent == {P0: [], D0: []}


def test_the_report_of_an_older_attempt_returns_its_credit_and_touches_nothing_else() -> None:
    routing = Routing()
    client = routing.prefilling()
    released(routing, client)
    assert routing.last(P0, Abort) == Abort(client.seq, 0)
    routing.need_prefill(client)
    routing.granted(client)
    routing.clear()
    assert routing.credit_used() == 80, "two attempts are at the prefill node"
    routing.job_ended(client, clean=False, kv_bytes=100, attempt=0)
    assert routing.credit_used() == 40
    assert routing.record(client).phase is Phase.PREFILLING
    assert not routing.frames(D0, PrefillLost)
    assert routing.record(client).kv_bytes == 100


# ── decode is the arbiter ──


@pytest.mark.parametrize("how", ["its job fails", "it is lost"])
def test_when_prefill_fails_decode_is_asked_and_nothing_is_requeued_before_it_answers(how: str) -> None:
    routing = Routing()
    client = routing.prefilling()
    routing.clear()
    if how == "it is lost":
        routing.down(P0)
    else:
        routing.job_ended(client, clean=False)
    assert routing.sent[D0] == [PrefillLost(client.seq, 0)]
    assert routing.record(client).phase is Phase.ARBITRATION
    routing.dispatcher.tick()
    assert routing.record(client).attempt == 0


def test_what_had_landed_is_kept() -> None:
    routing = Routing()
    client = routing.prefilling()
    routing.down(P0)
    routing.say(D0, Landed(client.seq, 0))
    routing.tokens(client, 0, 50, 51)
    assert (routing.record(client).attempt, client.tokens) == (0, [50, 51])
    assert not len(routing.dispatcher.grants)


def test_tokens_answer_the_arbiters_question_too() -> None:
    routing = Routing()
    client = routing.prefilling()
    routing.down(P0)
    routing.tokens(client, 0, 50)
    assert routing.record(client).phase is Phase.DECODING


def test_the_last_but_one_token_is_arbitrated_like_any_other() -> None:
    """One token is left, and yet there is a grant: what decides is the grant, not the count."""
    routing = Routing()
    client = routing.prefilling(max_tokens=2)
    routing.first_token(client, 50)
    routing.down(P0)
    assert routing.record(client).phase is Phase.ARBITRATION
    routing.say(D0, Landed(client.seq, 0))
    routing.tokens(client, 0, 50)
    routing.tokens(client, 1, 51, finish="length")
    assert (client.tokens, client.finish) == ([50, 51], "length")


def test_a_job_without_a_grant_needs_no_arbiter() -> None:
    routing = Routing(prefills=(P0, P1))
    client = routing.prefilling(max_tokens=1)
    routing.job_ended(client, clean=False)
    assert not routing.frames(D0, PrefillLost)
    routing.is_retried(client)


def test_a_credit_held_while_a_grant_is_asked_for_is_lost_with_its_node() -> None:
    routing = Routing()
    client = routing.queued()
    routing.down(P0)
    assert routing.sent[D0][-1] == PrefillLost(client.seq, 0)
    grant = make_grant(client)
    routing.say(D0, Granted(client.seq, 0, grant), Cancel(grant.token, P0, D0))
    assert routing.sent[D0][-1] == Quiesced(grant.token, D0, True), "it was never forwarded"
    assert released(routing, client).offer is None


def test_a_grant_that_rode_along_for_a_lost_node_is_not_forwarded() -> None:
    routing = Routing(prefills=(P0, P1))
    client = routing.submit()
    assert grant_for(routing.last(D0, Generate)) == P0
    routing.down(P0)
    routing.need_prefill(client, make_grant(client))
    assert routing.last(D0, RequestGrant) == RequestGrant(client.seq, 0, P1), "asking again takes the first one back"


def test_after_max_retries_the_decode_node_prefills_by_itself() -> None:
    routing = Routing()
    client = routing.prefilling()
    policies = []
    for _ in range(3):
        policies.append(released(routing, client).policy)
        if policies[-1] == "auto":
            routing.need_prefill(client)
            routing.granted(client)
    assert policies == ["auto", "auto", "local"]


# ── prefill nodes come and go ──


def test_a_lost_prefill_node_takes_its_credit_with_it_and_a_new_one_brings_its_own() -> None:
    routing = Routing()
    client = routing.prefilling()
    routing.down(P0)
    routing.prefill_up(P0, incarnation="second")
    routing.pair_all()
    assert routing.credit_used() == 0
    assert grant_for(released(routing, client)) == P0
    assert routing.credit_used() == 40


def test_without_any_prefill_node_waiting_jobs_are_prefilled_locally_at_once() -> None:
    routing = Routing(credit=100)
    clients = [routing.queued(90) for _ in range(3)]
    assert len(routing.dispatcher.queue) == 2
    routing.down(P0)
    assert not routing.dispatcher.queue
    for client in clients[1:]:
        assert routing.record(client).attempt == 1
    policies = [(frame.seq, frame.policy) for frame in routing.frames(D0, Generate) if frame.attempt == 1]
    assert policies == [(client.seq, "local") for client in clients[1:]]


def test_a_job_whose_decode_node_no_prefill_node_reaches_is_prefilled_locally_when_patience_is_over() -> None:
    routing = Routing(credit=100)
    routing.prefilling(90)
    client = routing.queued(90)
    routing.down(P0)
    assert routing.record(client).attempt == 1  # the last prefill node is gone: at once
    routing.prefill_up(P0, incarnation="second")
    waiting = routing.queued()
    routing.now += 2.9
    routing.dispatcher.tick()
    assert routing.record(waiting).attempt == 0
    routing.now += 0.2
    routing.dispatcher.tick()
    assert routing.is_retried(waiting).policy == "local"


# ── decode nodes are lost ──


@pytest.mark.parametrize("sent", [0, 1, 3])
def test_a_decode_node_lost_in_mid_stream_is_continued_elsewhere(sent: int) -> None:
    routing = Routing(decodes=(D0, D1))
    client = routing.decoding()
    for i in range(sent):
        routing.tokens(client, i, 50 + i)
    routing.down(D0)
    generate = routing.is_retried(client)
    assert routing.decode_of(client) == D1
    assert unpack_tokens(generate.tokens) == [*range(40), *range(50, 50 + sent)]
    routing.say(D1, Decided(client.seq, 1, "short: it is", 0))
    routing.tokens(client, sent, 99, finish="stop")
    assert (client.tokens[-1], client.finish, client.error) == (99, "stop", None)


def test_lost_decode_nodes_do_not_cost_a_prompt_its_prefill_nodes() -> None:
    """However many are lost: that is no sign of a prefill that fails."""
    routing = Routing(decodes=(D0, D1))
    client = routing.decoding()
    for number in range(5):
        name = routing.decode_of(client)
        routing.down(name)
        assert routing.is_retried(client).policy == "auto"
        routing.decode_up(name, incarnation=f"start {number}")
    assert (routing.record(client).retries, routing.record(client).failed_prefills) == (5, 0)


def test_a_decode_node_lost_while_its_prompt_is_pushed_stops_the_push() -> None:
    routing = Routing(decodes=(D0, D1))
    client = routing.prefilling()
    routing.first_token(client, 50)
    routing.down(D0)
    assert routing.last(P0, Abort) == Abort(client.seq, 0)
    assert not len(routing.dispatcher.grants)
    assert unpack_tokens(routing.is_retried(client).tokens) == [*range(40), 50]


def everyone(routing: Routing) -> list[Client]:
    """A client in each phase."""
    return [routing.prefilling(90), routing.queued(90), routing.queued(90), routing.decoding(), routing.submit()]


def test_requests_that_lost_the_last_decode_node_go_on_when_it_is_back() -> None:
    routing = Routing(credit=100)
    clients = everyone(routing)
    routing.down(D0)
    routing.clear()
    routing.decode_up(D0, incarnation="second")
    assert [frame.seq for frame in routing.frames(D0, Generate)] == [client.seq for client in clients]
    assert all(client.error is None for client in clients)


def test_the_last_decode_nodes_loss_fails_every_request_loudly_in_the_end(caplog: pytest.LogCaptureFixture) -> None:
    routing = Routing(credit=100)
    clients = everyone(routing)
    routing.down(D0)
    routing.now += DECODE_PATIENCE_S
    routing.dispatcher.tick()
    assert all(client.error is None for client in clients)
    routing.now += 0.1
    routing.dispatcher.tick()
    assert all(isinstance(client.error, RequestFailed) and client.error.code == "no_decode_node" for client in clients)
    assert sum("no decode node came back within 10 s" in message for message in caplog.messages) == len(clients)
    assert not routing.dispatcher.sequences and not routing.dispatcher.queue


def test_a_decode_node_that_comes_back_starts_without_load() -> None:
    routing = Routing(decodes=(D0, D1))
    client = routing.decoding()
    routing.down(D0)
    routing.decode_up(D0, incarnation="second")
    assert routing.dispatcher.decodes[D0].load_tokens == 0
    routing.dispatcher.end(client.seq, "abort")
    assert [routing.dispatcher.decodes[name].load_tokens for name in (D0, D1)] == [0, 0]


# ── credit ──


def test_credit_comes_back_exactly_once_whatever_ends_a_job_first() -> None:
    routing = Routing()
    client = routing.prefilling()
    other = routing.prefilling(20)
    routing.tokens(client, 0, 1, finish="stop")
    assert routing.credit_used() == 60
    routing.job_ended(client)
    routing.job_ended(client)
    assert routing.credit_used() == 20
    routing.job_ended(other)
    assert routing.credit_used() == 0


def test_a_local_decision_gives_the_credit_to_the_job_that_waits_for_it() -> None:
    routing = Routing(credit=100)
    local = routing.submit(90)
    assert grant_for(routing.last(D0, Generate)) == P0
    waiting = routing.queued(90)
    assert not routing.frames(D0, RequestGrant)
    routing.say(D0, Decided(local.seq, 0, "short: it is", 0))
    assert routing.last(D0, RequestGrant) == RequestGrant(waiting.seq, 0, P0)


def test_a_fence_is_no_retry_of_the_request() -> None:
    """Some other grant of the pair did not quiesce: that says nothing about this prompt."""
    routing = Routing()
    client = routing.prefilling()
    for _ in range(5):
        routing.say(D0, Released(client.seq, client.attempt, "its prefill node was fenced", is_fenced=True))
        assert routing.is_retried(client).policy == "auto"
        routing.job_ended(client, clean=False, attempt=client.attempt - 1)
        routing.need_prefill(client)
        routing.granted(client)
    assert routing.record(client).retries == 0
    released(routing, client)
    assert routing.record(client).retries == 1
