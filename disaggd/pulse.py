"""`Pulse`: a sign of life that one thread gives and any other may look at."""


class Pulse:
    """Written by one thread: `beat` whenever it gets on, `rest` before it waits for something to do."""

    __slots__ = ("count", "is_resting")

    def __init__(self) -> None:
        self.count = 0
        self.is_resting = True

    def beat(self) -> None:
        self.count += 1
        self.is_resting = False

    def rest(self) -> None:
        self.is_resting = True
