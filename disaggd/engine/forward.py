"""`Forward`: one rank's part of every step, from arrays to logits. Runs on the compute thread, and never waits for a GPU.

All ranks are given the same arrays, and do the same with them, in the same order: what the others are asked for, they are asked for too.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from disaggd.engine.batch import HostBatch
from disaggd.engine.graphs import DecodeGraphs
from disaggd.engine.staging import upload
from disaggd.model.batch import Batch, with_pending
from disaggd.model.transformer import Transformer


class Forward:
    """`transformer` over the pool `kv` [layers, num_blocks, kv_heads, 2, block_size, head_dim] that it writes and reads.

    `sampled` int64 [max_rows]: the tokens of the step before, by row, for those that the host does not know yet. They are the first
    rank's to write; the others are given them when a step wants some. `graphs`: the decode steps that were captured, if any.
    Call under `torch.inference_mode()`.
    """

    def __init__(self, transformer: Transformer, kv: Tensor, max_rows: int, graphs: DecodeGraphs | None = None) -> None:
        self.transformer = transformer
        self.kv = kv
        self.sampled = torch.zeros(max_rows, dtype=torch.int64, device=kv.device) if graphs is None else graphs.sampled
        self._graphs = graphs

    def __call__(self, batch: HostBatch, layers_done: Callable[[range], None] | None = None) -> tuple[Tensor, Tensor]:
        """Logits of the rows that are wanted, on the first rank, and the tokens that they follow. Raises RankLost."""
        if self._graphs is not None and self._graphs.serves(batch):
            found = self._graphs.run(batch)
            if layers_done is not None:
                layers_done(range(self.transformer.spec.num_layers))
            return found
        *fields, sources = upload(batch.arrays(), self.kv.device)
        made = Batch(*fields)
        if batch.has_pending:
            self.transformer.ranks.spread(self.sampled)
            made = with_pending(made, sources, self.sampled)
        return self.transformer.forward(made, self.kv, layers_done), made.tokens[made.logit_rows]

    def close(self) -> None:
        """Nothing is computed any more: the captured steps go, and with them what they hold of NCCL."""
        if self._graphs is not None:
            self._graphs.drop()
