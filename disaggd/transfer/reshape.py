"""From one cut of the KV cache to another: which bytes of which rank become which bytes of which. Pure arithmetic.

The ranks of a node share the KV heads: rank r of n has heads [⌊r·H/n⌋, ⌊(r+1)·H/n⌋) of H, and one of them where n > H, which
others then have too. Two nodes may differ in ranks and in block size. A slice is the unit of both ways from one to the other:
*direct*, a descriptor each, and *repacked*, gathered into the target's own layout first, so that whole runs are written.
"""

from collections.abc import Iterator

import msgspec
import numpy as np

from disaggd.model.spec import DTYPE_BYTES
from disaggd.transfer.layout import KVSpec


class HeadCut(msgspec.Struct, frozen=True):
    """What one rank of the source writes into one rank of the target: these heads of every block, and no others."""

    source_rank: int
    target_rank: int
    heads: range


def heads_of(rank: int, num_ranks: int, kv_heads: int) -> range:
    """The KV heads that a rank holds: at least one."""
    assert 0 <= rank < num_ranks
    start = rank * kv_heads // num_ranks
    return range(start, max(start + 1, (rank + 1) * kv_heads // num_ranks))


def head_cuts(kv_heads: int, num_sources: int, num_targets: int) -> tuple[HeadCut, ...]:
    """Every head of every target rank once, from one source rank that has it; at most one cut between any two ranks.

    Where several source ranks have a head, the targets are spread over them.
    """
    owners = [[rank for rank in range(num_sources) if head in heads_of(rank, num_sources, kv_heads)] for head in range(kv_heads)]
    cuts: list[HeadCut] = []
    for target in range(num_targets):
        heads = heads_of(target, num_targets, kv_heads)
        for head in range(heads.start, heads.stop):
            source = owners[head][target % len(owners[head])]
            if cuts and (cuts[-1].source_rank, cuts[-1].target_rank) == (source, target):
                cuts[-1] = HeadCut(source, target, range(cuts[-1].heads.start, head + 1))
            else:
                cuts.append(HeadCut(source, target, range(head, head + 1)))
    return tuple(cuts)


class Shard(msgspec.Struct, frozen=True, kw_only=True):
    """How one rank holds a block of one layer: [heads, 2, block_size, head_dim] of `itemsize` bytes each."""

    heads: range
    block_size: int
    """Tokens."""
    head_dim: int
    itemsize: int

    @property
    def token_bytes(self) -> int:
        """Of one head's keys, or of its values."""
        return self.head_dim * self.itemsize

    @property
    def head_bytes(self) -> int:
        """Of one head's keys and values in a block."""
        return 2 * self.block_size * self.token_bytes

    @property
    def block_bytes(self) -> int:
        return len(self.heads) * self.head_bytes

    def offset(self, head: int, values: int, token: int) -> int:
        """Of a token's keys (`values` 0) or values (1) of one of the rank's heads, in bytes from the start of the block."""
        return (head - self.heads.start) * self.head_bytes + (values * self.block_size + token) * self.token_bytes


def shard_of(kv: KVSpec, rank: int, num_ranks: int) -> Shard:
    """What `rank` holds of a cache whose geometry over all ranks is `kv`."""
    [group] = kv.groups
    return Shard(
        heads=heads_of(rank, num_ranks, group.kv_heads),
        block_size=kv.block_size,
        head_dim=kv.head_dim,
        itemsize=DTYPE_BYTES[kv.dtype],
    )


class Slices(msgspec.Struct, frozen=True):
    """Equal in number, one row each: `length` bytes from `source_offset` in the source's block become those at `target_offset`.

    Blocks are counted from the one that holds the first token of the prompt. int64 [slices].
    """

    source_block: np.ndarray
    source_offset: np.ndarray
    target_block: np.ndarray
    target_offset: np.ndarray
    length: np.ndarray

    @property
    def num_bytes(self) -> int:
        return int(self.length.sum())


def slices(cut: HeadCut, source: Shard, target: Shard, first_token: int, last_token: int) -> Slices:
    """One layer of tokens [first, last) of a prompt, as `cut` has it: the fewest contiguous pieces of memory on both sides.

    The source's and the target's shards must agree in what a token of a head is. Blocks of one size are cut by heads only, and
    whole: then `first_token` begins one, and what lies behind `last_token` in its block goes along.
    """
    assert (source.head_dim, source.itemsize) == (target.head_dim, target.itemsize), "a cast is no copy of bytes"
    if source.block_size == target.block_size:
        assert first_token % source.block_size == 0
        rows = list(_whole_blocks(cut, source, target, first_token, last_token))
    else:
        rows = list(_token_runs(cut, source, target, first_token, last_token))
    return Slices(*np.array(rows, dtype=np.int64).reshape(-1, 5).T)


Row = tuple[int, int, int, int, int]


def _whole_blocks(cut: HeadCut, source: Shard, target: Shard, first_token: int, last_token: int) -> Iterator[Row]:
    """A range of heads is contiguous in a block, whichever rank's."""
    source_offset, target_offset = source.offset(cut.heads.start, 0, 0), target.offset(cut.heads.start, 0, 0)
    for block in range(first_token // source.block_size, -(-last_token // source.block_size)):
        yield block, source_offset, block, target_offset, len(cut.heads) * source.head_bytes


def _token_runs(cut: HeadCut, source: Shard, target: Shard, first_token: int, last_token: int) -> Iterator[Row]:
    """A run of tokens is contiguous only within one head's keys, or its values, and up to the next block on either side."""
    start = first_token
    while start < last_token:
        stop = min(last_token, *((start // size + 1) * size for size in (source.block_size, target.block_size)))
        for head in range(cut.heads.start, cut.heads.stop):
            for values in (0, 1):
                yield (
                    start // source.block_size,
                    source.offset(head, values, start % source.block_size),
                    start // target.block_size,
                    target.offset(head, values, start % target.block_size),
                    (stop - start) * source.token_bytes,
                )
        start = stop
