"""What a soak says of memory and latencies is what the readings and the clients say."""

import math

import pytest

from tests.chaos.ledger import Outcome
from tests.chaos.schedule import Ask
from tests.chaos.soak import Slope, SoakReport, markdown, p99, slope, window
from tests.chaos.watch import Reading


def readings(*sizes: int) -> list[Reading]:
    """A minute apart."""
    return [Reading(at_s=60.0 * i, node="d0", pid=7, fds=40 + i % 2, threads=9, rss_bytes=size) for i, size in enumerate(sizes)]


def test_a_slope_is_that_of_a_straight_line_through_all_readings() -> None:
    rising = slope(readings(*(1000 + 10 * i for i in range(20))))
    assert rising.rss_bytes_per_hour == pytest.approx(600.0)
    assert (rising.rss_bytes, rising.fds, rising.threads) == ((1000, 1190), (40, 41), (9, 9))
    assert slope(readings(*([1000] * 20))).rss_bytes_per_hour == 0.0
    assert abs(slope(readings(*([1000, 1010] * 10))).rss_bytes_per_hour) < 60.0


def outcome(began_s: float, *event_s: float, stream: bool = True) -> Outcome:
    ask = Ask(index=0, case=0, salt="", stream=stream, logprobs=True, route=None, manner="read", after=0, wait_s=0.0)
    return Outcome(ask=ask, began_s=began_s, ended_s=event_s[-1], end="complete", event_s=list(event_s))


def test_a_window_tells_of_first_tokens_and_of_gaps_between_the_others() -> None:
    streams = [outcome(float(i), i + 0.2, i + 0.25, i + 0.3) for i in range(200)]
    seen = window([*streams, outcome(0.0, 60.0, stream=False)])
    assert seen.requests == 201
    assert seen.ttft_ms == pytest.approx(200.0) and seen.itl_ms == pytest.approx(50.0)


def test_a_99th_percentile_is_not_swayed_by_what_is_rarer() -> None:
    assert p99([1.0] * 199 + [9.0]) == 1.0
    assert p99([1.0] * 95 + [9.0] * 5) == 9.0
    assert math.isnan(p99([1.0]))


def test_the_table_shows_begin_and_end() -> None:
    window_ = window([outcome(float(i), i + 0.2, i + 0.25) for i in range(9)])
    report = SoakReport(
        seed=5,
        began="2026-11-26 12:00",
        machine="2 × a processor",
        minutes=30.0,
        load=0.8,
        capacity_per_s=5.0,
        rate_per_s=4.0,
        requests=7200,
        findings=[],
        windows=(window_, window_),
        slopes=[Slope(node="d0", rss_bytes=(500 << 20, 501 << 20), rss_bytes_per_hour=2.0 * 2**20, fds=(40, 41), threads=(9, 9))],
    )
    assert "| 4.00 requests/s, 80% of the 5.00 that 16 clients get |" in markdown(report)
    assert "| d0 | 500 → 501 | +2.0 | 40 to 41 | 9 to 9 |" in markdown(report)
