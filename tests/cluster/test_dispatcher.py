"""The dispatcher, request by request: placement, grants, tokens, endings. Losses and the queue have files of their own."""

import msgspec
import pytest

from disaggd.cluster.offer import PrefillWork
from disaggd.cluster.protocol import (
    Abort,
    Cancel,
    Decided,
    Gauges,
    Generate,
    Granted,
    JobEnded,
    Landed,
    NeedPrefill,
    Prefill,
    Prefilled,
    Progress,
    Quiesced,
    Refused,
    Released,
    RequestGrant,
    TokenRun,
    Tokens,
    unpack_tokens,
)
from disaggd.cluster.request import Phase
from disaggd.errors import InvalidRequest, RequestFailed, Unavailable
from disaggd.sampling import TokenLogprob
from tests.support.routing import D0, D1, P0, P1, Client, Routing, grant_for, make_grant

# ── placement ──


def test_without_a_decode_node_a_request_is_refused_and_leaves_nothing() -> None:
    routing = Routing(decodes=())
    with pytest.raises(Unavailable):
        routing.submit()
    assert not routing.dispatcher.sequences


def test_a_request_goes_to_the_least_loaded_decode_node() -> None:
    routing = Routing(decodes=(D0, D1))
    clients = [routing.submit(num_tokens) for num_tokens in (100, 30, 30, 30, 30)]
    assert [routing.decode_of(client) for client in clients] == [D0, D1, D1, D1, D1]
    assert routing.decode_of(routing.submit(10)) == D0


def test_a_decode_nodes_load_is_gone_when_its_sequences_are() -> None:
    routing = Routing()
    first, second = routing.submit(100), routing.submit(30)
    routing.dispatcher.end(first.seq, "abort")
    assert routing.dispatcher.decodes[D0].load_tokens == 30
    routing.say(D0, Decided(second.seq, 0, "short: it is", 0))
    routing.tokens(second, 0, 1, finish="stop")
    assert routing.dispatcher.decodes[D0].load_tokens == 0


def test_generate_says_what_the_decision_needs_to_know() -> None:
    routing = Routing(prefills=(P0, P1), credit=100)
    routing.queued(90), routing.queued(90)  # the two nodes' credit
    for depth in range(2):
        client = routing.queued(90)
        generate = routing.last(D0, Generate)
        assert generate.seq == client.seq
        assert generate.offer is not None
        assert (generate.offer.prefill_nodes, generate.offer.queue_depth, generate.offer.may_grant) == (2, depth, False)


def test_the_router_passes_the_sampling_on_as_it_came_and_draws_nothing() -> None:
    routing = Routing()
    client = routing.submit(seed=123456789)
    assert routing.last(D0, Generate).sampling.seed == 123456789
    routing.need_prefill(client)
    routing.granted(client)
    assert routing.last(P0, Prefill).sampling == routing.last(D0, Generate).sampling


def test_a_request_may_override_the_policy() -> None:
    routing = Routing()
    routing.submit(override="remote")
    assert routing.last(D0, Generate).policy == "remote"


# ── grants ──


def test_a_first_request_may_bring_its_grant_with_need_prefill_and_is_forwarded_at_once() -> None:
    routing = Routing()
    client = routing.submit()
    assert grant_for(routing.last(D0, Generate)) == P0
    grant = make_grant(client)
    routing.need_prefill(client, grant)
    prefill = routing.last(P0, Prefill)
    assert (prefill.grant, unpack_tokens(prefill.tokens), prefill.num_prompt_tokens) == (grant, list(range(40)), 40)
    assert not routing.frames(D0, RequestGrant)


def test_no_grant_rides_when_jobs_wait_already() -> None:
    routing = Routing(credit=100)
    routing.queued(90)
    routing.queued(90)
    routing.dispatcher.prefills[P0].credit_tokens = 1000
    routing.submit()
    assert grant_for(routing.last(D0, Generate)) is None


def test_no_grant_rides_without_a_free_credit() -> None:
    routing = Routing(credit=100)
    routing.queued(90)
    assert not routing.dispatcher.queue
    routing.submit(20)
    assert grant_for(routing.last(D0, Generate)) is None


def test_a_grant_is_asked_for_only_once_a_credit_is_held() -> None:
    routing = Routing(credit=100)
    first = routing.prefilling(90)
    second = routing.queued(90)
    assert [frame.seq for frame in routing.frames(D0, RequestGrant)] == [first.seq]
    routing.job_ended(first)
    assert routing.last(D0, RequestGrant) == RequestGrant(second.seq, 0, P0)
    assert routing.credit_used() == 90


def test_a_job_goes_to_its_prefill_node_only_with_its_grant() -> None:
    routing = Routing()
    client = routing.queued()
    assert not routing.frames(P0, Prefill)
    grant = routing.granted(client)
    assert routing.last(P0, Prefill).grant == grant


def test_what_decode_had_cached_is_what_its_grant_leaves_out() -> None:
    """Not what it had at its decision: while the job waited, blocks were evicted, or came."""
    routing = Routing()
    client = routing.submit()
    routing.say(D0, NeedPrefill(client.seq, 0, "long: enough", 16, None))
    assert routing.record(client).cached_at_decode == 16
    routing.say(D0, Granted(client.seq, 0, msgspec.structs.replace(make_grant(client), first_token_index=32)))
    assert routing.record(client).cached_at_decode == 32


def test_one_output_token_needs_no_grant() -> None:
    routing = Routing()
    client = routing.submit(max_tokens=1)
    assert grant_for(routing.last(D0, Generate)) is None
    routing.need_prefill(client)
    assert routing.last(P0, Prefill).grant is None
    assert not routing.frames(D0, RequestGrant)
    routing.first_token(client, 5, "length")
    assert (client.tokens, client.finish) == ([5], "length")


# ── tokens: who brings one first wins ──


def test_a_remote_request_from_prompt_to_end() -> None:
    routing = Routing()
    client = routing.prefilling()
    routing.first_token(client, 50)
    assert client.tokens == [50], "before anything has landed"
    routing.job_ended(client, kv_bytes=1024)
    routing.say(D0, Landed(client.seq, 0))
    routing.tokens(client, 0, 50)
    routing.tokens(client, 1, 51)
    routing.tokens(client, 2, 52, finish="stop")
    assert (client.tokens, client.finish, client.error) == ([50, 51, 52], "stop", None)
    assert routing.updates == [(client.seq, 1024)]
    assert not routing.dispatcher.sequences and not len(routing.dispatcher.grants) and routing.credit_used() == 0


def test_decode_may_bring_the_first_token_before_prefill_does() -> None:
    routing = Routing()
    client = routing.prefilling()
    routing.tokens(client, 0, 50)
    routing.tokens(client, 1, 51)
    assert routing.record(client).phase is Phase.DECODING
    routing.first_token(client, 50)
    assert client.tokens == [50, 51]


def test_indexes_that_were_sent_already_are_cut_off_a_run_with_their_logprobs() -> None:
    routing = Routing()
    client = routing.prefilling()
    routing.first_token(client, 50)
    logprobs = tuple(TokenLogprob(-float(i)) for i in range(3))
    routing.say(D0, Tokens((TokenRun(client.seq, 0, 0, (50, 51, 52), logprobs, None),)))
    assert client.tokens == [50, 51, 52]
    assert client.logprobs == [TokenLogprob(-1.0), TokenLogprob(-2.0)]


def test_a_finish_without_new_tokens_still_ends_the_request() -> None:
    """The decode node's context may be shorter: it ends with the token that prefill has reported."""
    routing = Routing()
    client = routing.prefilling()
    routing.first_token(client, 50)
    routing.tokens(client, 0, 50, finish="length")
    assert (client.tokens, client.finish) == ([50], "length")


def test_tokens_after_a_gap_are_not_passed_on() -> None:
    routing = Routing()
    client = routing.decoding()
    routing.tokens(client, 0, 1)
    routing.tokens(client, 2, 3)
    assert client.tokens == [1]
    assert unpack_tokens(routing.is_retried(client).tokens) == [*range(40), 1]


def test_one_frame_brings_the_tokens_of_many_sequences() -> None:
    routing = Routing()
    first, second = routing.decoding(), routing.decoding()
    runs = (TokenRun(first.seq, 0, 0, (1,), None, None), TokenRun(second.seq, 0, 0, (2,), None, "stop"))
    routing.say(D0, Tokens(runs))
    assert (first.tokens, first.finish, second.tokens, second.finish) == ([1], None, [2], "stop")


def test_frames_of_an_unknown_sequence_are_counted_and_dropped() -> None:
    routing = Routing()
    routing.say(D0, Decided("gone", 0, "", 0), Landed("gone", 0), Tokens((TokenRun("gone", 0, 0, (1,), None, None),)))
    routing.say(P0, Prefilled("gone", 0, 0, 1, None, None, 0, 0.0, 0.0, PrefillWork(10, 50.0)))
    assert routing.dispatcher.dropped_frames == {"Decided": 1, "Landed": 1, "TokenRun": 1, "Prefilled": 1}


# ── endings ──


def test_a_first_token_that_ends_the_sequence_aborts_it_at_decode() -> None:
    routing = Routing()
    client = routing.prefilling()
    routing.first_token(client, 7, "stop")
    assert (client.tokens, client.finish) == ([7], "stop")
    assert routing.last(D0, Abort) == Abort(client.seq, 0)


def test_a_cancelled_grant_reaches_its_prefill_node_and_the_answer_its_decode_node() -> None:
    routing = Routing()
    client = routing.prefilling()
    token = make_grant(client).token
    routing.first_token(client, 7, "stop")
    routing.say(D0, Cancel(token, P0, D0))
    assert routing.sent[P0][-1] == Cancel(token, P0, D0)
    routing.say(P0, Quiesced(token, D0, False))
    assert routing.sent[D0][-1] == Quiesced(token, D0, False)
    assert not len(routing.dispatcher.grants)


def test_renewals_of_a_prefill_node_reach_the_decode_node_that_granted() -> None:
    routing = Routing()
    token = make_grant(routing.prefilling()).token
    routing.say(P0, Progress((token,)))
    assert routing.sent[D0][-1] == Progress((token,))


def in_phase(routing: Routing, phase: Phase) -> Client:
    match phase:
        case Phase.PLACED:
            return routing.submit()
        case Phase.QUEUED:
            routing.dispatcher.prefills[P0].credit_tokens = 0
            return routing.queued()
        case Phase.GRANTING:
            return routing.queued()
        case Phase.PREFILLING:
            return routing.prefilling()
        case Phase.DECODING:
            client = routing.prefilling()
            routing.say(D0, Landed(client.seq, 0))
            return client
        case _:
            client = routing.prefilling()
            routing.job_ended(client, clean=False)
            return client


PHASES = [phase for phase in Phase if phase is not Phase.DONE]


@pytest.mark.parametrize("phase", PHASES)
def test_a_client_that_leaves_frees_its_credit_and_aborts_at_every_node_that_has_the_sequence(phase: Phase) -> None:
    routing = Routing()
    client = in_phase(routing, phase)
    assert routing.record(client).phase is phase
    has_job = phase in (Phase.PREFILLING, Phase.DECODING)
    routing.clear()
    routing.dispatcher.end(client.seq, "abort")
    assert routing.sent[D0] == [Abort(client.seq, 0)]
    assert routing.sent[P0] == ([Abort(client.seq, 0)] if has_job else [])
    assert not routing.dispatcher.sequences and not routing.dispatcher.queue
    assert routing.credit_used() == (40 if has_job else 0), "a job's credit comes back with its report only"
    routing.job_ended(client, clean=False)
    assert routing.credit_used() == 0
    assert client.error is None


@pytest.mark.parametrize("phase", PHASES)
def test_a_request_that_takes_too_long_fails_in_any_phase(phase: Phase) -> None:
    routing = Routing()
    client = in_phase(routing, phase)
    routing.now += 61
    routing.dispatcher.tick()
    assert isinstance(client.error, RequestFailed) and client.error.code == "timeout"
    assert routing.last(D0, Abort) == Abort(client.seq, 0)
    assert not routing.dispatcher.sequences


def test_a_sequence_that_is_over_ends_only_once() -> None:
    routing = Routing()
    client = routing.decoding()
    routing.tokens(client, 0, 1, finish="stop")
    routing.dispatcher.end(client.seq, "abort")
    assert (client.finish, len(routing.updates)) == ("stop", 1)


def test_tokens_that_cross_the_end_are_dropped() -> None:
    routing = Routing()
    client = routing.prefilling()
    routing.dispatcher.end(client.seq, "abort")
    routing.say(P0, Prefilled(client.seq, 0, 0, 5, None, None, 0, 1.0, 1.0, PrefillWork(10, 50.0)))
    routing.say(D0, Landed(client.seq, 0), Tokens((TokenRun(client.seq, 0, 0, (5, 6), None, None),)))
    assert client.tokens == []


def test_a_landing_that_crosses_the_end_leaves_no_grant_behind() -> None:
    routing = Routing()
    client = routing.prefilling()
    routing.dispatcher.end(client.seq, "abort")
    routing.say(D0, Landed(client.seq, 0))
    routing.job_ended(client)
    assert not len(routing.dispatcher.grants)


def test_a_grant_that_crosses_the_end_is_answered_by_the_router() -> None:
    routing = Routing()
    client = routing.queued()
    grant = make_grant(client)
    routing.dispatcher.end(client.seq, "abort")
    routing.say(D0, Granted(client.seq, 0, grant), Cancel(grant.token, P0, D0))
    assert routing.sent[D0][-1] == Quiesced(grant.token, D0, True)
    assert not routing.frames(P0, Prefill) and not routing.frames(P0, Cancel)
    assert routing.credit_used() == 0


def test_a_prompt_that_a_decode_node_refuses_is_the_clients_error() -> None:
    routing = Routing()
    client = routing.submit()
    routing.say(D0, Refused(client.seq, 0, "context_length_exceeded", "the prompt has 40 tokens, but the KV pool holds 31"))
    assert isinstance(client.error, InvalidRequest) and client.error.code == "context_length_exceeded"
    assert routing.credit_used() == 0


# ── the receipt ──


def test_a_report_after_the_end_completes_the_receipt() -> None:
    routing = Routing()
    client = routing.prefilling()
    routing.tokens(client, 0, 1, finish="stop")
    assert routing.updates == [(client.seq, 0)]
    routing.job_ended(client, kv_bytes=4096)
    assert routing.updates == [(client.seq, 0), (client.seq, 4096)]
    routing.job_ended(client, kv_bytes=4096)
    assert len(routing.updates) == 2


def test_an_update_says_whether_another_will_come() -> None:
    routing = Routing()
    routing.updates.clear()
    client = routing.prefilling()
    record = routing.record(client)
    routing.dispatcher.end(client.seq, "abort")
    assert routing.dispatcher.awaits_report(record)
    routing.down(P0)
    assert not routing.dispatcher.awaits_report(record)
    assert len(routing.updates) == 2, "nobody will say how the push ended"


def test_reports_of_earlier_attempts_are_awaited_as_well() -> None:
    """Who counts ended requests counts them when nothing more will come: once each."""
    routing = Routing(prefills=(P0, P1))
    client = routing.prefilling()
    record = routing.record(client)
    routing.say(routing.decode_of(client), Released(client.seq, 0, "no sign of life from p0"))
    routing.is_retried(client)
    routing.say(routing.decode_of(client), Decided(client.seq, 1, "short: by itself", 0))
    routing.updates.clear()
    routing.tokens(client, 0, 1, finish="stop")
    assert routing.updates and routing.dispatcher.awaits_report(record)
    routing.job_ended(client, attempt=0)
    assert not routing.dispatcher.awaits_report(record)
    assert len(routing.updates) == 2


def test_the_receipt_knows_when_handles_moved_on_the_prefill_nodes_clock() -> None:
    routing = Routing()
    client = routing.prefilling()
    record = routing.record(client)
    routing.first_token(client, 50)
    routing.say(P0, JobEnded(client.seq, 0, True, "", 512, 3.0, 9.0))
    times = record.timeline
    assert (times.prefill_ms, times.first_token_reported_ms, times.first_post_ms, times.last_done_ms) == (5.0, 5.0, 3.0, 9.0)
    assert record.kv_bytes == 512


def test_the_receipt_knows_when_the_first_token_came_whichever_node_brought_it() -> None:
    routing = Routing()
    client = routing.prefilling()
    times = routing.record(client).timeline
    routing.now += 1
    routing.first_token(client, 50)
    first = routing.now
    routing.now += 1
    routing.tokens(client, 0, 50, 51)
    assert times.first_token == first


def test_the_receipt_remembers_the_decision() -> None:
    routing = Routing()
    local, remote = routing.submit(), routing.submit()
    records = routing.record(local), routing.record(remote)
    routing.say(D0, Decided(local.seq, 0, "short: few", 3), NeedPrefill(remote.seq, 0, "long: many", 4, None))
    assert [(r.was_remote, r.reason, r.cached_at_decode) for r in records] == [(False, "short: few", 3), (True, "long: many", 4)]


def test_gauges_are_kept_by_node() -> None:
    routing = Routing()
    gauges = Gauges(*range(len(Gauges.__struct_fields__)))
    routing.say(P0, gauges)
    routing.say(D0, gauges)
    assert routing.dispatcher.prefills[P0].gauges == routing.dispatcher.decodes[D0].gauges == gauges
