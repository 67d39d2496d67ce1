"""`Pool`: where KV blocks lie in memory, and how NIXL's descriptor lists number them. Pure arithmetic."""

from collections.abc import Sequence
from typing import TypeAlias

import msgspec
import numpy as np

from disaggd.ids import BlockId
from disaggd.transfer.layout import KVSpec, PoolPlace

Rows: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]
Indices: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.int32]]


class Region(msgspec.Struct, frozen=True):
    """Memory of this process, or of another's, as NIXL registers it: whole."""

    address: int
    num_bytes: int


class Descriptors(msgspec.Struct, frozen=True):
    """Runs of `length` bytes in a region, numbered: run i begins `offset + i · stride` bytes into it."""

    region: Region
    offset: int
    length: int
    stride: int
    count: int

    def rows(self) -> Rows:
        """As NIXL's strided rows, (address, length, device, stride, count), the device 0 in the host's memory: uint64 [1, 5]."""
        return np.array([(self.region.address + self.offset, self.length, 0, self.stride, self.count)], dtype=np.uint64)


class Pool(msgspec.Struct, frozen=True):
    """Blocks of geometry `kv` at `place`, laid out as `layout.py` says."""

    place: PoolPlace
    kv: KVSpec

    @property
    def num_blocks(self) -> int:
        return self.place.num_blocks

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.kv.bytes_per_block

    @property
    def region(self) -> Region:
        return Region(self.place.address, self.num_bytes)

    @property
    def can_be(self) -> bool:
        """Whether its bytes can be addressed, and its descriptors numbered: a place that came over the wire may be any two numbers."""
        start, num_descriptors = self.place.address, self.kv.num_layers * self.num_blocks
        return 0 <= start <= start + self.num_bytes < 2**63 and 0 < num_descriptors < 2**31

    def slices(self, heads: range) -> Descriptors:
        """These heads of each block of each layer, counted from the pool's first: descriptor `layer · num_blocks + block`.

        All heads of neighbouring blocks are neighbours, which NIXL merges into one write.
        """
        [group] = self.kv.groups
        assert 0 <= heads.start < heads.stop <= group.kv_heads
        offset, length = heads.start * group.head_bytes, len(heads) * group.head_bytes
        return Descriptors(self.region, offset, length, group.block_bytes, group.layers * self.num_blocks)

    def whole(self) -> Descriptors:
        """All heads of each block."""
        return self.slices(range(self.kv.groups[0].kv_heads))

    def holds(self, blocks: Sequence[BlockId]) -> bool:
        """Whether these are ids of blocks of this pool."""
        return all(0 <= block < self.num_blocks for block in blocks)

    def indices(self, layers: range, blocks: Sequence[BlockId]) -> Indices:
        """Descriptors of these blocks in these layers, layer by layer: int32 [layers · blocks]."""
        starts = np.arange(layers.start, layers.stop, dtype=np.int32) * np.int32(self.num_blocks)
        return (starts[:, None] + np.asarray(blocks, dtype=np.int32)[None, :]).reshape(-1)
