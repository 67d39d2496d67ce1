"""`Cadence`: how long the transfer thread sleeps between two turns. Pure, knows no NIXL.

NIXL offers nothing to wait on: calling it is what moves bytes, on both sides. Sleeping 50 to 200 µs moves 256 MiB three to
five times faster than spinning on a two-core host; an idle node that sleeps 2 ms spends 3.7 % of a core, one that sleeps 10 ms 1.4 %.
"""

from collections.abc import Callable

BUSY_S = 50e-6
IN_FLIGHT_MAX_S = 200e-6
EXPECTING_MAX_S = 1e-3
IDLE_MAX_S = 10e-3
"""Nothing is awaited then but probes: commands wake the thread, and a grant shortens its sleep."""
LINGER_S = 2e-3
BACKOFF = 1.5


class Cadence:
    """`BUSY_S` while things happen; after `LINGER_S` without, longer and longer, up to what the situation allows."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._stirred_at = clock()
        self._sleep_s = BUSY_S

    def sleep_s(self, *, stirred: bool, in_flight: bool, expecting: bool) -> float:
        """Seconds until the next turn.

        `stirred`: this turn brought something. `in_flight`: our own writes are under way or wait for their data, or one of
        the grants has begun to land. `expecting`: grants are out.
        """
        now = self._clock()
        if stirred:
            self._stirred_at, self._sleep_s = now, BUSY_S
        elif now - self._stirred_at >= LINGER_S:
            limit = IN_FLIGHT_MAX_S if in_flight else EXPECTING_MAX_S if expecting else IDLE_MAX_S
            self._sleep_s = min(self._sleep_s * BACKOFF, limit)
        return self._sleep_s
