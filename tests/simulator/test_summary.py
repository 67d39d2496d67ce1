import pytest

from disaggd.simulator.summary import Outcome, Slo, summarize


def outcome(
    ttft_ms: float | None = 100.0,
    *gaps_ms: float,
    error: str | None = None,
    why: str | None = None,
    arrived_s: float = 0.0,
    remote: bool = False,
) -> Outcome:
    return Outcome(
        arrived_s=arrived_s,
        prompt_tokens=50,
        output_tokens=1 + len(gaps_ms),
        error=error,
        why=why,
        remote=remote,
        reason="",
        decode="d0",
        prefill=None,
        cached_at_decode=10,
        cached_at_prefill=0,
        ttft_ms=ttft_ms,
        gaps_ms=gaps_ms,
        ended_s=arrived_s + 10,
        prediction_error=-0.25,
        breakeven_tokens=None,
        queued_ms=None,
        retries=0,
    )


@pytest.mark.parametrize(
    ("one", "is_met"),
    [
        (outcome(100, 20, 30), True),
        (outcome(101, 20), False),
        (outcome(100, 20, 31), False),
        (outcome(100), True),
        (outcome(None), False),
        (outcome(100, 20, error="timeout"), False),
    ],
)
def test_a_good_request_keeps_both_limits(one: Outcome, is_met: bool) -> None:
    assert Slo(ttft_ms=100, itl_ms=30).is_met(one) is is_met


def test_without_limits_a_finished_request_is_good() -> None:
    assert Slo().is_met(outcome(1e9, 1e9))
    assert not Slo().is_met(outcome(None, error="refused"))


def test_a_summary_counts_what_became_of_all() -> None:
    found = summarize(
        "p", [outcome(100, 20, remote=True), outcome(300, 40, arrived_s=10), outcome(None, error="refused")], Slo(ttft_ms=100)
    )
    assert (found.requests, found.failed, found.seconds) == (3, 1, 20.0)
    assert (found.good_share, found.goodput_per_s) == (1 / 3, 1 / 20)
    assert found.failures == {"refused": 1}
    assert found.ttft_ms is not None and (found.ttft_ms.count, found.ttft_ms.p50) == (2, 200.0)
    assert found.itl_ms is not None and found.itl_ms.mean == 30.0
    assert found.queued_ms is None
    assert found.prediction_error is not None and found.prediction_error.max == 0.25
    assert (found.remote_share, found.prompt_tokens, found.cached_at_decode) == (1 / 3, 150, 30)


def test_failures_are_counted_by_what_clients_were_told_whatever_its_numbers() -> None:
    full = [outcome(None, error="rate_limit_exceeded", why=f"the queue is full: {n} waiting, {n},000 tokens in all") for n in (7, 12, 130)]
    found = summarize("p", [outcome(None, error="timeout"), *full, outcome(None, error="timeout", why="no end within 2.5 s")], Slo())
    assert list(found.failures.items()) == [("the queue is full: … waiting, … tokens in all", 3), ("timeout", 1), ("no end within … s", 1)]
