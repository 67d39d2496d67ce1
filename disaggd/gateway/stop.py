"""Stop strings, found across token boundaries. One StopStrings belongs to one sequence. Knows nothing of tokens."""


class StopStrings:
    """Cuts the text before the stop string that is completed first; holds back text that may yet become part of one.

    What comes out does not depend on how the text was divided into `feed`s.
    """

    __slots__ = ("_held", "_stops")

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """The text that may be shown now, and whether a stop string ended it: then nothing more may be fed."""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at = min(found)
            return text[:at], True
        shown = len(text) - self._open_length(text)
        self._held = text[shown:]
        return text[:shown], False

    def flush(self) -> str:
        """Nothing more comes: the text held back was not part of a stop string after all."""
        text, self._held = self._held, ""
        return text

    def _open_length(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        return max(_overlap(text, stop) for stop in self._stops)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
