"""One step's tokens as tensors. Made and used on the compute thread; knows nothing of sequences' states or of sampling."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """The new tokens of several sequences, flattened one sequence after another. All tensors are on the model's device.

    A sequence with one new token decodes, one with more prefills; a batch may hold both.
    """

    tokens: Tensor
    """int64 [num_tokens]."""
    positions: Tensor
    """int64 [num_tokens]: index of each token in its sequence."""
    slot_mapping: Tensor
    """int64 [num_tokens]: `block_id · block_size + offset`, where each token's key and value go."""
    query_start: Tensor
    """int32 [num_sequences + 1]: cumulative number of new tokens."""
    context_lens: Tensor
    """int32 [num_sequences]: tokens with keys and values after this step, the new ones included."""
    block_tables: Tensor
    """int32 [num_sequences, max_blocks]: block ids in order; rows padded with 0."""
    logit_rows: Tensor
    """int64 [k]: rows of the tokens whose successors are wanted: the last token of each sequence that samples."""


def with_pending(batch: Batch, sources: Tensor, sampled: Tensor) -> Batch:
    """The batch with tokens that only the device knows: `sampled[source]` wherever `sources` int64 [num_tokens] is not negative."""
    return replace(batch, tokens=torch.where(sources < 0, batch.tokens, sampled[sources.clamp(min=0)]))
