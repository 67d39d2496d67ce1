"""Turns a plan into a batch, the batch into logits, the logits into tokens.

Runs on the compute thread, and never waits for a GPU: there a step's tokens are fed to the next one on the device, and come to the host
when they are asked for. Reads sequences, and leaves it to the engine to change them.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from disaggd.engine.batch import HostBatch, build_batch
from disaggd.engine.forward import Forward
from disaggd.engine.ranks import Followers
from disaggd.engine.sampler import Drawn, SampledToken, SamplerRow, draw
from disaggd.engine.scheduler import Chunk, StepPlan
from disaggd.engine.sequence import Sequence
from disaggd.engine.stream import DeviceStream

Result = TypeVar("Result")


class ModelRunner:
    """The model, as the first of its ranks computes it. `followers`: the others, if there are any."""

    def __init__(self, forward: Forward, followers: Followers | None = None) -> None:
        self.lookahead = 1 if forward.kv.is_cuda else 0
        self._forward = forward
        self._followers = followers
        self._stream = DeviceStream(forward.kv.device)
        self._sampled_rows: dict[Sequence, int] = {}

    def execute(self, plan: StepPlan, layers_done: Callable[[range], None] | None = None) -> Callable[[], list[SampledToken]]:
        """See `engine.Runner`."""
        with torch.inference_mode():
            batch = build_batch(plan, self._forward.kv.shape[4], self._sampled_rows)
            logits, last_tokens = self._forward_on_all(batch, layers_done)
            drawn = draw(self._forward.transformer.ops, logits, last_tokens, [_sampler_row(chunk) for chunk in plan.sampling])
            self._remember(drawn, plan)
        return self._once_done(drawn.read)

    def logits(self, plan: StepPlan) -> Tensor:
        """Of the plan's chunks that sample, [chunks, vocabulary] on the device. Stores their K and V; samples nothing."""
        with torch.inference_mode():
            logits, _ = self._forward_on_all(build_batch(plan, self._forward.kv.shape[4], {}), None)
        return self._once_done(lambda: logits)()

    def close(self) -> None:
        """Nothing is computed any more, on any rank. Idempotent."""
        if self._followers is not None:
            self._followers.close(self._stream.mark)
        self._forward.close()
        self._forward.transformer.ranks.close()

    def _forward_on_all(self, batch: HostBatch, layers_done: Callable[[range], None] | None) -> tuple[Tensor, Tensor]:
        if self._followers is None:
            return self._forward(batch, layers_done)
        with self._followers.naming_the_lost():
            self._followers.compute(batch)
            return self._forward(batch, layers_done)

    def _once_done(self, read: Callable[[], Result]) -> Callable[[], Result]:
        """`read`, which waits for the device; not for one that waits in vain for another rank's."""
        if self._followers is None:
            return read
        followers, is_done = self._followers, self._stream.mark()

        def read_if_whole() -> Result:
            followers.wait_for(is_done)
            return read()

        return read_if_whole

    def _remember(self, drawn: Drawn, plan: StepPlan) -> None:
        """For the step after this one, which may be launched before anybody knows these tokens."""
        self._forward.sampled[: len(drawn.tokens)].copy_(drawn.tokens)
        self._sampled_rows = {chunk.sequence: row for row, chunk in enumerate(plan.sampling)}


def _sampler_row(chunk: Chunk) -> SamplerRow:
    sequence = chunk.sequence
    return SamplerRow(sequence.sampling, sequence.tokens, sequence.num_prompt_tokens, position=chunk.end)
