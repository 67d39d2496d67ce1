"""What happened to each request: the decision, the nodes, the bytes, the spans. Runs on the router's asyncio thread.

Knows nothing of HTTP or of the cluster's frames: the router role fills receipts in, the gateway shows them.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Literal

import msgspec

from disaggd.sampling import FinishReason

Decision = Literal["local", "remote"]
Policy = Literal["auto", "local", "remote"]
SpanName = Literal["decide", "queue", "grant", "prefix_push", "prefill_wait", "prefill", "transfer", "decode"]


class CachedTokens(msgspec.Struct, frozen=True):
    """Prompt tokens that were in a prefix cache, on either side."""

    decode: int = 0
    prefill: int = 0


class Spans(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds; None for what did not happen (or has not yet)."""

    queue: float | None = None
    """In the prefill queue, the grant included."""
    grant: float | None = None
    """The end of `queue`: a prefill node had credit, and the decode node was asked for blocks."""
    prefill_wait: float | None = None
    """In the engine that prefilled, before its first step."""
    prefill: float | None = None
    """Computing the prompt, on the clock of the node that did."""
    transfer: float | None = None
    """From the first handle posted to the last one done, on the prefill node's clock."""
    transfer_exposed: float | None = None
    """The part of `transfer` after the first token was reported: what the client waits for before the second."""
    first_token: float | None = None
    """From the request's arrival to its first token."""
    decode: float | None = None
    """From the first token to the last."""
    total: float | None = None


class PrefillClock(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds on the prefill node's own clock, since it took the job: which of the two came first."""

    first_token_reported: float | None = None
    last_handle_done: float | None = None


class Predicted(msgspec.Struct, frozen=True, kw_only=True):
    """What the decode node expected of both ways when it decided, in milliseconds; None where it could not tell."""

    local_ttft_ms: float | None = None
    remote_ttft_ms: float | None = None
    local_damage_ms: float | None = None
    """What a prefill at decode would have cost the sequences that run there, together."""
    breakeven_tokens: int | None = None
    """From so many uncached tokens on a prompt would have cost less elsewhere."""

    def ttft_ms(self, decision: Decision) -> float | None:
        """Of the way that was taken."""
        return self.local_ttft_ms if decision == "local" else self.remote_ttft_ms


class Span(msgspec.Struct, frozen=True):
    """Who did what for a request, and when: milliseconds since it arrived, on the router's clock.

    What a node measured on its own clock is counted back from the frame that reported it.
    """

    name: SpanName
    node: str | None
    """None where the router itself is what was waited for."""
    start_ms: float
    end_ms: float | None = None
    """None while it lasts."""


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One placement of a request; another follows when a node that worked on it is lost or fails."""

    decision: Decision | None = None
    """None until the decode node has decided."""
    reason: str | None = None
    predicted: Predicted | None = None
    prefill_node: str | None = None
    """None when the decode node prefilled."""
    decode_node: str | None = None
    """None while no decode node is up."""
    queue_depth: int | None = None
    """Jobs in the prefill queue when this one joined it; None if it did not have to."""
    jobs_ahead: int | None = None
    """Those of them whose turn was before its own."""
    start_ms: float
    end_ms: float | None = None
    failure: str | None = None
    """What ended it, if another attempt had to follow."""
    spans: tuple[Span, ...] = ()
    """In the order of `SpanName`, those that began."""


class PrefixPush(msgspec.Struct, frozen=True, kw_only=True):
    """The beginning of the prompt that the decode node was to push to the prefill node, which lacked it."""

    outcome: str | None = None
    """`landed`, or why it was computed after all; None while it is under way."""
    tokens: int = 0
    """That came; they are among those cached at the prefill node."""
    kv_bytes: int = 0
    """That came, apart from those of the receipt, which went the other way."""
    ms: float | None = None
    """From the job's arrival until it had landed or was given up, on the prefill node's clock."""


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /v1/requests/{id}`; the field names are the JSON keys that users rely on."""

    id: str
    key: str | None = None
    """The name of the API key that asked; None where there are none."""
    model: str
    decision: Decision | None = None
    """None until a decode node has decided. This and the next are of the last attempt."""
    reason: str | None = None
    predicted: Predicted | None = None
    prediction_error: float | None = None
    """(predicted − actual) / actual time from the decision to the first token; None without both, or after a retry."""
    prefill_node: str | None = None
    """None when the decode node prefilled."""
    decode_node: str | None = None
    prompt_tokens: int
    output_tokens: int = 0
    cached_tokens: CachedTokens = CachedTokens()
    kv_bytes: int = 0
    """Sum of the descriptor lengths of the handles that ended DONE."""
    is_pushing: bool = False
    """The prefill node has yet to report the push: `kv_bytes` and the transfer's spans follow, maybe after the reply."""
    prefix_push: PrefixPush | None = None
    """None if nothing was asked of the decode node."""
    retries: int = 0
    spans_ms: Spans = Spans()
    prefill_clock_ms: PrefillClock | None = None
    """None when the decode node prefilled."""
    finish_reason: FinishReason | None = None
    """None while the request runs."""
    error: str | None = None
    """What the client was told, if it ended with one; or why the router cut it."""
    phase: str = "placed"
    """Who has it now; `done` when it is over."""
    policy: Policy = "auto"
    """What the request asked for."""
    priority: int = 0
    session: str | None = None
    arrived_at: float = 0.0
    """Seconds since 1970, on the router's clock."""
    age_ms: float | None = None
    """Since it arrived, while it runs."""
    attempts: tuple[Attempt, ...] = ()

    @property
    def num_cached(self) -> int:
        """Prompt tokens that the node which prefilled did not have to compute."""
        return self.cached_tokens.prefill if self.decision == "remote" else self.cached_tokens.decode

    def header(self) -> str:
        """One line of ASCII for the `x-disaggd` header: `remote p0->d0 cached=0 kv=12.6MB`, `local d0 cached=0`.

        What is out of the ordinary follows: ` retries=1`. A reply may be whole before its prefill node has told of the push: `kv=?`.
        """
        decode = self.decode_node or "?"
        retries = f" retries={self.retries}" if self.retries else ""
        if self.decision == "remote":
            kv = "?" if self.is_pushing else _megabytes(self.kv_bytes)
            return f"remote {self.prefill_node or '?'}->{decode} cached={self.num_cached} kv={kv}{retries}"
        return f"{self.decision or 'undecided'} {decode} cached={self.num_cached}{retries}"


class ReceiptList(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /v1/requests`: an OpenAI list, newest first."""

    object: str = "list"
    data: tuple[Receipt, ...]


def _megabytes(num_bytes: int) -> str:
    """Two digits at least: 12.6MB, 0.26MB."""
    megabytes = num_bytes / 1e6
    return f"{megabytes:.1f}MB" if megabytes >= 1 else f"{megabytes:.2g}MB"


class ReceiptBook:
    """The receipts of the last `capacity` requests; an older one is forgotten."""

    def __init__(self, capacity: int = 4096) -> None:
        self._capacity = capacity
        self._receipts: OrderedDict[tuple[str, str | None], Receipt] = OrderedDict()
        """By id and API key: nobody's request takes the place of somebody else's."""

    def write(self, receipt: Receipt) -> None:
        """Keep `receipt` as its key's latest of its id."""
        self._receipts[receipt.id, receipt.key] = receipt
        self._receipts.move_to_end((receipt.id, receipt.key))
        if len(self._receipts) > self._capacity:
            self._receipts.popitem(last=False)

    def get(self, request_id: str, key: str | None = None) -> Receipt | None:
        """The latest receipt of that id and `key`; of whichever key if that is None. Reading keeps nothing alive longer."""
        found = self._receipts.get((request_id, key))
        if found is None and key is None:
            found = next((receipt for receipt in reversed(self._receipts.values()) if receipt.id == request_id), None)
        return found

    def __iter__(self) -> Iterator[Receipt]:
        return iter(self._receipts.values())
