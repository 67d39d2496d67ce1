"""Checksums of blocks, taken where NIXL reads them and where it has written them. Runs on the transfer thread.

CRC-32, as zlib has it: 1.9 GB/s on a core that moves 1 to 2 GB/s over loopback, and other threads compute meanwhile (adler32: 2.9;
BLAKE2b: 0.45). It finds every burst of up to 32 bits, and misses one in four billion of all else: it is against faults, not against foes.
"""

import ctypes
import zlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from disaggd.ids import BlockId
from disaggd.transfer.landing import Inconsistent
from disaggd.transfer.notification import Checksums, Piece
from disaggd.transfer.pool import Descriptors, Indices, Pool


class Corrupt(Inconsistent):
    """Blocks have landed otherwise than they were when they were sent."""

    def __init__(self, blocks: list[BlockId]) -> None:
        super().__init__(f"the checksums of {len(blocks)} block(s) differ from what was sent, {blocks[0]} the first")
        self.num_blocks = len(blocks)


class Memory:
    """The bytes of descriptors in this process."""

    def __init__(self, descriptors: Descriptors) -> None:
        self.length = descriptors.length
        raw = (ctypes.c_uint8 * descriptors.region.num_bytes).from_address(descriptors.region.address)
        shape, strides = (descriptors.count, descriptors.length), (descriptors.stride, 1)
        self._rows: NDArray[np.uint8] = np.ndarray(shape, np.uint8, memoryview(raw), descriptors.offset, strides)

    def checksums(self, descriptors: Indices, num_blocks: int) -> tuple[int, ...]:
        """One per block, over its layers; `descriptors` go layer by layer: int32 [layers · num_blocks]."""
        return tuple(self._crc(layers) for layers in descriptors.reshape(-1, num_blocks).T)

    def _crc(self, descriptors: Indices) -> int:
        crc = 0
        for descriptor in descriptors:
            crc = zlib.crc32(self._rows[descriptor], crc)
        return crc


class Verification:
    """Of one grant, whose `blocks` are in `pool`: what each rank brings of them is checked once in each layer, or the grant has not
    landed whole.

    `memories`, by rank, have a descriptor for each of the pool's: what that rank writes of it.
    """

    def __init__(self, pool: Pool, memories: Mapping[int, Memory], blocks: tuple[BlockId, ...]) -> None:
        self._pool = pool
        self._memories = memories
        self._blocks = frozenset(blocks)
        self._checked: set[tuple[int, int, BlockId]] = set()
        """Rank, layer, block."""

    def check(self, piece: Piece) -> None:
        """To be called when the piece's bytes are there. Raises `Corrupt`, or `Inconsistent` when it does not say what they should be."""
        if not piece.kv_bytes:
            return
        if piece.sums is None:
            raise Inconsistent(f"piece {piece.seq} of rank {piece.rank} has no checksums")
        memory = self._memories.get(piece.rank)
        if memory is None:
            raise Inconsistent(f"rank {piece.rank} has nothing to bring")
        layers = range(piece.sums.first_layer, piece.sums.first_layer + piece.sums.num_layers)
        self._claim(piece, piece.sums, layers, memory.length)
        found = memory.checksums(self._pool.indices(layers, piece.sums.blocks), len(piece.sums.blocks))
        bad = [block for block, ours, theirs in zip(piece.sums.blocks, found, piece.sums.crcs, strict=True) if ours != theirs]
        if bad:
            raise Corrupt(bad)

    def _claim(self, piece: Piece, sums: Checksums, layers: range, length: int) -> None:
        """The numbers came over the wire: nothing is read that is not the grant's, and nothing twice in place of something else."""
        are_layers = 0 <= layers.start < layers.stop <= self._pool.kv.num_layers  # or there may be 2⁶² of them to go through
        claimed = {(piece.rank, layer, block) for layer in layers for block in sums.blocks} if are_layers else set()
        is_sound = (
            are_layers
            and len(sums.blocks) == len(sums.crcs)
            and len(claimed) == len(layers) * len(sums.blocks)
            and self._blocks.issuperset(sums.blocks)
            and len(claimed) * length == piece.kv_bytes
        )
        if not is_sound or claimed & self._checked:
            raise Inconsistent(f"the checksums of piece {piece.seq} of rank {piece.rank} are not of what it brought")
        self._checked |= claimed
