"""One sequence as its client sees it: Deltas of tokens in, text out. Runs on the asyncio thread.

Knows nothing of HTTP or JSON.
"""

from collections.abc import Sequence

import msgspec

from disaggd.errors import RequestFailed
from disaggd.gateway.backend import Delta, Deltas
from disaggd.gateway.detokenizer import Detokenizer
from disaggd.gateway.stop import StopStrings
from disaggd.sampling import FinishReason, TokenLogprob


class LoggedToken(msgspec.Struct, frozen=True):
    """A token whose probability the client asked for."""

    token: int
    logprob: TokenLogprob
    offset: int
    """Characters of output before it."""


class Said(msgspec.Struct, frozen=True, gc=False):
    """What one Delta adds to a choice."""

    text: str
    """"" while a character is open, or may begin a stop string."""
    logged: tuple[LoggedToken, ...] | None
    finish_reason: FinishReason | None


class Choice:
    """The state between Deltas: an open character, a possible stop string, the count of tokens."""

    __slots__ = ("_detokenizer", "_num_chars", "_stop", "index", "num_tokens", "stopped")

    def __init__(self, index: int, detokenizer: Detokenizer, stop: tuple[str, ...]) -> None:
        self.index = index
        self.num_tokens = 0
        self.stopped = False
        """A stop string ended the text: the cluster would go on."""
        self._detokenizer = detokenizer
        self._stop = StopStrings(stop) if stop else None
        self._num_chars = 0

    def hear(self, deltas: Deltas) -> list[Said]:
        """What each lets be shown now; nothing of those after a stop string."""
        said: list[Said] = []
        for delta in deltas:
            said.append(self._hear(delta))
            if self.stopped:
                break
        return said

    def _hear(self, delta: Delta) -> Said:
        """The token that stopped a sequence counts, but is no text."""
        self.num_tokens += len(delta.tokens)
        finish = delta.finish_reason
        if finish is None and delta.logprobs is None and self._stop is None:
            return Said(self._detokenizer.feed(delta.tokens), None, None)
        if finish in ("abort", "error"):
            raise RequestFailed(f"the cluster gave the sequence up: {finish}")
        spoken = delta.tokens[:-1] if finish == "stop" else delta.tokens
        text, logged = (self._detokenizer.feed(spoken), None) if delta.logprobs is None else self._log(delta, len(spoken))
        if finish is not None:
            text += self._detokenizer.flush()
        if self._stop is not None:
            text, finish = self._cut(self._stop, text, finish)
        return Said(text, logged, finish)

    def _log(self, delta: Delta, num_spoken: int) -> tuple[str, tuple[LoggedToken, ...]]:
        """Feeds one token at a time, to know where in the text each begins."""
        assert delta.logprobs is not None
        texts: list[str] = []
        logged: list[LoggedToken] = []
        for i, (token, logprob) in enumerate(zip(delta.tokens, delta.logprobs, strict=True)):
            logged.append(LoggedToken(token, logprob, self._num_chars))
            if i < num_spoken:
                texts.append(self._detokenizer.feed((token,)))
                self._num_chars += len(texts[-1])
        return "".join(texts), tuple(logged)

    def _cut(self, stop: StopStrings, text: str, finish: FinishReason | None) -> tuple[str, FinishReason | None]:
        text, self.stopped = stop.feed(text)
        if self.stopped:
            return text, "stop"
        return (text, None) if finish is None else (text + stop.flush(), finish)


class Transcript:
    """All that each choice said, for a whole reply."""

    def __init__(self, num_choices: int) -> None:
        self._said: list[list[Said]] = [[] for _ in range(num_choices)]

    async def add(self, index: int, said: Sequence[Said]) -> None:
        self._said[index].extend(said)

    def whole(self) -> Sequence[Said]:
        """One Said for each choice."""
        return [_joined(said) for said in self._said]


def _joined(said: list[Said]) -> Said:
    asked = any(one.logged is not None for one in said)
    logged = tuple(token for one in said for token in one.logged or ())
    return Said("".join(one.text for one in said), logged if asked else None, said[-1].finish_reason)
