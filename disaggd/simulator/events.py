"""`EventLoop`: virtual time. What is due earliest happens next; of what is due at once, what was asked for first."""

import heapq
from collections.abc import Callable
from itertools import count

Action = Callable[[], None]


class EventLoop:
    """Actions by the second at which they happen. Nothing else moves `now`."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = count()
        self._due: list[tuple[float, int, Action]] = []

    def at(self, time: float, action: Action) -> None:
        """Have `action` happen at `time`, which has not passed."""
        assert time >= self.now, f"{time} has passed: it is {self.now}"
        heapq.heappush(self._due, (time, next(self._order), action))

    def after(self, seconds: float, action: Action) -> None:
        self.at(self.now + seconds, action)

    def run(self) -> None:
        """Until nothing is due any more."""
        while self._due:
            self.now, _, action = heapq.heappop(self._due)
            action()
