"""What goes wrong again and again, and is logged once. Knows nothing of what it is."""

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable

_MAX_REMEMBERED = 1000
"""Addresses and causes of refusals; then the oldest is told anew."""


class Repeated:
    """Logs a trouble that repeats itself once, and again when it changes."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._last: str | None = None

    def log(self, level: int, message: str, fault: BaseException | None = None) -> None:
        """With the traceback of `fault`."""
        if message != self._last:
            self._log.log(level, "%s", message, exc_info=fault)
        self._last = message

    def forget(self) -> None:
        self._last = None


class Refusals:
    """Counts who was refused, by cause, and logs each cause once for each address.

    `on_refused` is told the cause, and how often that was one so far.
    """

    def __init__(self, log: logging.Logger, on_refused: Callable[[str, int], None]) -> None:
        self._log = log
        self._on_refused = on_refused
        self._totals = Counter[str]()
        self._told: OrderedDict[tuple[str, str], None] = OrderedDict()

    def note(self, cause: str, address: str, message: str) -> None:
        if (cause, address) not in self._told:
            self._log.warning("%s", message)
            self._told[cause, address] = None
        if len(self._told) > _MAX_REMEMBERED:
            self._told.popitem(last=False)
        self.count(cause)

    def count(self, cause: str) -> None:
        """What has been logged already."""
        self._totals[cause] += 1
        self._on_refused(cause, self._totals[cause])
