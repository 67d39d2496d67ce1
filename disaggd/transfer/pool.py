"""`Pool`: where KV blocks lie in memory, and how NIXL's descriptor lists number them. Pure arithmetic."""

from collections.abc import Sequence
from typing import TypeAlias

import msgspec
import numpy as np

from disaggd.ids import BlockId
from disaggd.transfer.layout import KVSpec, PoolPlace

Rows: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]
Indices: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.int32]]


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
    def can_be(self) -> bool:
        """Whether its bytes can be addressed, and its descriptors numbered: a place that came over the wire may be any two numbers."""
        start, num_descriptors = self.place.address, self.kv.num_layers * self.num_blocks
        return 0 <= start <= start + self.num_bytes < 2**63 and 0 < num_descriptors < 2**31

    def rows(self) -> Rows:
        """One descriptor per block and layer, as NIXL's strided rows: uint64 [groups, 5].

        A row is (address, length, device, stride, count), the device 0 in the host's memory. Descriptor
        `layer · num_blocks + block` is that block.
        """
        rows, address = [], self.place.address
        for group in self.kv.groups:
            count = group.layers * self.num_blocks
            rows.append((address, group.block_bytes, 0, group.block_bytes, count))
            address += count * group.block_bytes
        return np.array(rows, dtype=np.uint64)

    def holds(self, blocks: Sequence[BlockId]) -> bool:
        """Whether these are ids of blocks of this pool."""
        return all(0 <= block < self.num_blocks for block in blocks)

    def indices(self, layers: range, blocks: Sequence[BlockId]) -> Indices:
        """Descriptors of these blocks in these layers, layer by layer: int32 [layers · blocks].

        Neighbouring ids stay neighbours, which NIXL merges into one write.
        """
        starts = np.arange(layers.start, layers.stop, dtype=np.int32) * np.int32(self.num_blocks)
        return (starts[:, None] + np.asarray(blocks, dtype=np.int32)[None, :]).reshape(-1)

    def bytes_of(self, layers: range, num_blocks: int) -> int:
        """Bytes of that many blocks in these layers."""
        layer_bytes = [group.block_bytes for group in self.kv.groups for _ in range(group.layers)]
        return num_blocks * sum(layer_bytes[layers.start : layers.stop])
