"""Attention of one batch over the pool, layer by layer, by the Triton kernels; see `disaggd.kernels.PagedAttention`.

Runs on the compute thread, and never waits for the device. Keeps the batch's tensors and nothing between batches.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from disaggd.kernels.decode_attention import decode_attention
from disaggd.kernels.kv_store import kv_store
from disaggd.kernels.prefill_attention import prefill_attention
from disaggd.kernels.rotate_and_store import rotate_and_store


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """For a batch in which every sequence has a new token. `processors`: multiprocessors of the device, to split contexts for.

    A batch may be padded with sequences of one token whose slot is negative and whose context is empty: nothing is stored for them, and
    their attention is zero.
    """

    slot_mapping: Tensor
    query_start: Tensor
    context_lens: Tensor
    block_tables: Tensor
    kv_heads: int = field(kw_only=True)
    block_size: int = field(kw_only=True)
    window: int | None = field(kw_only=True)
    processors: int = field(kw_only=True)

    def store(self, kv: Tensor, keys: Tensor, values: Tensor) -> None:
        kv_store(kv, keys, values, self.slot_mapping)

    def rotate_and_store(
        self, kv: Tensor, projected: Tensor, norm_weight: Tensor | None, eps: float, rotation: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Head norm, rotary embedding and `store` from the fused projection's output; returns the queries. See the kernel."""
        return rotate_and_store(kv, projected, norm_weight, eps, rotation, self.slot_mapping)

    def attend(self, kv: Tensor, queries: Tensor) -> Tensor:
        assert (kv.shape[1], kv.shape[3]) == (self.kv_heads, self.block_size), f"pool {tuple(kv.shape)}"
        out = torch.empty_like(queries, memory_format=torch.contiguous_format)
        batch = (self.query_start, self.context_lens, self.block_tables)
        decode_attention(out, queries, kv, *batch, window=self.window, processors=self.processors)
        if len(queries) > len(self.context_lens):  # some sequence has more than one: each kernel passes over the other's
            prefill_attention(out, queries, kv, *batch, window=self.window)
        return out
