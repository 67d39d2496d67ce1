"""Jobs that wait for a prefill node: their order, who may overtake, who leaves."""

from disaggd.cluster.protocol import Abort, Credit, NoRoom, Released, RequestGrant, Room
from disaggd.ids import SeqId
from tests.support.routing import D0, D1, GRANT_PATIENCE_S, P0, P1, Client, Routing


def asked(routing: Routing, *names: str) -> list[SeqId]:
    """Whose grants the named decode nodes were asked for, in order."""
    return [frame.seq for name in names for frame in routing.frames(name, RequestGrant)]


def no_room(routing: Routing, client: Client) -> None:
    routing.say(routing.decode_of(client), NoRoom(client.seq, client.attempt))


def test_no_room_keeps_the_job_at_the_head_and_returns_its_credit() -> None:
    routing = Routing()
    first, second = routing.queued(), routing.queued()
    no_room(routing, first)
    no_room(routing, second)
    assert list(routing.dispatcher.queue) == [first.seq, second.seq], "whichever was refused last"
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


def test_a_job_waits_for_room_while_every_decode_node_is_full() -> None:
    routing = Routing()
    client = routing.queued(50)
    no_room(routing, client)
    routing.now += GRANT_PATIENCE_S + 1
    routing.dispatcher.tick()
    assert routing.decode_of(client) == D0
    assert list(routing.dispatcher.queue) == [client.seq]


def test_a_short_job_does_not_overtake_a_long_one_that_waits_for_credit() -> None:
    """Else a steady flow of short jobs would starve it: a job above the limit wants an idle node."""
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
    assert list(routing.dispatcher.queue) == [first.seq, third.seq]


def test_a_job_goes_to_the_prefill_node_with_the_fewest_tokens_in_hand() -> None:
    routing = Routing(prefills=(P0, P1))
    sizes = [100, 60, 30, 30]
    clients = [routing.queued(size) for size in sizes]
    assert [routing.record(client).prefill for client in clients] == [P0, P1, P1, P1]


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
    assert list(routing.dispatcher.queue) == [waiting.seq]
    routing.job_ended(running)
    assert asked(routing, D0) == [running.seq, waiting.seq]


def test_a_pair_that_comes_up_starts_the_jobs_that_waited_for_it() -> None:
    routing = Routing(prefills=())
    routing.prefill_up(P0)
    client = routing.queued()
    assert asked(routing, D0) == []
    routing.pair_all()
    assert asked(routing, D0) == [client.seq]
