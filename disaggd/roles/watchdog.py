"""`Watchdog`: finds out when a thread of an engine node is stuck in a kernel, or in a call of NIXL. Runs on the asyncio thread.

Links answer heartbeats whatever the other threads do, so no router notices by itself. Counts looks and reads no clock: a process that
was stopped for a minute accuses nobody.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Never

from disaggd.pulse import Pulse

LOOK_EVERY_S = 1.0
SLOW_S = 10.0
"""A thread that has not got on for so long is told of."""


class Watchdog:
    """`slow` is told a thread and for how many seconds it has not got on, at each look; once 0, when it does again. `stuck`: it has
    been so for `stuck_s`."""

    def __init__(
        self, pulses: Mapping[str, Pulse], stuck_s: float, slow: Callable[[str, float], None], stuck: Callable[[str], None]
    ) -> None:
        self._pulses = pulses
        self._stuck_s = stuck_s
        self._slow = slow
        self._stuck = stuck
        self._seen = {name: (pulse.count, 0.0) for name, pulse in pulses.items()}
        """The count at the last look, and for how many seconds it had been that."""

    async def run(self) -> Never:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self.look()

    def look(self) -> None:
        for name, pulse in self._pulses.items():
            count, (seen, before_s) = pulse.count, self._seen[name]
            silent_s = 0.0 if pulse.is_resting or count != seen else before_s + LOOK_EVERY_S
            self._seen[name] = count, silent_s
            if silent_s >= SLOW_S or (before_s >= SLOW_S and not silent_s):
                self._slow(name, silent_s)
            if silent_s >= self._stuck_s:
                self._stuck(name)
