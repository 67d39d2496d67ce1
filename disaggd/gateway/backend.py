"""The cluster as the gateway sees it: token ids in, token ids out. The router role implements `Backend`.

Everything here is called on the asyncio thread. Knows nothing of HTTP, of text or of nodes.
"""

from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Literal, Protocol

import msgspec

from disaggd.observe.receipts import Receipt
from disaggd.sampling import FinishReason, SamplingParams, TokenLogprob

Policy = Literal["auto", "local", "remote"]
"""Where to prefill: the cluster decides, or one request's `x-disaggd-policy` header does."""


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to be generated."""

    id: str
    """What `GET /v1/requests/{id}` asks for. A client may reuse its own: the latest receipt of each key wins."""
    tokens: list[int]
    """The prompt: at least one token, all of them within the vocabulary; never changed."""
    sampling: SamplingParams
    """`seed` is drawn and `max_tokens` fits the model's context."""
    policy: Policy
    cache_salt: str = ""
    """Cached prefixes are shared only between requests of the same salt."""
    priority: int = 0
    """Smaller goes first where requests wait."""
    session: str | None = None
    """Requests of one session stay on one node when that costs nothing."""
    key: str | None = None
    """The name of the API key that asked; None where there are none."""


class Delta(msgspec.Struct, frozen=True, gc=False):
    """New tokens of a sequence, in order. A token that stopped the sequence is the last of the last Delta."""

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One for each token when the request asked for logprobs, else None."""
    finish_reason: FinishReason | None = None
    """Set on the last Delta, and only there."""


Deltas = Sequence[Delta]
"""All that has come of a sequence since the last ones were taken; never empty."""


class Backend(Protocol):
    """What the gateway asks of a cluster."""

    @property
    def model_name(self) -> str:
        """The one model served, as clients spell it."""

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output together."""

    @property
    def vocab_size(self) -> int:
        """Token ids lie in [0, vocab_size)."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Deltas, None]:
        """Yield the sequence's tokens as they come; the last Delta has a `finish_reason`.

        Whoever falls behind finds several Deltas at a time, and catches up by it.

        Raises RequestError, before the first Delta or after any. Closing the generator, or cancelling the task that
        waits for it, aborts the sequence; neither waits for the cluster.
        """

    def stopped(self, request: GenerationRequest) -> None:
        """A stop string ended the text: the receipt shall say `stop`. Called just before the generator is closed."""

    def cut(self, request: GenerationRequest, why: str) -> None:
        """Its client was cut: the sequence ends, and the receipt shall say why. Called before the generator is closed."""

    def why_not_ready(self) -> str | None:
        """Why a request sent now could not be served; None if it could."""

    async def blocks(self) -> dict[str, object]:
        """What `GET /v1/debug/blocks` shows: every block that a node holds because of another; plain JSON values.

        Asks the nodes, and waits a second at most; who does not answer by then is named.
        """

    async def check(self) -> dict[str, object]:
        """What `POST /v1/cluster/check` answers (`observe/checkup.py`): a pattern goes over every way of KV, and is compared; plain JSON
        values. Takes seconds; what nobody answers is waited for a quarter of a minute, and named.
        """

    def cluster(self) -> dict[str, object]:
        """What `GET /v1/cluster` shows: nodes, roles, load, links; plain JSON values."""

    def receipt(self, request_id: str, key: str | None) -> Receipt | None:
        """The receipt of a finished or running request of `key`, or of whoever's if that is None; if it is still remembered."""

    def receipts(self, limit: int, key: str | None) -> list[Receipt]:
        """Of the `limit` requests that came last, those that run among them: the last one first. Only those of `key`, unless None."""

    def trace(self, seconds: float | None) -> Iterator[bytes]:
        """What the cluster did in the last `seconds`, or as far back as it remembers: pieces of one JSON text, for a trace viewer."""
