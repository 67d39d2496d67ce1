"""What waits for clients: tokens that the cluster has delivered, and that no stream has taken yet. Runs on the router's loop.

A stream takes all there is as long as its client reads. One that does not leaves its tokens here: up to a bound of its own, and one
of all together, since nobody knows how many such clients come. Beyond, its sequence is aborted, and what it left is dropped.
"""

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as ReadOnlySequence

import msgspec

from disaggd.errors import RequestError, TooSlow
from disaggd.gateway.backend import Delta
from disaggd.sampling import FinishReason, TokenLogprob


class UnreadLimits(msgspec.Struct, frozen=True):
    """In tokens; each of the likeliest tokens that a client wants to see counts as one more. One takes about 150 bytes."""

    stream: int
    together: int


class Unread:
    """The queues of all streams, and what waits in them."""

    def __init__(self, limits: UnreadLimits) -> None:
        self.num_tokens = 0
        self._limits = limits
        self._waiting: set[DeltaQueue] = set()
        """Those in which anything waits."""

    def came(self, queue: "DeltaQueue", num_tokens: int) -> None:
        """More waits in `queue`. Ends what must end for it: that stream, or whichever leaves most."""
        self.num_tokens += num_tokens
        self._waiting.add(queue)
        if queue.num_unread > self._limits.stream:
            queue.give_up(f"{queue.num_unread} tokens wait for its client, which reads too slowly")
        while self.num_tokens > self._limits.together:
            most = max(self._waiting, key=lambda one: one.num_unread)
            most.give_up(f"{most.num_unread} tokens wait for its client, more than for any other, and {self.num_tokens} in all")

    def gone(self, queue: "DeltaQueue") -> None:
        """Nothing waits there any more."""
        self.num_tokens -= queue.num_unread
        self._waiting.discard(queue)


class DeltaQueue:
    """A `Sink` that one coroutine reads: what the dispatcher delivers waits here until the client's stream takes it.

    `abort` is called with why, once and on a later turn of the loop, when too much waits. A list and a future: asyncio.Queue costs
    1.5 µs more per token, and gives them one by one.
    """

    def __init__(self, unread: Unread, abort: Callable[[str], None]) -> None:
        self.num_unread = 0
        """As `UnreadLimits` count."""
        self._unread = unread
        self._abort = abort
        self._loop = asyncio.get_running_loop()
        self._deltas: list[Delta] = []
        self._error: RequestError | None = None
        self._reader: asyncio.Future[None] | None = None

    def deliver(self, tokens: ReadOnlySequence[int], logprobs: ReadOnlySequence[TokenLogprob] | None, finish: FinishReason | None) -> None:
        if self._error is not None:
            return None  # given up a moment ago
        self._deltas.append(Delta(tuple(tokens), None if logprobs is None else tuple(logprobs), finish))
        if self._reader is not None:
            return self._wake()
        num_tokens = len(tokens) + (sum(len(one.top) for one in logprobs) if logprobs else 0)
        self.num_unread += num_tokens
        return self._unread.came(self, num_tokens)

    def fail(self, error: RequestError) -> None:
        self._error = self._error or error
        self._wake()

    def give_up(self, why: str) -> None:
        """Drop what waits, and end the sequence; the reader is told if it ever comes."""
        self.close()
        self.fail(TooSlow(why, code="client_too_slow"))
        self._loop.call_soon(self._abort, why)

    def close(self) -> None:
        """Nobody reads here any more."""
        self._unread.gone(self)
        self.num_unread, self._deltas = 0, []

    async def take(self) -> list[Delta]:
        """All that wait, at least one. When nothing does any more, raises the RequestError that ended the sequence."""
        if not self._deltas and self._error is None:
            self._reader = self._loop.create_future()
            await self._reader
            self._reader = None
        if not self._deltas:
            assert self._error is not None
            raise self._error
        deltas = self._deltas
        self.close()
        return deltas

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
