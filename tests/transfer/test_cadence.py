"""How long the transfer thread sleeps, on a scripted clock."""

import pytest

from disaggd.transfer.cadence import BUSY_S, EXPECTING_MAX_S, IDLE_MAX_S, IN_FLIGHT_MAX_S, LINGER_S, Cadence


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def sleeps(clock: Clock, cadence: Cadence, turns: int, *, in_flight: bool = False, expecting: bool = False) -> list[float]:
    """The sleeps of that many turns in which nothing happens."""
    taken = []
    for _ in range(turns):
        taken.append(cadence.sleep_s(stirred=False, in_flight=in_flight, expecting=expecting))
        clock.now += taken[-1]
    return taken


@pytest.mark.parametrize(
    ("in_flight", "expecting", "limit"),
    [(True, True, IN_FLIGHT_MAX_S), (False, True, EXPECTING_MAX_S), (False, False, IDLE_MAX_S)],
)
def test_backs_off_to_what_the_situation_allows(in_flight: bool, expecting: bool, limit: float) -> None:
    clock = Clock()
    taken = sleeps(clock, Cadence(clock), 200, in_flight=in_flight, expecting=expecting)
    assert taken == sorted(taken)
    assert taken[-1] == limit


def test_stays_busy_while_it_lingers() -> None:
    clock = Clock()
    taken = sleeps(clock, Cadence(clock), int(LINGER_S / BUSY_S))
    assert set(taken) == {BUSY_S}


def test_anything_that_happens_makes_it_busy_again() -> None:
    clock = Clock()
    cadence = Cadence(clock)
    sleeps(clock, cadence, 200)
    assert cadence.sleep_s(stirred=True, in_flight=False, expecting=False) == BUSY_S


def test_a_grant_going_out_shortens_a_long_sleep() -> None:
    clock = Clock()
    cadence = Cadence(clock)
    sleeps(clock, cadence, 200)
    assert cadence.sleep_s(stirred=False, in_flight=False, expecting=True) == EXPECTING_MAX_S
