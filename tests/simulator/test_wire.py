import pytest

from disaggd.simulator.wire import Rate, Wire


def test_bytes_leave_one_after_another_and_arrive_later() -> None:
    wire = Wire([Rate(0.0, 100.0)], latency_s=0.25)
    assert (wire.send(200, now=1.0), wire.send(100, now=1.5), wire.send(100, now=10.0)) == (3.0, 4.0, 11.0)
    assert wire.arrival(3.0) == 3.25


def test_what_has_no_bytes_leaves_behind_those_before_it() -> None:
    wire = Wire([Rate(0.0, 100.0)], latency_s=0.0)
    assert (wire.send(200, now=0.0), wire.send(0, now=0.5)) == (2.0, 2.0)


@pytest.mark.parametrize(("num_bytes", "end"), [(100, 1.0), (200, 2.0), (250, 7.0), (400, 16.0)])
def test_a_transfer_goes_through_changes_of_the_rate(num_bytes: int, end: float) -> None:
    """200 bytes by second 2, 80 more by 10, then 20 a second."""
    wire = Wire([Rate(0.0, 100.0), Rate(2.0, 10.0), Rate(10.0, 20.0)], latency_s=0.0)
    assert wire.send(num_bytes, now=0.0) == end


def test_a_transfer_that_begins_after_a_change_has_the_new_rate() -> None:
    wire = Wire([Rate(0.0, 100.0), Rate(2.0, 10.0)], latency_s=0.0)
    assert wire.send(10, now=5.0) == 6.0
