"""Whether the decode nodes can hold one sequence more, by the KV that those under way are predicted to need. Runs on the router's loop.

A sequence is predicted to need its prompt, less what its decode node has cached, and as many tokens of output as sequences have had
lately, or its `max_tokens` if that is less. One that outgrows the prediction needs what it has. All together may need `overcommit`
times what the pools hold: what is over waits in the nodes. One more would wait behind that, and is better told so at once.
"""

from collections.abc import Iterable
from math import ceil

from disaggd.cluster.peers import DecodePeer
from disaggd.cluster.request import RoutedSequence
from disaggd.errors import Overloaded

_FIRST_GUESS_TOKENS = 256
"""Of output, before any sequence has ended."""
_FIRST_GUESS_S = 1.0
_WEIGHT = 1 / 32
"""Of the sequence that ended last, in what is thought typical."""
MAX_RETRY_S = 60


class Admission:
    """What every sequence under way is predicted to need of the decode nodes' memory, in tokens."""

    def __init__(self, overcommit: float) -> None:
        self.num_tokens = 0
        """Of all of them."""
        self._overcommit = overcommit
        self._typical_output = float(_FIRST_GUESS_TOKENS)
        self._typical_s = _FIRST_GUESS_S
        """From a sequence's arrival to its end."""

    def excess(self, record: RoutedSequence, num_cached: int, decodes: Iterable[DecodePeer]) -> float:
        """Tokens by which the sequence would be too much: none, if nothing else is under way."""
        allowed = self._overcommit * sum(peer.hello.num_blocks * peer.hello.kv.block_size for peer in decodes)
        return self.num_tokens + self._need(record, num_cached) - allowed if self.num_tokens else 0.0

    def refusal(self, excess: float) -> Overloaded:
        """When to come again: sequences go as fast as they come, and take so long each (Little's law)."""
        wait_s = self._typical_s * excess / self.num_tokens
        return Overloaded(
            f"the sequences under way are predicted to need {self.num_tokens} tokens of KV cache, {excess:.0f} too many for one more",
            retry_after_s=min(MAX_RETRY_S, max(1, ceil(wait_s))),
        )

    def placed(self, record: RoutedSequence, num_cached: int) -> None:
        """The sequence goes to a decode node that has so much of it cached; it may have been placed before."""
        self.left(record)
        record.uncached_tokens = record.num_tokens - len(record.sent) - num_cached
        self._count(record, self._need(record, num_cached))

    def grew(self, record: RoutedSequence) -> None:
        """It has been sent more tokens."""
        if record.uncached_tokens + len(record.sent) > record.kv_tokens:
            self._count(record, record.uncached_tokens + len(record.sent))

    def left(self, record: RoutedSequence) -> None:
        """It needs nothing any more."""
        self._count(record, 0)

    def finished(self, record: RoutedSequence, took_s: float) -> None:
        """It has ended of itself, and so is one to learn from."""
        self._typical_output += _WEIGHT * (len(record.sent) - self._typical_output)
        self._typical_s += _WEIGHT * (took_s - self._typical_s)

    def _need(self, record: RoutedSequence, num_cached: int) -> int:
        expected = max(len(record.sent), min(record.request.sampling.max_tokens, ceil(self._typical_output)))
        return max(0, len(record.request.prompt) - num_cached) + expected

    def _count(self, record: RoutedSequence, num_tokens: int) -> None:
        self.num_tokens += num_tokens - record.kv_tokens
        record.kv_tokens = num_tokens
