"""What happened to each request: the decision, the nodes, the bytes, the spans. Runs on the router's asyncio thread.

Knows nothing of HTTP or of the cluster's frames: the router role fills receipts in, the gateway shows them.
"""

from collections import OrderedDict
from typing import Literal

import msgspec

from disaggd.sampling import FinishReason


class CachedTokens(msgspec.Struct, frozen=True):
    """Prompt tokens that were in a prefix cache, on either side."""

    decode: int = 0
    prefill: int = 0


class Spans(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds; None for what did not happen (or has not yet)."""

    queue: float | None = None
    """In the prefill queue."""
    prefill_wait: float | None = None
    """In the prefill node's engine, before its first step."""
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


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /v1/requests/{id}`; the field names are the JSON keys that users rely on."""

    id: str
    model: str
    decision: Literal["local", "remote"] | None = None
    """None until a decode node has decided."""
    reason: str | None = None
    prefill_node: str | None = None
    """None when the decode node prefilled."""
    decode_node: str | None = None
    prompt_tokens: int
    output_tokens: int = 0
    cached_tokens: CachedTokens = CachedTokens()
    kv_bytes: int = 0
    """Sum of the descriptor lengths of the handles that ended DONE."""
    retries: int = 0
    spans_ms: Spans = Spans()
    prefill_clock_ms: PrefillClock | None = None
    """None when the decode node prefilled."""
    finish_reason: FinishReason | None = None
    """None while the request runs."""

    @property
    def num_cached(self) -> int:
        """Prompt tokens that the node which prefilled did not have to compute."""
        return self.cached_tokens.prefill if self.decision == "remote" else self.cached_tokens.decode

    def header(self) -> str:
        """One line of ASCII for the `x-disaggd` header: `remote p0->d0 cached=0 kv=12.6MB`, `local d0 cached=0`."""
        decode = self.decode_node or "?"
        if self.decision == "remote":
            return f"remote {self.prefill_node or '?'}->{decode} cached={self.num_cached} kv={_megabytes(self.kv_bytes)}"
        return f"{self.decision or 'undecided'} {decode} cached={self.num_cached}"


def _megabytes(num_bytes: int) -> str:
    """Two digits at least: 12.6MB, 0.26MB."""
    megabytes = num_bytes / 1e6
    return f"{megabytes:.1f}MB" if megabytes >= 1 else f"{megabytes:.2g}MB"


class ReceiptBook:
    """The receipts of the last `capacity` requests; an older one is forgotten."""

    def __init__(self, capacity: int = 4096) -> None:
        self._capacity = capacity
        self._receipts: OrderedDict[str, Receipt] = OrderedDict()

    def write(self, receipt: Receipt) -> None:
        """Keep `receipt` as the latest of its id."""
        self._receipts[receipt.id] = receipt
        self._receipts.move_to_end(receipt.id)
        if len(self._receipts) > self._capacity:
            self._receipts.popitem(last=False)

    def get(self, request_id: str) -> Receipt | None:
        """The latest receipt of that id. Reading keeps nothing alive longer."""
        return self._receipts.get(request_id)
