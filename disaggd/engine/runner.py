"""Turns a plan into a batch, the batch into logits, the logits into tokens.

Runs on the compute thread, and never waits for a GPU: there a step's tokens are fed to the next one on the device, and come to the host
when they are asked for. Reads sequences, and leaves it to the engine to change them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from disaggd.engine.batch import HostBatch, build_batch
from disaggd.engine.graphs import DecodeGraphs
from disaggd.engine.ranks import Followers
from disaggd.engine.sampler import Drawn, SampledToken, SamplerRow, draw
from disaggd.engine.scheduler import Chunk, StepPlan
from disaggd.engine.sequence import Sequence
from disaggd.engine.staging import upload
from disaggd.model.batch import Batch, with_pending
from disaggd.model.transformer import Transformer


class ModelRunner:
    """One rank's model, and the KV pool `kv` [layers, num_blocks, kv_heads, 2, block_size, head_dim] that it writes and reads.

    `max_rows`: sequences that one step may sample for. `graphs`: the decode steps that were captured, if any. `followers`: the other
    ranks, if this is the first of several.
    """

    def __init__(
        self, transformer: Transformer, kv: Tensor, max_rows: int, graphs: DecodeGraphs | None = None, followers: Followers | None = None
    ) -> None:
        self.lookahead = 1 if kv.is_cuda else 0
        self._transformer = transformer
        self._kv = kv
        self._graphs = graphs
        self._followers = followers
        self._sampled = torch.zeros(max_rows, dtype=torch.int64, device=kv.device) if graphs is None else graphs.sampled
        self._sampled_rows: dict[Sequence, int] = {}

    def execute(self, plan: StepPlan, layers_done: Callable[[range], None] | None = None) -> Callable[[], list[SampledToken]]:
        """See `engine.Runner`."""
        with torch.inference_mode():
            batch = build_batch(plan, self._kv.shape[4], self._sampled_rows)
            logits, last_tokens = self._forward_on_all(batch, layers_done)
            drawn = draw(self._transformer.ops, logits, last_tokens, [_sampler_row(chunk) for chunk in plan.sampling])
            self._remember(drawn, plan)
        return drawn.read

    def logits(self, plan: StepPlan) -> Tensor:
        """Of the plan's chunks that sample, [chunks, vocabulary] on the device. Stores their K and V; samples nothing."""
        with torch.inference_mode():
            return self._forward_on_all(build_batch(plan, self._kv.shape[4], {}), None)[0]

    def _forward_on_all(self, batch: HostBatch, layers_done: Callable[[range], None] | None) -> tuple[Tensor, Tensor]:
        if self._followers is None:
            return self._forward(batch, layers_done)
        with self._followers.naming_the_lost():
            self._followers.compute(batch)
            return self._forward(batch, layers_done)

    def _forward(self, batch: HostBatch, layers_done: Callable[[range], None] | None) -> tuple[Tensor, Tensor]:
        """Logits of the rows that are wanted, and the tokens that they follow."""
        if self._graphs is not None and self._graphs.serves(batch):
            found = self._graphs.run(batch)
            if layers_done is not None:
                layers_done(range(self._transformer.spec.num_layers))
            return found
        *fields, sources = upload(batch.arrays(), self._kv.device)
        made = Batch(*fields)
        if batch.has_pending:
            made = with_pending(made, sources, self._sampled)
        return self._transformer.forward(made, self._kv, layers_done), made.tokens[made.logit_rows]

    def _remember(self, drawn: Drawn, plan: StepPlan) -> None:
        """For the step after this one, which may be launched before anybody knows these tokens."""
        self._sampled[: len(drawn.tokens)].copy_(drawn.tokens)
        self._sampled_rows = {chunk.sequence: row for row, chunk in enumerate(plan.sampling)}


def _sampler_row(chunk: Chunk) -> SamplerRow:
    sequence = chunk.sequence
    return SamplerRow(sequence.sampling, sequence.tokens, sequence.num_prompt_tokens, position=chunk.end)
