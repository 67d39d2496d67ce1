"""Attention of one batch over the pool, layer by layer, by the Triton kernels; see `disaggd.kernels.PagedAttention`.

Runs on the compute thread, and never waits for the device. Keeps the batch's tensors and nothing between batches.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from disaggd.kernels.decode_attention import decode_attention
from disaggd.kernels.kv_store import kv_store
from disaggd.kernels.prefill_attention import prefill_attention
from disaggd.kernels.rotate_and_store import rotate_and_store


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """For a batch in which every sequence has a new token. `processors`: multiprocessors of the device."""

    slot_mapping: Tensor
    query_start: Tensor
    context_lens: Tensor
    block_tables: Tensor
    window: int | None
    processors: int

    def store(self, kv: Tensor, keys: Tensor, values: Tensor) -> None:
        kv_store(kv, keys, values, self.slot_mapping)

    def rotate_and_store(
        self, kv: Tensor, projected: Tensor, norm_weight: Tensor | None, eps: float, rotation: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Head norm, rotary embedding and `store` from the fused projection's output; returns the queries. See the kernel."""
        return rotate_and_store(kv, projected, norm_weight, eps, rotation, self.slot_mapping)

    def attend(self, kv: Tensor, queries: Tensor) -> Tensor:
        out = torch.empty_like(queries, memory_format=torch.contiguous_format)
        batch = (self.query_start, self.context_lens, self.block_tables)
        decode_attention(out, queries, kv, *batch, window=self.window, processors=self.processors)
        if len(queries) > len(self.context_lens):  # some sequence has more than one: each kernel passes over the other's
            prefill_attention(out, queries, kv, *batch, window=self.window)
        return out
