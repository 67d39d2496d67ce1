"""Requests that stand still: told once, with where and for whom; never while anything is seen to move."""

import logging
from collections.abc import Iterator

import msgspec
import pytest

from disaggd.cluster.protocol import NoRoom, Progress
from disaggd.cluster.request import Phase
from disaggd.ids import NodeName
from tests.support.routing import D0, P0, Client, Routing, gauges

STALL_S = 10.0
MEMORY = gauges(blocks_free=60)


class Told(logging.Handler):
    """What the watch has said."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[Told]:
    caplog.set_level(logging.INFO, "disaggd.cluster.stalls")
    told, logger = Told(), logging.getLogger("disaggd.cluster.stalls")
    logger.addHandler(told)
    yield told
    logger.removeHandler(told)


def make(**rules: object) -> Routing:
    return Routing(**{"stall_s": STALL_S, "request_timeout_s": 600.0, "grant_patience_s": 100.0, **rules})


def wait(routing: Routing, seconds: float) -> None:
    """The router ticks all the while."""
    for _ in range(round(seconds * 10)):
        routing.now += 0.1
        routing.dispatcher.tick()


def computes(routing: Routing, name: NodeName, backlog_tokens: int) -> None:
    routing.say(name, msgspec.structs.replace(MEMORY, prefill_backlog_tokens=backlog_tokens))


def in_phase(routing: Routing, phase: Phase) -> Client:
    match phase:
        case Phase.PLACED:
            return routing.submit()
        case Phase.QUEUED:
            routing.prefilling(900)
            return routing.queued(900)
        case Phase.GRANTING:
            return routing.queued()
        case Phase.PREFILLING:
            return routing.prefilling()
        case Phase.ARBITRATION:
            client = routing.prefilling()
            routing.job_ended(client, clean=False)
            return client
        case _:
            return routing.decoding()


WAITS_FOR = {
    Phase.PLACED: "placed, waits for d0",
    Phase.QUEUED: "queued, waits for a prefill node",
    Phase.GRANTING: "granting, waits for d0",
    Phase.PREFILLING: "prefilling, waits for p0",
    Phase.ARBITRATION: "arbitration, waits for d0",
    Phase.DECODING: "decoding, waits for d0",
}


@pytest.mark.parametrize("phase", WAITS_FOR)
def test_a_request_that_stands_still_is_told_once_with_its_phase_and_whom_it_waits_for(phase: Phase, told: Told) -> None:
    routing = make()
    client = in_phase(routing, phase)
    assert routing.record(client).phase is phase
    wait(routing, STALL_S - 0.5)
    assert not told.messages and routing.dispatcher.stalls.num_stalled == 0
    wait(routing, 2 * STALL_S)
    others = 1 if phase is Phase.QUEUED else 0  # the job in front of it
    assert [message for message in told.messages if WAITS_FOR[phase] in message] == [f"request: has not moved for 10 s: {WAITS_FOR[phase]}"]
    assert routing.dispatcher.stalls.totals[phase.value] == 1
    assert routing.dispatcher.stalls.num_stalled == 1 + others


def test_one_that_moves_again_is_told_too_and_may_stall_once_more(told: Told) -> None:
    routing = make()
    client = routing.decoding()
    routing.tokens(client, 0, 50)
    wait(routing, STALL_S + 2)
    routing.tokens(client, 1, 51)
    wait(routing, 1)
    assert routing.dispatcher.stalls.num_stalled == 0
    assert [message.partition(",")[0] for message in told.messages][1] == "request: moves again"
    wait(routing, STALL_S + 2)
    assert routing.dispatcher.stalls.totals == {"decoding": 2}


def test_one_that_is_over_stands_still_no_more() -> None:
    routing = make()
    client = routing.decoding()
    wait(routing, STALL_S + 2)
    routing.dispatcher.end(client.seq, "abort")
    wait(routing, 1)
    assert routing.dispatcher.stalls.num_stalled == 0


# ── long, and no stall ──


def test_a_queued_job_waits_in_peace_while_the_queue_moves(told: Told) -> None:
    routing = make()
    last = in_phase(routing, Phase.QUEUED)
    for _ in range(5):
        other = routing.queued(900)
        wait(routing, STALL_S - 2)
        routing.dispatcher.end(other.seq, "abort")
    assert routing.record(last).phase is Phase.QUEUED
    assert not any("queued" in message for message in told.messages)


@pytest.mark.parametrize(("phase", "name"), [(Phase.QUEUED, P0), (Phase.PREFILLING, P0), (Phase.DECODING, D0)])
def test_a_long_prefill_is_no_stall_while_its_node_computes(phase: Phase, name: NodeName, told: Told) -> None:
    routing = make()
    in_phase(routing, phase)
    for backlog in range(9000, 4000, -1000):
        computes(routing, name, backlog)
        wait(routing, STALL_S - 2)
    assert not told.messages
    wait(routing, STALL_S)
    assert told.messages


def test_a_long_push_is_no_stall_while_its_lease_is_renewed(told: Told) -> None:
    routing = make()
    client = routing.queued()
    grant = routing.granted(client)
    routing.first_token(client, 50)
    for _ in range(5):
        wait(routing, STALL_S - 2)
        routing.say(P0, Progress((grant.token,)))
    assert not told.messages
    wait(routing, STALL_S + 2)
    assert told.messages == ["request: has not moved for 10 s: prefilling, waits for its KV to get from p0 to d0"]


def test_what_waits_for_room_is_told_so(told: Told) -> None:
    routing = make()
    client = routing.queued()
    routing.say(D0, NoRoom(client.seq, 0))
    wait(routing, STALL_S + 2)
    assert told.messages == ["request: has not moved for 10 s: queued, waits for room at d0"]
