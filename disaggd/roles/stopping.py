"""SIGTERM and SIGINT of one node: the first asks it to drain, any later one ends it at once. Runs on the asyncio thread."""

import asyncio
import signal
from collections.abc import Callable

from disaggd.errors import EXIT_INTERRUPTED


class StopSignals:
    """Takes both signals from `catch` on. `drain` is called for the first of them, `end` for each later one."""

    def __init__(self, drain: Callable[[], None], end: Callable[[], None]) -> None:
        self.exit_code = 0
        """What the process should end with: a service manager that stops it finds nothing amiss, whoever interrupts it sees that."""
        self._drain = drain
        self._end = end
        self._has_come = False

    def catch(self, loop: asyncio.AbstractEventLoop) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._received, number)

    def raise_interrupt(self) -> None:
        """At the end: KeyboardInterrupt, if one of them was SIGINT."""
        if self.exit_code == EXIT_INTERRUPTED:
            raise KeyboardInterrupt

    def _received(self, number: signal.Signals) -> None:
        if number is signal.SIGINT:
            self.exit_code = EXIT_INTERRUPTED
        if self._has_come:
            return self._end()
        self._has_come = True
        return self._drain()
