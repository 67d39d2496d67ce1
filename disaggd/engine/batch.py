"""Turns a plan into arrays: one step's tokens, and where they go. Runs on the compute thread; reads sequences, and changes nothing."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from disaggd.engine.scheduler import Chunk, StepPlan
from disaggd.engine.sequence import Sequence
from disaggd.engine.staging import Array

Ints = NDArray[np.int64]
ShortInts = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class HostBatch:
    """What `disaggd.model.batch.Batch` holds, field by field, and where the tokens come from that the host does not know."""

    tokens: Ints
    """[num_tokens]; 0 where pending."""
    positions: Ints
    slot_mapping: Ints
    query_start: ShortInts
    context_lens: ShortInts
    block_tables: ShortInts
    logit_rows: Ints
    sources: Ints
    """[num_tokens]: row of the step before whose sampled token this one is; −1 where `tokens` has it."""

    @property
    def has_one_token_each(self) -> bool:
        """Whether every sequence has one token, and is to get another."""
        return len(self.tokens) == len(self.context_lens) == len(self.logit_rows)

    @property
    def has_pending(self) -> bool:
        return bool((self.sources >= 0).any())

    def arrays(self) -> tuple[Array, ...]:
        """In the order of the fields."""
        return (
            self.tokens,
            self.positions,
            self.slot_mapping,
            self.query_start,
            self.context_lens,
            self.block_tables,
            self.logit_rows,
            self.sources,
        )

    def padded(self, num_sequences: int, num_blocks: int) -> "HostBatch":
        """A decode batch, filled up with sequences of one token that is stored nowhere and attends to nothing, and tables with columns."""
        count, missing = len(self.tokens), num_sequences - len(self.tokens)
        assert self.has_one_token_each and missing >= 0
        tables = np.zeros((num_sequences, num_blocks), np.int32)
        tables[:count, : self.block_tables.shape[1]] = self.block_tables
        return HostBatch(
            tokens=np.pad(self.tokens, (0, missing)),
            positions=np.pad(self.positions, (0, missing)),
            slot_mapping=np.pad(self.slot_mapping, (0, missing), constant_values=-1),
            query_start=np.arange(num_sequences + 1, dtype=np.int32),
            context_lens=np.pad(self.context_lens, (0, missing)),
            block_tables=tables,
            logit_rows=np.arange(num_sequences),
            sources=np.pad(self.sources, (0, missing), constant_values=-1),
        )


def build_batch(plan: StepPlan, block_size: int, sampled_rows: Mapping[Sequence, int]) -> HostBatch:
    """The plan's chunks, one after another. `sampled_rows`: the sequences whose tokens the step before sampled, and their rows there.

    A few numpy calls over all chunks, not some per chunk: see tests/engine/test_runner.py for what 64 decodes cost.
    """
    chunks = plan.chunks
    starts = np.array([chunk.start for chunk in chunks])
    ends = np.array([chunk.end for chunk in chunks])
    samples = np.array([chunk.samples for chunk in chunks])
    query_start = np.concatenate(([0], np.cumsum(ends - starts)))
    rows = np.repeat(np.arange(len(chunks)), ends - starts)  # [num_tokens]: each token's chunk
    positions = np.arange(query_start[-1]) + (starts - query_start[:-1])[rows]
    tables = _block_tables([chunk.sequence for chunk in chunks])
    sources = np.full(plan.num_tokens, -1)
    for index, chunk in enumerate(chunks):
        if _is_pending(chunk):
            sources[query_start[index + 1] - 1] = sampled_rows[chunk.sequence]
    return HostBatch(
        tokens=np.fromiter(chain.from_iterable(map(_tokens, chunks)), np.int64, plan.num_tokens),
        positions=positions,
        slot_mapping=tables[rows, positions // block_size].astype(np.int64) * block_size + positions % block_size,
        query_start=query_start.astype(np.int32),
        context_lens=ends.astype(np.int32),
        block_tables=tables,
        logit_rows=query_start[1:][samples] - 1,
        sources=sources,
    )


def _is_pending(chunk: Chunk) -> bool:
    """Whether the chunk's last token is still being sampled."""
    return chunk.end > len(chunk.sequence.tokens)


def _tokens(chunk: Chunk) -> Iterable[int]:
    known = chunk.sequence.tokens[chunk.start : chunk.end]
    return [*known, 0] if _is_pending(chunk) else known


def _block_tables(sequences: list[Sequence]) -> ShortInts:
    """Their tables as rows, padded with 0. Takes 20 µs for 64 rows of 8 blocks, 400 for 64 of 512."""
    tables = np.zeros((len(sequences), max(len(sequence.block_table) for sequence in sequences)), np.int32)
    for row, sequence in zip(tables, sequences, strict=True):
        row[: len(sequence.block_table)] = sequence.block_table
    return tables
