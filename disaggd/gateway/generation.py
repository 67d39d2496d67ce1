"""Runs the sequences of one HTTP request, all at once, and passes on what they say. Knows nothing of HTTP or JSON."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing

import msgspec

from disaggd.errors import RequestFailed
from disaggd.gateway.backend import Backend, GenerationRequest
from disaggd.gateway.choice import Choice, Said
from disaggd.observe.metrics import Metrics
from disaggd.observe.receipts import Receipt


class Usage(msgspec.Struct, frozen=True):
    """Tokens in and out of all choices, and how many of the prompts' were cached (None: not known)."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None


Listener = Callable[[int, Sequence[Said]], Awaitable[None]]
"""Told the choice's index and what some Deltas said, one after another."""


class Generation:
    """The sequences of one HTTP request: a GenerationRequest and a Choice for each prompt."""

    def __init__(self, backend: Backend, metrics: Metrics, arrived_s: float, pairs: Sequence[tuple[GenerationRequest, Choice]]) -> None:
        self._backend = backend
        self._metrics = metrics
        self._arrived_s = arrived_s
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def receipts(self) -> list[Receipt]:
        """Those that the cluster has, in the order of the choices."""
        found = (self._backend.receipt(request.id, request.key) for request, _ in self._pairs)
        return [receipt for receipt in found if receipt is not None]

    def num_tokens(self) -> tuple[int, int]:
        """Of all prompts, and of all output so far."""
        return sum(len(request.tokens) for request, _ in self._pairs), sum(choice.num_tokens for _, choice in self._pairs)

    def usage(self) -> Usage:
        """What was used so far."""
        receipts = self.receipts()
        prompt_tokens, completion_tokens = self.num_tokens()
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            cached_tokens=sum(receipt.num_cached for receipt in receipts) if receipts else None,
        )

    def cut(self, why: str) -> None:
        """Their client was cut: what becomes of the reply is of no interest."""
        for request, _ in self._pairs:
            self._backend.cut(request, why)

    async def run(self, listener: Listener) -> None:
        """Until every choice has ended. The first RequestError of any ends all; cancelling aborts all."""
        try:
            async with asyncio.TaskGroup() as group:
                for request, choice in self._pairs:
                    group.create_task(self._run_one(request, choice, listener))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        self._metrics.observe_request(time.perf_counter() - self._arrived_s)

    async def _run_one(self, request: GenerationRequest, choice: Choice, listener: Listener) -> None:
        observe, since_s = self._metrics.observe_first_token, self._arrived_s
        finish = None
        async with aclosing(self._backend.generate(request)) as batches:
            async for deltas in batches:
                said = choice.hear(deltas)
                await listener(choice.index, said)
                now_s = time.perf_counter()
                observe(now_s - since_s)
                observe, since_s = self._metrics.observe_inter_token, now_s
                finish = said[-1].finish_reason
                if choice.stopped:
                    self._backend.stopped(request)
                    return
        if finish is None:
            raise RequestFailed("the cluster ended the sequence without a reason")
