"""The clock that leases run on, at both of their ends."""

import time


def lease_clock() -> float:
    """Seconds since the machine started, those included in which it slept.

    `time.monotonic` stands still while the machine is suspended: a writer would wake up with a lease that its target has long given up.
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME)
