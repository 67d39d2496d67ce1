"""Threads that do not get on: told of, and in the end fatal; a thread that rests, or is seen to move, is left alone."""

from typing import Any

import pytest

from disaggd.pulse import Pulse
from disaggd.roles.watchdog import LOOK_EVERY_S, SLOW_S, Watchdog
from disaggd.transfer.messages import TransferCommand
from disaggd.transfer.thread import TransferThread

STUCK_S = 15.0


class Kennel:
    """A watchdog over one thread. `told`: (seconds) of each call; `ended`: of the last one."""

    def __init__(self) -> None:
        self.pulse = Pulse()
        self.told: list[float] = []
        self.ended: list[str] = []
        self.dog = Watchdog({"compute": self.pulse}, STUCK_S, lambda _, seconds: self.told.append(seconds), self.ended.append)

    def look(self, seconds: float) -> None:
        for _ in range(round(seconds / LOOK_EVERY_S)):
            self.dog.look()


def test_a_thread_that_hangs_is_told_of_and_then_ends_its_node() -> None:
    kennel = Kennel()
    kennel.pulse.beat()
    kennel.look(SLOW_S)
    assert kennel.told == []
    kennel.look(STUCK_S - SLOW_S)
    assert kennel.told == [10.0, 11.0, 12.0, 13.0, 14.0] and not kennel.ended
    kennel.look(LOOK_EVERY_S)
    assert kennel.ended == ["compute"]


def test_one_that_gets_on_again_is_told_of_once_more() -> None:
    kennel = Kennel()
    kennel.pulse.beat()
    kennel.look(SLOW_S + 2)
    kennel.pulse.beat()
    kennel.look(3)
    assert kennel.told == [10.0, 11.0, 0.0]


@pytest.mark.parametrize("how", ["it waits for work", "it beats", "it beats and waits"])
def test_a_thread_that_waits_or_works_is_left_alone(how: str) -> None:
    kennel = Kennel()
    kennel.pulse.beat()
    for _ in range(100):
        if "beats" in how:
            kennel.pulse.beat()
        if "waits" in how:
            kennel.pulse.rest()
        kennel.dog.look()
    assert not kennel.told and not kennel.ended


def test_the_transfer_thread_rests_only_while_it_waits_for_a_command() -> None:
    """`NIXL` hangs in some call of a turn: then the pulse stands still at work."""
    thread: Any = object.__new__(TransferThread)
    thread.pulse, resting = Pulse(), []

    class Inbox:
        def take(self, timeout_s: float | None) -> list[TransferCommand]:
            resting.append(thread.pulse.is_resting)
            return []

    thread._inbox = Inbox()
    thread.pulse.beat()
    assert thread._take(0.1) == []
    assert (resting, thread.pulse.is_resting, thread.pulse.count) == ([True], False, 2)
