"""Admission by predicted KV, in virtual time: it costs nothing where all fits, and saves what can be saved where it does not."""

import random

import pytest

from disaggd.config import Config
from disaggd.simulator.summary import Outcome, Slo, outcome_of
from disaggd.simulator.traces import Lengths
from tests.support.simulations import replay, small_setup

SLO = Slo(ttft_ms=500.0)
NUM_REQUESTS = 300
FITS_PER_S = 15.0
TOO_MANY_PER_S = 100.0
"""The node holds six to ten sequences, of about 0.2 s each."""


def outcomes(rate_per_s: float, kv_overcommit: float) -> list[Outcome]:
    draw, now, rows = random.Random(5), 0.0, []
    for _ in range(NUM_REQUESTS):
        now += draw.expovariate(rate_per_s)
        rows.append(Lengths(arrival_s=now, num_input=draw.randrange(10, 30), num_output=draw.randrange(4, 30)))
    clients, _ = replay(small_setup("never", kv_overcommit=kv_overcommit), rows)
    return [outcome_of(client, clients[0].arrived_at) for client in clients]


def num_good(found: list[Outcome]) -> int:
    return sum(SLO.is_met(one) for one in found)


def num_refused(found: list[Outcome]) -> int:
    return sum(one.error is not None for one in found)


@pytest.fixture(scope="module")
def overcommit() -> float:
    return Config().router.kv_overcommit


def test_what_fits_is_never_refused(overcommit: float) -> None:
    found = outcomes(FITS_PER_S, overcommit)
    assert (num_refused(found), num_good(found)) == (0, NUM_REQUESTS)


def test_under_overload_those_who_are_taken_are_served_in_time(overcommit: float) -> None:
    everyone, chosen = outcomes(TOO_MANY_PER_S, 1000.0), outcomes(TOO_MANY_PER_S, overcommit)
    assert num_refused(everyone) == 0
    assert num_good(chosen) > 2 * num_good(everyone)
    taken = [one for one in chosen if one.error is None]
    assert num_good(chosen) > 0.9 * len(taken)
