"""Checksums of blocks, taken where NIXL reads them and where it has written them. Runs on the transfer thread.

CRC-32, as zlib has it: 1.9 GB/s on a core that moves 1 to 2 GB/s over loopback, and other threads compute meanwhile (adler32: 2.9;
BLAKE2b: 0.45). It finds every burst of up to 32 bits, and misses one in four billion of all else: it is against faults, not against foes.
"""

import ctypes
import zlib

import numpy as np
from numpy.typing import NDArray

from disaggd.ids import BlockId
from disaggd.transfer.landing import Inconsistent
from disaggd.transfer.notification import Checksums, Piece
from disaggd.transfer.pool import Indices, Pool


class Corrupt(Inconsistent):
    """Blocks have landed otherwise than they were when they were sent."""

    def __init__(self, blocks: list[BlockId]) -> None:
        super().__init__(f"the checksums of {len(blocks)} block(s) differ from what was sent, {blocks[0]} the first")
        self.num_blocks = len(blocks)


class Memory:
    """The bytes of a pool in this process."""

    def __init__(self, pool: Pool) -> None:
        assert len(pool.kv.groups) == 1, "descriptors of several sizes"
        self.pool = pool
        raw = (ctypes.c_uint8 * pool.num_bytes).from_address(pool.place.address)
        self._rows: NDArray[np.uint8] = np.frombuffer(memoryview(raw), dtype=np.uint8).reshape(-1, pool.kv.groups[0].block_bytes)
        """[descriptors, bytes of a block of one layer]"""

    def checksums(self, descriptors: Indices, num_blocks: int) -> tuple[int, ...]:
        """One per block, over its layers; `descriptors` go layer by layer: int32 [layers · num_blocks]."""
        return tuple(self._crc(layers) for layers in descriptors.reshape(-1, num_blocks).T)

    def _crc(self, descriptors: Indices) -> int:
        crc = 0
        for descriptor in descriptors:
            crc = zlib.crc32(self._rows[descriptor], crc)
        return crc


class Verification:
    """Of one grant, whose `blocks` are in `memory`: each is checked once in each layer, or the grant has not landed whole."""

    def __init__(self, memory: Memory, blocks: tuple[BlockId, ...]) -> None:
        self._memory = memory
        self._blocks = frozenset(blocks)
        self._checked: set[tuple[int, BlockId]] = set()

    def check(self, piece: Piece) -> None:
        """To be called when the piece's bytes are there. Raises `Corrupt`, or `Inconsistent` when it does not say what they should be."""
        if not piece.kv_bytes:
            return
        if piece.sums is None:
            raise Inconsistent(f"piece {piece.seq} of rank {piece.rank} has no checksums")
        layers = range(piece.sums.first_layer, piece.sums.first_layer + piece.sums.num_layers)
        self._claim(piece, piece.sums, layers)
        pool = self._memory.pool
        found = self._memory.checksums(pool.indices(layers, piece.sums.blocks), len(piece.sums.blocks))
        bad = [block for block, ours, theirs in zip(piece.sums.blocks, found, piece.sums.crcs, strict=True) if ours != theirs]
        if bad:
            raise Corrupt(bad)

    def _claim(self, piece: Piece, sums: Checksums, layers: range) -> None:
        """The numbers came over the wire: nothing is read that is not the grant's, and nothing twice in place of something else."""
        pool = self._memory.pool
        are_layers = 0 <= layers.start < layers.stop <= pool.kv.num_layers  # or there may be 2⁶² of them to go through
        claimed = {(layer, block) for layer in layers for block in sums.blocks} if are_layers else set()
        is_sound = (
            are_layers
            and len(sums.blocks) == len(sums.crcs)
            and len(claimed) == len(layers) * len(sums.blocks)
            and self._blocks.issuperset(sums.blocks)
            and pool.bytes_of(layers, len(sums.blocks)) == piece.kv_bytes
        )
        if not is_sound or claimed & self._checked:
            raise Inconsistent(f"the checksums of piece {piece.seq} of rank {piece.rank} are not of what it brought")
        self._checked |= claimed
