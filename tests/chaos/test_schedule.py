"""A seed is a whole run: the same faults, the same requests; and no kind of fault is forgotten."""

from collections import Counter
from itertools import islice

from tests.chaos.schedule import DEADLY, DECK, HANGS, MORTAL, NODES, QUICK, STANDARD, WIRE, Cell, asks, faults


def test_a_seed_gives_the_same_faults_and_requests_again_and_another_gives_others() -> None:
    assert faults(7, 200, QUICK) == faults(7, 200, QUICK)
    assert faults(7, 200, QUICK) != faults(8, 200, QUICK)
    assert list(islice(asks(7, 3.0), 200)) == list(islice(asks(7, 3.0), 200))
    assert list(islice(asks(7, 3.0), 200)) != list(islice(asks(8, 3.0), 200))


def test_a_longer_run_begins_as_a_shorter_one_does() -> None:
    assert faults(7, 200, QUICK)[:50] == faults(7, 50, QUICK)


def test_every_deck_has_every_cell_once() -> None:
    dealt = [Cell(fault.part, fault.kind) for fault in faults(3, 4 * (len(DECK) + 1), QUICK) if fault.kind != "hang"]
    for first in range(0, 4 * len(DECK), len(DECK)):
        assert Counter(dealt[first : first + len(DECK)]) == Counter(DECK)


def test_a_long_run_hangs_a_node_of_each_role_for_the_whole_time() -> None:
    hangs = [fault for fault in faults(3, 500, STANDARD) if fault.kind == "hang"]
    assert {Cell(fault.part, fault.kind) for fault in hangs} == set(HANGS)
    assert {fault.hold_s for fault in hangs} == {60.0}


def test_some_nodes_are_never_killed() -> None:
    killed = {fault.victim for fault in faults(3, 500, QUICK) if fault.kind in DEADLY}
    assert killed == {name for names in MORTAL.values() for name in names}
    assert set(NODES["prefill"]) - killed and set(NODES["decode"]) - killed


def test_a_blink_is_too_short_to_be_given_up_for_and_a_freeze_is_not() -> None:
    dealt = faults(3, 300, STANDARD)
    assert max(fault.hold_s for fault in dealt if fault.kind == "blink") < STANDARD.loss_s
    assert min(fault.hold_s for fault in dealt if fault.kind in ("freeze", "stall", "silent")) > STANDARD.loss_s


def test_without_a_wire_of_our_own_none_is_harmed() -> None:
    assert WIRE in {fault.victim for fault in faults(3, 100, QUICK)}
    assert WIRE not in {fault.victim for fault in faults(3, 100, QUICK, has_wire=False)}


def test_requests_come_at_the_rate_that_was_asked_for() -> None:
    waits = [ask.wait_s for ask in islice(asks(1, 4.0), 4000)]
    assert 0.23 < sum(waits) / len(waits) < 0.27
