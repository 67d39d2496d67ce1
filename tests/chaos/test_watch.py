"""What grows at rest is found, and what only varies is not."""

import os
import threading

import pytest

from tests.chaos.watch import Reading, growths, read


def life(pid: int = 7, **series: list[int]) -> list[Reading]:
    """One reading for each value; what is not told stays."""
    count = max(len(values) for values in series.values())
    steady = {"fds": [40] * count, "threads": [9] * count, "rss_bytes": [500 << 20] * count}
    columns = {**steady, **series}
    return [Reading(at_s=float(i), node="d0", pid=pid, **{name: values[i] for name, values in columns.items()}) for i in range(count)]


RISING = {"fds": list(range(40, 60)), "threads": list(range(9, 29)), "rss_bytes": [(500 + 10 * i) << 20 for i in range(20)]}


@pytest.mark.parametrize("what", sorted(RISING))
def test_what_rises_from_rest_to_rest_is_found(what: str) -> None:
    (growth,) = growths(life(7, **{what: RISING[what]}))
    assert growth.excess is not None and "d0" in growth.excess


def test_what_varies_is_not_growth() -> None:
    (growth,) = growths(life(fds=[40, 44, 41, 43] * 5, rss_bytes=[(500 + i % 7) << 20 for i in range(20)]))
    assert growth.excess is None


def test_the_first_reading_is_a_cold_one() -> None:
    (growth,) = growths(life(rss_bytes=[100 << 20] + [500 << 20] * 19))
    assert growth.excess is None and growth.rss_bytes[0] == 500 << 20


def test_each_process_is_looked_at_by_itself() -> None:
    """A node that was restarted is another one."""
    found = growths([*life(pid=7, fds=[40] * 9), *life(pid=8, fds=[60] * 12)])
    assert [(growth.pid, growth.readings, growth.excess) for growth in found] == [(8, 11, None), (7, 8, None)]


def test_reads_a_process_that_runs() -> None:
    before = read("me", os.getpid(), 0.0)
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    read_end, write_end = os.pipe()
    after = read("me", os.getpid(), 1.0)
    os.close(read_end)
    os.close(write_end)
    done.set()
    thread.join()
    assert (after.fds - before.fds, after.threads - before.threads) == (2, 1)
    assert after.rss_bytes > 2**20
