"""One rank's part of a step, captured or not, beside another rank's: over gloo, and a stand-in for CUDA's graphs.

The ranks are threads here, each with its own connection, and only the first one is ever told what was sampled.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from disaggd.engine.batch import HostBatch
from disaggd.engine.forward import Forward
from disaggd.engine.graphs import DecodeGraphs
from disaggd.kernels import MakePagedAttention
from disaggd.model.directory import open_directory
from disaggd.model.kv import allocate_kv
from disaggd.model.parallel import ProcessRanks, Ranks, meeting_place, part_of
from disaggd.model.weights import load_weights
from disaggd.transfer.layout import kv_spec

CPU = torch.device("cpu")
BLOCK, NUM_BLOCKS, MAX_BLOCKS = 16, 8, 3
PROMPTS = ([11, 12, 13, 14, 15], [31, 32, 33], [51], [71, 72])
STEPS = 3


class Replays:
    """Where CUDA's graphs would stand: what was captured is done once more, into the same tensors. Notes what is captured and replayed."""

    def __init__(self) -> None:
        self.num_captured, self.num_replayed = 0, 0

    def __call__(self, step: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Callable[[], None], tuple[Tensor, Tensor]]:
        self.num_captured += 1
        made = step()

        def replay() -> None:
            self.num_replayed += 1
            for old, new in zip(made, step(), strict=True):
                old.copy_(new)

        return replay, made


@dataclass
class Noting:
    """Ranks, and what is said to them: in which order, how much."""

    ranks: Ranks
    said: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)

    def sum(self, x: Tensor) -> Tensor:
        self.said.append(("sum", tuple(x.shape)))
        return self.ranks.sum(x)

    def collect(self, x: Tensor, widths: list[int]) -> Tensor:
        self.said.append(("collect", (len(x), max(widths))))
        return self.ranks.collect(x, widths)

    def spread(self, x: Tensor) -> None:
        self.said.append(("spread", tuple(x.shape)))
        self.ranks.spread(x)

    def close(self) -> None:
        self.ranks.close()


def prefill(prompts: tuple[list[int], ...]) -> HostBatch:
    """Each sequence has the block of its number."""
    lens = [len(prompt) for prompt in prompts]
    starts = np.cumsum([0, *lens])
    positions = np.concatenate([np.arange(length) for length in lens])
    return HostBatch(
        tokens=np.concatenate([np.array(prompt) for prompt in prompts]),
        positions=positions,
        slot_mapping=positions + np.repeat(np.arange(len(prompts)) * BLOCK, lens),
        query_start=starts.astype(np.int32),
        context_lens=np.array(lens, np.int32),
        block_tables=np.arange(len(prompts), dtype=np.int32)[:, None],
        logit_rows=starts[1:] - 1,
        sources=np.full(starts[-1], -1),
    )


def decode(prompts: tuple[list[int], ...], step: int, known: Tensor | None) -> HostBatch:
    """The token behind `step` others of each: `known`, or the row of its number of the step before."""
    positions, count = np.array([len(prompt) + step for prompt in prompts]), len(prompts)
    return HostBatch(
        tokens=np.zeros(count, np.int64) if known is None else known.numpy(),
        positions=positions,
        slot_mapping=positions + np.arange(count) * BLOCK,
        query_start=np.arange(count + 1, dtype=np.int32),
        context_lens=(positions + 1).astype(np.int32),
        block_tables=np.arange(count, dtype=np.int32)[:, None],
        logit_rows=np.arange(count),
        sources=np.arange(count) if known is None else np.full(count, -1),
    )


def padded(paged_attention: MakePagedAttention) -> MakePagedAttention:
    """A GPU's kernels pass over what a batch is padded with; a CPU's are given a token of a block that nobody has."""

    def make(slots: Tensor, starts: Tensor, lens: Tensor, tables: Tensor, *, kv_heads: int, block_size: int, window: int | None) -> Any:
        spare = torch.full_like(slots, (NUM_BLOCKS - 1) * BLOCK)
        slots = torch.where(slots < 0, spare, slots)
        return paged_attention(slots, starts, lens.clamp(min=1), tables, kv_heads=kv_heads, block_size=block_size, window=window)

    return make


def make(rank: int, num_ranks: int, ranks: Ranks | None, replays: Replays | None) -> Forward:
    directory = open_directory("builtin:tiny")
    spec = directory.spec("float32")
    part = part_of(spec, rank, num_ranks)
    transformer = load_weights(directory, spec, CPU, part=part, ranks=ranks)
    transformer.ops = replace(transformer.ops, paged_attention=padded(transformer.ops.paged_attention))
    kv = allocate_kv(kv_spec(spec, BLOCK, len(part.kv_heads)), NUM_BLOCKS, CPU)
    if replays is None:
        return Forward(transformer, kv, max_rows=8)
    graphs = DecodeGraphs(transformer, kv, max_sequences=4, max_blocks=MAX_BLOCKS, max_rows=8, capture=replays)
    graphs.capture(lambda done, total: None)
    return Forward(transformer, kv, 8, graphs)


def greedy_tokens(forward: Forward, rank: int, *, pending: bool) -> list[list[int]]:
    """Of a prefill and some decode steps. The first rank alone samples; with `pending` no batch ever holds what it has sampled."""
    said: list[list[int]] = []
    batch = prefill(PROMPTS)
    for step in range(STEPS + 1):
        logits, _ = forward(batch)
        if rank == 0:
            said.append(logits.argmax(1).tolist())
            forward.sampled[: len(PROMPTS)] = logits.argmax(1)
        batch = decode(PROMPTS, step, None if pending else torch.tensor(said[-1]))
    return said


def on_ranks(num_ranks: int, replays: list[Replays] | None) -> tuple[list[list[int]], list[Noting]]:
    """What the first of them says, and what each has said to the others."""
    place = meeting_place()
    noted: dict[int, Noting] = {}

    def work(rank: int) -> list[list[int]]:
        there = place if rank == 0 else meeting_place(place.port)
        noted[rank] = Noting(ProcessRanks(rank, num_ranks, there, 30.0, CPU))
        forward = make(rank, num_ranks, noted[rank], replays and replays[rank])
        if rank:  # else 0, which is no word of its part, and would add nothing
            forward.sampled.fill_(forward.transformer.part.vocabulary.start + 7)
        with torch.inference_mode():
            said = greedy_tokens(forward, rank, pending=True)
            forward.close()
            if replays is not None:
                with pytest.raises(KeyError):  # nothing is replayed any more
                    forward(decode(PROMPTS, STEPS, None))
        return said

    with ThreadPoolExecutor(num_ranks) as threads:
        said = list(threads.map(work, range(num_ranks)))
    return said[0], [noted[rank] for rank in range(num_ranks)]


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """One rank, each step behind the tokens of the one before."""
    with torch.inference_mode():
        return greedy_tokens(make(0, 1, None, None), 0, pending=False)


@pytest.mark.parametrize("captured", [False, True], ids=["launched", "captured"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_tokens_that_only_the_first_rank_has_reach_the_others_within_the_step(
    alone: list[list[int]], num_ranks: int, captured: bool
) -> None:
    replays = [Replays() for _ in range(num_ranks)] if captured else None
    said, _ = on_ranks(num_ranks, replays)
    assert len({tuple(tokens) for tokens in alone}) == len(alone), "too dull to tell anything"
    assert said == alone
    if replays is not None:
        assert {each.num_replayed for each in replays} == {STEPS}, "a prefill is launched, and all decode steps are replayed, on every rank"


def test_every_rank_captures_the_same_steps_in_the_same_order_and_replays_the_same() -> None:
    replays = [Replays(), Replays()]
    _, (first, second) = on_ranks(2, replays)
    assert first.said == second.said
    assert [each.num_captured for each in replays] == [3, 3], "1, 2 and 4 sequences"
    captured = [size for what, (size, *_) in first.said if what == "collect"]
    assert captured == [4, 4, 2, 2, 1, 1, 4, 4, 4, 4], "each once to warm up, once captured; then a prefill and the decode steps"


def test_tokens_that_the_host_knows_are_not_spread() -> None:
    place = meeting_place()
    noted = Noting(ProcessRanks(0, 1, place, 30.0, CPU))
    with torch.inference_mode():
        forward = make(0, 1, noted, None)
        forward(prefill(PROMPTS))
        forward(decode(PROMPTS, 0, torch.tensor([1, 2, 3, 4])))
        assert "spread" not in dict(noted.said)
        forward(decode(PROMPTS, 1, None))
    assert ("spread", (8,)) in noted.said
