"""Jobs that wait for a prefill node: their order, who may overtake, who leaves."""

from disaggd.cluster.admission import MAX_RETRY_S
from disaggd.cluster.costs import ENOUGH_DELAYS
from disaggd.cluster.offer import PrefillCost
from disaggd.cluster.protocol import Abort, Credit, Draining, Measured, NoRoom, Prefill, Released, RequestGrant, Room
from disaggd.errors import Overloaded
from disaggd.ids import NodeName, SeqId
from tests.support.routing import D0, D1, GRANT_PATIENCE_S, P0, P1, Client, Routing, gauges


def asked(routing: Routing, *names: str) -> list[SeqId]:
    """Whose grants the named decode nodes were asked for, in order."""
    return [frame.seq for name in names for frame in routing.frames(name, RequestGrant)]


def no_room(routing: Routing, client: Client) -> None:
    routing.say(routing.decode_of(client), NoRoom(client.seq, client.attempt))


def client_of(routing: Routing, seq: SeqId) -> Client:
    sink = routing.dispatcher.sequences[seq].sink
    assert isinstance(sink, Client)
    return sink


def test_no_room_keeps_the_job_at_the_head_and_returns_its_credit() -> None:
    routing = Routing()
    first, second = routing.queued(), routing.queued()
    no_room(routing, first)
    no_room(routing, second)
    assert routing.waiting() == [first.seq, second.seq], "whichever was refused last"
    assert routing.credit_used() == 0


def test_a_full_decode_node_is_not_asked_again_before_it_has_room() -> None:
    routing = Routing()
    client = routing.queued()
    no_room(routing, client)
    routing.clear()
    routing.dispatcher.tick()
    routing.queued()
    assert asked(routing, D0) == []
    routing.say(D0, Room())
    assert asked(routing, D0)[0] == client.seq


def test_jobs_of_other_decode_nodes_overtake_one_that_waits_for_room() -> None:
    routing = Routing(decodes=(D0, D1), credit=100)
    first = routing.queued(50)
    assert routing.decode_of(first) == D0
    no_room(routing, first)
    second = routing.queued(50)
    assert routing.decode_of(second) == D1
    assert asked(routing, D1) == [second.seq]


def test_a_job_whose_decode_node_stays_full_moves_to_one_that_has_room() -> None:
    routing = Routing(decodes=(D0, D1), credit=100)
    client = routing.queued(50)
    no_room(routing, client)
    routing.now += GRANT_PATIENCE_S + 1
    routing.dispatcher.tick()
    assert routing.decode_of(client) == D1
    assert (client.seq, 0) in [(frame.seq, frame.attempt) for frame in routing.frames(D0, Abort)]
    assert routing.record(client).retries == 0, "nothing was lost"


def test_a_job_whose_slack_ends_moves_before_patience_does() -> None:
    routing = Routing(decodes=(D0, D1), credit=100, ttft_target_s=1.0)
    client = routing.queued(50)
    no_room(routing, client)
    assert routing.decode_of(client) == D0
    routing.now += 1.0
    routing.dispatcher.tick()
    assert routing.decode_of(client) == D1


def test_a_job_does_not_move_to_a_node_whose_gauges_show_too_few_blocks() -> None:
    routing = Routing(decodes=(D0, D1), ttft_target_s=1.0)
    client = routing.queued(50)
    no_room(routing, client)
    routing.say(D1, gauges(blocks_free=10, blocks_cached=2))
    routing.now += 2.0
    routing.dispatcher.tick()
    assert routing.decode_of(client) == D0
    routing.say(D1, gauges(blocks_free=10, blocks_cached=3))
    routing.dispatcher.tick()
    assert routing.decode_of(client) == D1, "13 blocks of 4 hold 50 tokens and one more"


def test_when_patience_ends_the_full_node_is_asked_once_to_keep_what_comes_free() -> None:
    routing = Routing(ttft_target_s=60.0)
    client = routing.queued(50)
    assert not routing.last(D0, RequestGrant).earmark
    no_room(routing, client)
    routing.clear()
    routing.now += GRANT_PATIENCE_S
    routing.dispatcher.tick()
    assert asked(routing, D0) == []
    routing.now += 0.1
    routing.dispatcher.tick()
    assert [(frame.seq, frame.earmark) for frame in routing.frames(D0, RequestGrant)] == [(client.seq, True)]
    no_room(routing, client)
    routing.now += 10.0
    routing.dispatcher.tick()
    assert len(routing.frames(D0, RequestGrant)) == 1, "it says when there is room"
    assert routing.waiting() == [client.seq]
    routing.say(D0, Room())
    assert asked(routing, D0) == [client.seq, client.seq]


def test_nobody_else_is_asked_for_while_a_node_keeps_what_comes_free_for_one() -> None:
    """They would be refused, and take the credit that the one needs."""
    routing = Routing(ttft_target_s=60.0)
    kept_for = routing.queued(50)
    no_room(routing, kept_for)
    routing.now += GRANT_PATIENCE_S + 0.1
    routing.dispatcher.tick()
    no_room(routing, kept_for)
    urgent = routing.queued(20, priority=-100)
    routing.clear()
    routing.say(D0, Room())
    assert asked(routing, D0) == [kept_for.seq]
    routing.granted(kept_for)
    assert routing.waiting() == [urgent.seq]
    routing.dispatcher.tick()
    assert asked(routing, D0) == [kept_for.seq, urgent.seq]


def test_one_that_lost_patience_second_is_kept_for_as_well() -> None:
    routing = Routing(ttft_target_s=60.0)
    first, second = routing.queued(50), routing.queued(50)
    no_room(routing, first)
    no_room(routing, second)
    routing.now += GRANT_PATIENCE_S + 0.1
    routing.dispatcher.tick()
    for client in (first, second):
        no_room(routing, client)
    assert [frame.earmark for frame in routing.frames(D0, RequestGrant)] == [False, False, True, True]
    routing.clear()
    routing.say(D0, Room())
    assert asked(routing, D0) == [first.seq, second.seq]


def test_of_two_that_blocks_are_kept_for_the_first_asks_first() -> None:
    """The other would be refused, whatever its priority, and have the only credit meanwhile."""
    routing = Routing(ttft_target_s=60.0, credit=60)
    first = routing.queued(50)
    no_room(routing, first)
    routing.now += GRANT_PATIENCE_S + 0.1
    routing.dispatcher.tick()
    no_room(routing, first)
    urgent = routing.queued(50, priority=-100)
    routing.dispatcher.tick()
    routing.now += GRANT_PATIENCE_S + 0.1
    routing.dispatcher.tick()
    no_room(routing, urgent)
    assert asked(routing, D0) == [first.seq, first.seq, urgent.seq]
    assert routing.waiting() == [urgent.seq, first.seq]
    routing.clear()
    routing.say(D0, Room())
    assert asked(routing, D0) == [first.seq]


def test_nothing_is_kept_for_a_client_that_has_gone() -> None:
    routing = Routing(ttft_target_s=60.0)
    gone, waiting = routing.queued(50), routing.submit(50)
    no_room(routing, gone)
    routing.now += GRANT_PATIENCE_S + 0.1
    routing.dispatcher.tick()
    no_room(routing, gone)
    routing.say(D0, Room())
    no_room(routing, gone)
    routing.dispatcher.end(gone.seq, "abort")
    routing.need_prefill(waiting)
    routing.say(D0, Room())
    assert asked(routing, D0)[-1] == waiting.seq


def test_a_job_that_moves_is_patient_anew() -> None:
    routing = Routing(decodes=(D0, D1), ttft_target_s=1.0)
    client = routing.queued(50)
    no_room(routing, client)
    routing.now += GRANT_PATIENCE_S + 1
    routing.dispatcher.tick()
    routing.is_retried(client)
    routing.need_prefill(client)
    no_room(routing, client)
    routing.dispatcher.tick()
    assert [frame.earmark for frame in routing.frames(D1, RequestGrant)] == [False]


def test_a_later_job_with_more_slack_does_not_overtake_one_that_waits_for_credit() -> None:
    """Else a steady flow of short jobs would starve a long one: a job above the limit wants an idle node."""
    routing = Routing(credit=100)
    running = routing.prefilling(60)
    long, short = routing.queued(150), routing.queued(20)
    assert asked(routing, D0) == [running.seq]
    routing.job_ended(running)
    assert asked(routing, D0) == [running.seq, long.seq]
    routing.granted(long)
    routing.job_ended(long)
    assert asked(routing, D0) == [running.seq, long.seq, short.seq]


def test_jobs_start_in_the_order_of_their_requests_even_after_a_retry() -> None:
    routing = Routing(credit=100)
    first = routing.prefilling(90)
    second = routing.queued(90)
    routing.job_ended(first, clean=False)
    assert asked(routing, D0)[-1] == second.seq
    third = routing.queued(90)
    routing.say(D0, Released(first.seq, 0, "given up"))
    routing.is_retried(first)
    routing.need_prefill(first)
    assert routing.waiting() == [first.seq, third.seq]


def test_with_credits_exhausted_a_later_job_with_less_slack_overtakes() -> None:
    routing = Routing(credit=100)
    running = routing.prefilling(90)
    patient, urgent = routing.queued(90, priority=1), routing.queued(90)
    long = routing.queued(190)
    assert routing.waiting() == [long.seq, urgent.seq, patient.seq], "a longer prompt has to start earlier"
    for finished, started in ((running, long), (long, urgent), (urgent, patient)):
        routing.job_ended(finished)
        assert asked(routing, D0)[-1] == started.seq
        routing.granted(started)


def test_a_job_that_has_waited_for_the_aging_bound_is_overtaken_by_nobody() -> None:
    routing = Routing(credit=100, queue_aging_s=10.0)
    running = routing.prefilling(90)
    unloved = routing.queued(90, priority=100)
    for _ in range(5):
        urgent = routing.queued(90, priority=-100)
        routing.job_ended(running)
        assert asked(routing, D0)[-1] == urgent.seq
        routing.granted(urgent)
        running, routing.now = urgent, routing.now + 2.0
    routing.queued(90, priority=-100)
    routing.job_ended(running)
    assert asked(routing, D0)[-1] == unloved.seq


def test_a_long_job_gets_its_turn_in_a_flow_of_urgent_short_ones() -> None:
    """It wants an idle node: once it is the next in turn, nobody takes the credit that comes free."""
    routing = Routing(credit=100, queue_aging_s=10.0)
    running = [routing.prefilling(50), routing.prefilling(50)]
    long = routing.queued(150, priority=100)
    while asked(routing, D0)[-1] != long.seq:
        routing.queued(50)
        routing.job_ended(running.pop(0))
        started = asked(routing, D0)[-1]
        if started != long.seq and started not in {one.seq for one in running}:
            running.append(client_of(routing, started))
            routing.granted(running[-1])
        routing.now += 1.0
        assert routing.now < 115.0


def test_nodes_that_the_first_job_cannot_use_take_those_behind_it() -> None:
    routing = Routing(prefills=(P0,), decodes=(D0,), credit=100)
    routing.prefilling(90)
    first = routing.queued(90)
    assert routing.waiting() == [first.seq]
    routing.prefill_up(P1, 100)
    routing.decode_up(D1)
    routing.pair(P1, D1)
    second = routing.queued(90)
    assert routing.decode_of(second) == D1
    assert asked(routing, D1) == [second.seq], "p1 cannot reach the first job's decode node"
    assert routing.waiting() == [first.seq]


def test_a_job_goes_to_the_prefill_node_with_the_fewest_tokens_in_hand() -> None:
    routing = Routing(prefills=(P0, P1))
    sizes = [100, 60, 30, 30]
    clients = [routing.queued(size) for size in sizes]
    assert [routing.record(client).prefill for client in clients] == [P0, P1, P1, P1]


def test_a_node_that_has_prefilled_is_the_first_to_be_through() -> None:
    """Its pushes still hold credit, but no work is left of them."""
    routing = Routing(prefills=(P0, P1))
    large, small = routing.prefilling(300), routing.prefilling(100)
    assert [routing.record(client).prefill for client in (large, small)] == [P0, P1]
    routing.first_token(large, 1)
    assert routing.record(routing.queued(40)).prefill == P0


def test_work_that_should_be_done_by_now_counts_no_more() -> None:
    routing = Routing(prefills=(P0, P1))
    routing.say(P0, Measured(PrefillCost(0.0, 0.01, 0.0), 0.0, 0.0))
    routing.say(P1, Measured(PrefillCost(0.0, 0.01, 0.0), 0.0, 0.0))
    routing.prefilling(300)
    routing.now += 2.5
    routing.prefilling(100)
    assert routing.record(routing.queued(40)).prefill == P0, "0.5 s are left of 3 s, against 1 s"


def test_a_slow_node_gets_what_it_finishes_first() -> None:
    routing = Routing(prefills=(P0, P1))
    routing.say(P0, Measured(PrefillCost(0.0, 0.0041, 0.0), 0.0, 0.0))
    routing.say(P1, Measured(PrefillCost(0.0, 0.001, 0.0), 0.0, 0.0))
    assert [routing.record(routing.queued(100)).prefill for _ in range(5)] == [P1, P1, P1, P1, P0]


def test_a_job_of_any_size_fits_an_idle_node() -> None:
    routing = Routing(credit=10)
    client = routing.queued(500)
    assert asked(routing, D0) == [client.seq]


def test_a_node_that_gave_no_credit_gets_no_job() -> None:
    routing = Routing(credit=0)
    client = routing.queued()
    assert asked(routing, D0) == []
    routing.say(P0, Credit(1000))
    assert asked(routing, D0) == [client.seq]


def test_a_job_whose_client_has_gone_leaves_the_queue() -> None:
    routing = Routing(credit=100)
    running = routing.prefilling(90)
    gone, waiting = routing.queued(90), routing.queued(90)
    routing.dispatcher.end(gone.seq, "abort")
    assert routing.waiting() == [waiting.seq]
    routing.job_ended(running)
    assert asked(routing, D0) == [running.seq, waiting.seq]
    assert routing.dispatcher.queue.drops == {"gone": 1}


def test_a_pair_that_comes_up_starts_the_jobs_that_waited_for_it() -> None:
    routing = Routing(prefills=())
    routing.prefill_up(P0)
    client = routing.queued()
    assert asked(routing, D0) == []
    routing.pair_all()
    assert asked(routing, D0) == [client.seq]


# ── a full queue ─────────────────────────────────────────────────────────────────────────────────────────────────────


def full(**rules: int) -> tuple[Routing, Client, Client]:
    """A cluster whose queue has no room: one job runs, one waits."""
    routing = Routing(credit=100, **{"max_prefill_queue": 1, **rules})
    return routing, routing.prefilling(90), routing.queued(90)


def test_a_decode_node_is_told_that_the_queue_is_full() -> None:
    routing, _, _ = full()
    offer = routing.offer(routing.submit(90))
    assert (offer.queue_depth, offer.queue_is_full, offer.may_grant) == (1, True, False)


def test_one_that_still_wants_a_prefill_elsewhere_is_answered_overloaded_at_once() -> None:
    routing, _, waiting = full()
    client = routing.queued(90)
    assert isinstance(client.error, Overloaded)
    assert client.error.status == 429
    assert client.seq not in routing.dispatcher.sequences
    assert routing.frames(D0, Abort)[-1].seq == client.seq
    assert routing.waiting() == [waiting.seq]
    assert routing.dispatcher.queue.drops == {"full": 1}


def test_retry_after_is_the_predicted_wait() -> None:
    routing = Routing(credit=100, max_prefill_queue=2)
    routing.say(P0, Measured(PrefillCost(0.5, 0.01, 0.0), 0.0, 0.0))
    routing.prefilling(100)
    routing.now += 0.5
    routing.queued(100), routing.queued(100)
    refused = routing.queued(100)
    assert isinstance(refused.error, Overloaded)
    assert refused.error.retry_after_s == 4, "of three prefills of 1.5 s each, 1 s is left of the first"
    urgent = routing.queued(100, priority=-100)
    assert isinstance(urgent.error, Overloaded)
    assert urgent.error.retry_after_s == 1, "it would have gone before those that wait"


def loaded(*prefills: NodeName, prefill_s: float) -> Routing:
    """Each prefill node has a job that it has just begun, and as many wait as may."""
    routing = Routing(prefills=prefills, credit=100, max_prefill_queue=2)
    for name in prefills:
        routing.say(name, Measured(PrefillCost(prefill_s, 0.0, 0.0), 0.0, 0.0))
    for _ in prefills:
        routing.prefilling(100)
    routing.queued(100), routing.queued(100)
    return routing


def retry_after_s(routing: Routing) -> int:
    refused = routing.queued(100)
    assert isinstance(refused.error, Overloaded)
    return refused.error.retry_after_s


def test_retry_after_is_not_stretched_by_how_late_short_prompts_were() -> None:
    routing = loaded(P0, prefill_s=5.0)
    for _ in range(ENOUGH_DELAYS):
        routing.dispatcher._moves.learning.delays.learn(0.01, 0.05, routing.now)
    assert retry_after_s(routing) == 15


def test_retry_after_is_shared_by_those_prefill_nodes_that_take_jobs() -> None:
    routing = loaded(P0, P1, prefill_s=5.0)
    assert retry_after_s(routing) == 10, "two that are under way and two that wait, for two nodes"
    routing.say(P1, Draining())
    assert retry_after_s(routing) == 15, "one that is under way and two that wait, for one node"


def test_retry_after_is_a_minute_at_most() -> None:
    assert retry_after_s(loaded(P0, prefill_s=100.0)) == MAX_RETRY_S


def test_a_queue_that_filled_up_after_the_offer_lets_decode_decide_again() -> None:
    routing = Routing(credit=100, max_prefill_queue=1)
    routing.prefilling(90)
    late = routing.submit(90)
    assert not routing.offer(late).queue_is_full
    routing.queued(90)
    routing.need_prefill(late)
    assert routing.is_retried(late).offer.queue_is_full
    assert routing.record(late).retries == 0
    assert late.error is None
    routing.need_prefill(late)
    assert isinstance(late.error, Overloaded)


def test_tokens_fill_the_queue_too() -> None:
    routing, _, _ = full(max_prefill_queue=10, max_prefill_queue_tokens=100)
    assert isinstance(routing.queued(90).error, Overloaded)
    assert routing.queued(10).error is None


def test_a_job_that_had_a_place_returns_to_a_full_queue() -> None:
    routing, running, waiting = full()
    routing.job_ended(running, clean=False)
    assert asked(routing, D0)[-1] == waiting.seq
    later = routing.queued(90)
    routing.say(D0, Released(running.seq, 0, "given up"))
    assert not routing.is_retried(running).offer.queue_is_full, "it is promised a place"
    routing.need_prefill(running)
    assert routing.waiting() == [running.seq, later.seq]


def test_what_a_client_has_already_got_is_never_followed_by_overloaded() -> None:
    """A stream that lost its decode node goes on, whatever the queue holds."""
    routing = Routing(decodes=(D0, D1), credit=100, max_prefill_queue=1)
    streaming = routing.decoding(90)
    assert routing.decode_of(streaming) == D0
    routing.tokens(streaming, 0, 1)
    running = routing.prefilling(90)
    assert routing.decode_of(running) == D1
    routing.queued(90)
    routing.down(D0)
    routing.is_retried(streaming)
    routing.need_prefill(streaming)
    assert streaming.error is None
    assert streaming.seq in routing.waiting()


def test_a_gone_clients_job_is_never_sent_to_a_prefill_node() -> None:
    routing, running, gone = full()
    routing.dispatcher.end(gone.seq, "abort")
    routing.job_ended(running)
    for _ in range(3):
        routing.now += 5.0
        routing.dispatcher.tick()
    assert [frame.seq for frame in routing.frames(P0, Prefill)] == [running.seq]
