"""Receipts made of the router's record: spans on one clock, attempts, what was predicted and what came."""

import pytest

from disaggd.cluster.offer import Predicted as PredictedSeconds
from disaggd.cluster.offer import PrefillWork
from disaggd.cluster.protocol import Decided, JobEnded, LocalPrefill, NeedPrefill, Prefilled, PrefixEnded, PrefixOutcome, Released
from disaggd.cluster.request import RoutedSequence
from disaggd.errors import Unavailable
from disaggd.observe.receipts import Predicted, Receipt
from disaggd.roles.receipts import make_receipt
from tests.support.routing import D0, P0, P1, Client, Routing


class Story:
    """A request told step by step, each so many milliseconds after its arrival."""

    def __init__(self, routing: Routing | None = None, priority: int = 0) -> None:
        self.routing = routing or Routing()
        self.client: Client = self.routing.submit(priority=priority)
        self.record: RoutedSequence = self.routing.record(self.client)
        self.arrived = self.routing.now

    def at(self, ms: float) -> Client:
        self.routing.now = self.arrived + ms / 1e3
        return self.client

    def receipt(self) -> Receipt:
        return make_receipt(self.record, "tiny", self.routing.now, 1_800_000_000.0)

    def spans(self, attempt: int = -1) -> list[tuple[str, str | None, float, float | None]]:
        return [(span.name, span.node, span.start_ms, span.end_ms) for span in self.receipt().attempts[attempt].spans]

    def prefilled(self, *, prefill_ms: float, reported_ms: float, name: str = P0) -> None:
        """The first token of a job that the prefill node says to have had for `reported_ms`."""
        client = self.client
        frame = Prefilled(client.seq, client.attempt, 0, 7, None, None, 0, prefill_ms, reported_ms, PrefillWork(10, 50.0))
        self.routing.say(P0 if name == P0 else P1, frame)


def remote_story() -> Story:
    """Decided after 2 ms, queued until 10, granted at 12, first token at 102, transfer ends at 115, over at 200."""
    story = Story()
    routing = story.routing
    story.at(2)
    predicted = PredictedSeconds(0.3, 0.09, 0.01)
    routing.dispatcher.prefills[P0].credit_tokens = 0
    routing.say(D0, NeedPrefill(story.client.seq, 0, "long: enough", 16, None, predicted))
    story.at(10)
    routing.dispatcher.prefills[P0].credit_tokens = 1000
    routing.dispatcher.tick()
    routing.granted(story.at(12))
    story.at(102)
    story.prefilled(prefill_ms=80.0, reported_ms=86.0)
    story.at(118)
    routing.tokens(story.client, 0, 7)
    routing.say(P0, JobEnded(story.client.seq, 0, True, "", 4096, 20.0, 101.0))
    routing.tokens(story.at(200), 1, 8, finish="length")
    return story


def test_a_remote_request_is_told_span_by_span() -> None:
    """The prefill node had the job for 86 of the 90 ms that the router waited: the other 4 it was in a step, and did not look."""
    assert remote_story().spans() == [
        ("decide", "d0", 0.0, 2.0),
        ("queue", None, 2.0, 10.0),
        ("grant", "d0", 10.0, 12.0),
        ("prefill_wait", "p0", 12.0, 22.0),
        ("prefill", "p0", 22.0, 102.0),
        ("transfer", "p0", 36.0, 117.0),
        ("decode", "d0", 102.0, 200.0),
    ]


def pushing_story(outcome: PrefixOutcome | None) -> Story:
    """Granted at 4, its grant leaving 24 tokens out; what became of those is told at 20, and the first token comes at 100."""
    routing = Routing(shares_prefixes=True, prefix_push="always")
    story = Story(routing)
    routing.need_prefill(story.at(2))
    routing.granted(story.at(4), first_token_index=24)
    story.at(20)
    if outcome is not None:
        routing.say(P0, PrefixEnded(story.client.seq, 0, outcome, "", 24, 2400, 12.5))
        story.at(100)
        story.prefilled(prefill_ms=80.0, reported_ms=95.0)
    return story


@pytest.mark.parametrize("outcome", ["landed", "failed"])
def test_a_prefix_that_was_pushed_is_a_span_of_the_node_that_did(outcome: PrefixOutcome) -> None:
    """The prefill node had the job from 5 on, and waited for it for 12.5 ms."""
    assert pushing_story(outcome).spans()[-3:] == [
        ("prefix_push", "d0", 5.0, 17.5),
        ("prefill_wait", "p0", 4.0, 20.0),
        ("prefill", "p0", 20.0, 100.0),
    ]


def test_a_prefix_under_way_lasts_and_one_that_nobody_began_to_push_is_no_span() -> None:
    assert ("prefix_push", "d0", 4.0, None) in pushing_story(None).spans()
    assert "prefix_push" not in [name for name, *_ in pushing_story("no_room").spans()]


def test_a_prefix_is_a_span_of_the_attempt_that_it_was_pushed_for() -> None:
    story = pushing_story(None)
    story.routing.say(P0, PrefixEnded(story.client.seq, 0, "stopped", "", 0, 0, 30.0))
    story.at(40)
    story.routing.say(D0, Released(story.client.seq, 0, "its prefill failed"))
    lost, again = story.receipt().attempts
    assert [(span.start_ms, span.end_ms) for span in lost.spans if span.name == "prefix_push"] == [(4.0, 34.0)]
    assert not [span for span in again.spans if span.name == "prefix_push"]


def test_durations_keep_their_documented_ends() -> None:
    spans = remote_story().receipt().spans_ms
    assert (spans.queue, spans.grant, spans.prefill_wait, spans.prefill) == (10.0, 2.0, 6.0, 80.0)
    assert (spans.transfer, spans.transfer_exposed) == (81.0, 15.0)
    assert (spans.first_token, spans.decode, spans.total) == (102.0, 98.0, 200.0)


def test_what_was_predicted_stands_beside_what_came() -> None:
    """The decision came in after 2 ms, the token after 102."""
    receipt = remote_story().receipt()
    assert receipt.predicted == Predicted(local_ttft_ms=300.0, remote_ttft_ms=90.0, local_damage_ms=10.0)
    assert receipt.prediction_error == pytest.approx(-0.1)
    assert receipt.attempts[0].predicted == receipt.predicted


def test_the_rest_of_a_receipt_is_what_was_asked_and_who_worked() -> None:
    receipt = remote_story().receipt()
    assert (receipt.decision, receipt.reason, receipt.prefill_node, receipt.decode_node) == ("remote", "long: enough", "p0", "d0")
    assert (receipt.policy, receipt.priority, receipt.session, receipt.phase) == ("auto", 0, None, "done")
    assert (receipt.attempts[0].queue_depth, receipt.attempts[0].failure) == (0, None)
    assert receipt.arrived_at == pytest.approx(1_800_000_100.001)


def test_a_local_prefill_is_told_by_its_node() -> None:
    """It came to it after 1.5 ms, whatever the router heard of the decision at 2, and took 28.5."""
    story = Story()
    story.at(2)
    story.routing.say(D0, Decided(story.client.seq, 0, "short: it is", 0, PredictedSeconds(local_ttft_s=0.0342)))
    story.at(30)
    story.routing.say(D0, LocalPrefill(story.client.seq, 0, 0, 8.5, 20.0))
    story.routing.tokens(story.client, 0, 7)
    story.routing.tokens(story.at(50), 1, 8, finish="length")
    assert story.spans() == [
        ("decide", "d0", 0.0, 1.5),
        ("prefill_wait", "d0", 1.5, 10.0),
        ("prefill", "d0", 10.0, 30.0),
        ("decode", "d0", 30.0, 50.0),
    ]
    spans = story.receipt().spans_ms
    assert (spans.prefill_wait, spans.prefill, spans.queue) == (8.5, 20.0, None)
    assert story.receipt().prediction_error == pytest.approx(0.2)


def test_a_node_that_claims_more_time_than_passed_is_cut_to_what_did() -> None:
    """Clocks drift by parts in a million, and routers fall behind."""
    story = Story()
    story.at(2)
    story.routing.say(D0, Decided(story.client.seq, 0, "short: it is", 0))
    story.at(30)
    story.routing.say(D0, LocalPrefill(story.client.seq, 0, 0, 6.0, 30.5))
    story.routing.tokens(story.client, 0, 7)
    assert story.spans()[:3] == [("decide", "d0", 0.0, 0.0), ("prefill_wait", "d0", 0.0, 0.0), ("prefill", "d0", 0.0, 30.0)]


def test_a_local_prefill_that_its_node_said_nothing_of_is_what_the_router_saw() -> None:
    story = Story()
    story.at(2)
    story.routing.say(D0, Decided(story.client.seq, 0, "short: it is", 0))
    story.routing.tokens(story.at(30), 0, 7, finish="length")
    assert story.spans() == [("decide", "d0", 0.0, 2.0), ("prefill", "d0", 2.0, 30.0)]


def test_a_request_shows_what_it_waits_for() -> None:
    story = Story()
    assert story.spans() == [("decide", "d0", 0.0, None)]
    assert (story.receipt().decision, story.receipt().phase) == (None, "placed")
    story.routing.dispatcher.prefills[P0].credit_tokens = 0
    story.at(2)
    story.routing.need_prefill(story.client)
    assert story.spans()[1:] == [("queue", None, 2.0, None)]
    assert (story.receipt().phase, story.receipt().age_ms) == ("queued", 2.0)
    story.at(5)
    story.routing.dispatcher.prefills[P0].credit_tokens = 1000
    story.routing.dispatcher.tick()
    assert story.spans()[1:] == [("queue", None, 2.0, 5.0), ("grant", "d0", 5.0, None)]
    story.routing.granted(story.at(6))
    assert story.spans()[2:] == [("grant", "d0", 5.0, 6.0), ("prefill", "p0", 6.0, None)]


def test_jobs_that_wait_are_counted_by_the_next_one() -> None:
    routing = Routing()
    routing.dispatcher.prefills[P0].credit_tokens = 0
    routing.queued()
    story = Story(routing)
    routing.need_prefill(story.client)
    attempt = story.receipt().attempts[0]
    assert (attempt.queue_depth, attempt.jobs_ahead) == (1, 1)
    urgent = Story(routing, priority=-5)
    routing.need_prefill(urgent.client)
    attempt = urgent.receipt().attempts[0]
    assert (attempt.queue_depth, attempt.jobs_ahead) == (2, 0)


def test_an_aborted_request_ends_what_it_waited_for() -> None:
    story = Story()
    story.routing.dispatcher.prefills[P0].credit_tokens = 0
    story.at(2)
    story.routing.need_prefill(story.client)
    story.at(40)
    story.routing.dispatcher.end(story.client.seq, "abort")
    assert story.spans() == [("decide", "d0", 0.0, 2.0), ("queue", None, 2.0, 40.0)]
    assert (story.receipt().finish_reason, story.receipt().attempts[0].end_ms) == ("abort", 40.0)
    assert story.receipt().age_ms is None


def test_a_request_that_failed_says_what_its_client_was_told() -> None:
    story = Story()
    story.routing.dispatcher.fail(story.client.seq, Unavailable("the router is stopping"))
    assert (story.receipt().error, story.receipt().finish_reason) == ("the router is stopping", "error")


def test_every_attempt_is_kept_with_what_failed() -> None:
    routing = Routing(prefills=(P0, P1))
    story = Story(routing)
    story.at(2)
    routing.need_prefill(story.client)
    first = story.record.prefill
    assert first is not None
    routing.granted(story.at(4))
    story.at(50)
    routing.say(D0, Released(story.client.seq, 0, "its prefill failed"))
    story.client.attempt = 1
    assert (story.receipt().decision, story.receipt().phase) == (None, "placed")
    story.at(52)
    routing.need_prefill(story.client)
    routing.granted(story.at(53))
    routing.say(first, JobEnded(story.client.seq, 0, False, "aborted", 100, 5.0, 60.0))
    lost, again = story.receipt().attempts
    assert (lost.failure, lost.prefill_node, lost.start_ms, lost.end_ms) == (
        f"prefill on {first} came to nothing: its prefill failed",
        first,
        0.0,
        50.0,
    )
    assert [(span.name, span.start_ms, span.end_ms) for span in lost.spans][-2:] == [("prefill", 4.0, 50.0), ("transfer", 9.0, 64.0)]
    assert (again.failure, again.start_ms, again.end_ms) == (None, 50.0, None)
    assert [(span.name, span.start_ms) for span in again.spans][:2] == [("decide", 50.0), ("queue", 52.0)]
    assert story.receipt().retries == 1
    assert story.receipt().prediction_error is None


def test_an_attempt_that_has_no_node_yet_has_begun_with_the_end_of_the_last() -> None:
    story = Story()
    story.at(2)
    story.routing.say(D0, Decided(story.client.seq, 0, "short: it is", 0))
    story.routing.tokens(story.at(10), 0, 7)
    story.at(20)
    story.routing.down(D0)
    lost, homeless = story.receipt().attempts
    assert (lost.failure, lost.spans[-1].name, lost.spans[-1].end_ms) == ("decode node d0 was lost", "decode", 20.0)
    assert (homeless.decode_node, homeless.start_ms, homeless.spans) == (None, 20.0, ())
