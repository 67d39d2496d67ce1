"""Decode steps as CUDA graphs: one per batch size, captured at start. Runs on the compute thread, and never waits for the device.

An 8B model's decode step is some 400 kernels of a few microseconds; launched one by one they take the host longer than the device.

Of several ranks each captures its part, what they say to each other included. A replay of one waits, on its device, for that of the others:
so all must have the same steps, captured in the same order, and choose alike, which they do for they are given the same batches.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from disaggd.engine.batch import HostBatch
from disaggd.engine.staging import Layout, on_host
from disaggd.model.batch import Batch, with_pending
from disaggd.model.transformer import Transformer

Made = tuple[Tensor, Tensor]

Capture = Callable[[Callable[[], Made]], tuple[Callable[[], None], Made]]
"""A step → what asks the device for it once more, and the tensors that it then fills."""


class CudaCapture:
    """Of what is asked of a GPU. All graphs share their memory."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Made]) -> tuple[Callable[[], None], Made]:
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: torch's own, which looks after NCCL's work, asks the device about events meanwhile.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            made = step()
        return graph.replay, made


@dataclass(frozen=True, slots=True)
class _Captured:
    """One graph, and the memory that it reads and writes."""

    replay: Callable[[], None]
    layout: Layout
    inputs: Tensor  # uint8, laid out
    logits: Tensor  # float32 [size, vocab]
    tokens: Tensor  # int64 [size]: those that the logits follow


class DecodeGraphs:
    """The decode steps of `transformer` over the pool `kv`, for up to `max_sequences` sequences of up to `max_blocks` blocks each.

    `sampled` int64 [max_rows] holds the tokens of the step before, for those that the host does not know yet; every captured step begins
    with the first rank's. Call under `torch.inference_mode()`.
    """

    def __init__(
        self, transformer: Transformer, kv: Tensor, *, max_sequences: int, max_blocks: int, max_rows: int, capture: Capture | None = None
    ) -> None:
        self.sampled = torch.zeros(max_rows, dtype=torch.int64, device=kv.device)
        self.sizes = tuple(sizes(max_sequences))
        self._transformer = transformer
        self._kv = kv
        self._max_blocks = max_blocks
        self._make = capture or CudaCapture()
        self._captured: dict[int, _Captured] = {}

    def capture(self, progress: Callable[[int, int], None]) -> None:
        """Capture every size, the largest first: the smaller ones reuse its memory. `progress(done, total)` is called after each."""
        for done, size in enumerate(reversed(self.sizes), 1):
            self._captured[size] = self._capture(size)
            progress(done, len(self.sizes))

    def serves(self, batch: HostBatch) -> bool:
        """Whether a captured step computes this batch."""
        return batch.has_one_token_each and len(batch.tokens) <= self.sizes[-1] and batch.block_tables.shape[1] <= self._max_blocks

    def run(self, batch: HostBatch) -> tuple[Tensor, Tensor]:
        """Launch the step: logits float32 [n, vocab] and the tokens int64 [n] that they follow, until the next one overwrites them."""
        count = len(batch.tokens)
        size = self.sizes[bisect_left(self.sizes, count)]
        captured = self._captured[size]
        arrays = batch.padded(size, self._max_blocks).arrays()
        captured.inputs.copy_(on_host(captured.layout, arrays, self._kv.device), non_blocking=True)
        captured.replay()
        return captured.logits[:count], captured.tokens[:count]

    def drop(self) -> None:
        """Nothing is replayed any more."""
        self._captured.clear()

    def _capture(self, size: int) -> _Captured:
        nothing = _no_sequences().padded(size, self._max_blocks).arrays()
        layout = Layout(nothing)
        inputs = torch.empty(layout.num_bytes, dtype=torch.uint8, device=self._kv.device)
        inputs.copy_(on_host(layout, nothing, self._kv.device))
        *fields, sources = layout.views(inputs)
        batch = Batch(*fields)

        def step() -> Made:
            self._transformer.ranks.spread(self.sampled)
            made = with_pending(batch, sources, self.sampled)
            return self._transformer.forward(made, self._kv), made.tokens

        step()  # compiles kernels, has NCCL connect the ranks, and lets libraries allocate what must not be allocated in a capture
        replay, (logits, tokens) = self._make(step)
        return _Captured(replay, layout, inputs, logits, tokens)


def sizes(max_sequences: int) -> Iterator[int]:
    """1, 2, 4, then multiples of 8 up to 64, of 16 beyond: a batch is padded by at most an eighth or so. The last holds `max_sequences`."""
    size = 1
    while size < max_sequences:
        yield size
        size = size * 2 if size < 8 else size + (8 if size < 64 else 16)
    yield size


def _no_sequences() -> HostBatch:
    longs, ints = np.zeros(0, np.int64), np.zeros(0, np.int32)
    return HostBatch(longs, longs, longs, np.zeros(1, np.int32), ints, np.zeros((0, 1), np.int32), longs, longs)
