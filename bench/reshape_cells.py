"""What `reshape.py` measures: writes from one cut of a KV cache into another. Knows no NIXL and no torch."""

from collections.abc import Iterator

import msgspec
import numpy as np

from disaggd.ids import AgentId, BlockId
from disaggd.transfer.layout import KVGroup, KVSpec, PoolPlace
from disaggd.transfer.reshape import HeadCut, head_cuts
from disaggd.transfer.share import Share

LAYERS, HEAD_DIM = 4, 64


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """What is written: all tokens of one cut, from the pool of one rank into that of another."""

    source: KVSpec
    """Over all ranks, as `target` is."""
    target: KVSpec
    cut: HeadCut
    num_sources: int
    num_targets: int
    num_tokens: int
    scattered: bool
    """The blocks on both sides are in no order, as in a pool that was used for a while; else neighbours."""

    @property
    def ours(self) -> Share:
        return Share(self.source, self.cut.source_rank, self.num_sources)

    @property
    def theirs(self) -> Share:
        return Share(self.target, self.cut.target_rank, self.num_targets)

    @property
    def source_blocks(self) -> tuple[BlockId, ...]:
        return self._blocks(self.source, 1)

    @property
    def target_blocks(self) -> tuple[BlockId, ...]:
        return self._blocks(self.target, 2)

    def _blocks(self, kv: KVSpec, seed: int) -> tuple[BlockId, ...]:
        count = kv.blocks_for(self.num_tokens)
        order = np.random.default_rng(seed).permutation(count) if self.scattered else np.arange(count)
        return tuple(BlockId(int(block)) for block in order)


class Opened(msgspec.Struct, frozen=True):
    agent_id: AgentId
    metadata: bytes
    place: PoolPlace


def spec(block_size: int, kv_heads: int) -> KVSpec:
    group = KVGroup(layers=LAYERS, kv_heads=kv_heads, head_bytes=2 * block_size * HEAD_DIM * 2)
    return KVSpec(dtype="bfloat16", block_size=block_size, head_dim=HEAD_DIM, groups=(group,))


KINDS = {"split": (1, 4), "join": (4, 1)}
"""Blocks of one size, by ranks of the source and of the target: part of a source's block becomes a whole one, or the other way round."""


def cells(quick: bool) -> Iterator[tuple[str, Cell]]:
    """A cut's heads of a prompt, in 4 layers."""
    heads_and_sizes = [(1, 4), (1, 8), (1, 16), (1, 32), (1, 64), (2, 64), (4, 64), (8, 64)]
    for kind, (sources, targets) in KINDS.items():
        for heads, size in heads_and_sizes[2:6:3] if quick else heads_and_sizes:
            for num_blocks in (32,) if quick else (8, 32, 128):
                for scattered in (False, True):
                    kv = spec(size, 4 * heads)
                    yield kind, cell(kv, kv, sources, targets, num_blocks * size, scattered)
    pairs = [(16, 64), (64, 16), (16, 128), (128, 16), (64, 128), (48, 64)]
    for source, target in pairs[:2] if quick else pairs:
        for heads in (2,) if quick else (1, 4):
            for num_tokens in (768,) if quick else (768, 3072):
                yield "sizes", cell(spec(source, heads), spec(target, heads), 1, 1, num_tokens, False)


def cell(source: KVSpec, target: KVSpec, num_sources: int, num_targets: int, num_tokens: int, scattered: bool) -> Cell:
    return Cell(
        source=source,
        target=target,
        cut=head_cuts(source.groups[0].kv_heads, num_sources, num_targets)[1 if max(num_sources, num_targets) > 1 else 0],
        num_sources=num_sources,
        num_targets=num_targets,
        num_tokens=num_tokens,
        scattered=scattered,
    )
