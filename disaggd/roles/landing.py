"""`Landings`: the blocks that a decode node's grants name, and the way from there into its pool. Runs on the compute thread.

On a CPU peers write into the pool itself, and what has landed is where it belongs. On a GPU they write into memory of the host; a
grant then has blocks in both, and what has landed is copied into the pool while the engine computes on. Only the compute thread
asks for such a copy, and holds the blocks on both sides until it is done: a grant that was given up is never copied, so its blocks
of the pool, which no peer can reach, are free at once.
"""

from collections.abc import Iterable

import msgspec

from disaggd.engine.blocks import BlockPool
from disaggd.ids import BlockId
from disaggd.transfer.landing_memory import LandingMemory
from disaggd.transfer.messages import IsReady


class Copy(msgspec.Struct, frozen=True):
    """Blocks under way from where they landed into the pool."""

    landed: tuple[BlockId, ...]
    blocks: list[BlockId]
    """The first of which they go to; those behind are for tokens to come."""
    is_done: IsReady


class Landings:
    """Reserves and releases on both sides. `memory` None: peers write into the pool."""

    def __init__(self, pool: BlockPool, memory: LandingMemory | None) -> None:
        self._pool = pool
        self._memory = memory
        self._landing = pool if memory is None else BlockPool(memory.place.num_blocks, pool.block_size)
        self._num_reserved = 0

    @property
    def is_staged(self) -> bool:
        """Whether peers write elsewhere than into the pool."""
        return self._memory is not None

    @property
    def max_tokens(self) -> int | None:
        """Tokens whose KV can land at once, however long one waits; None: as many as the pool holds."""
        return None if self._memory is None else self._landing.num_blocks * self._landing.block_size

    @property
    def num_reserved(self) -> int:
        """Blocks of the pool that wait for what lands elsewhere, or for it to be copied."""
        return self._num_reserved

    def has_room(self, num_pushed: int) -> bool:
        """Whether so many blocks could land, apart from their room in the pool."""
        return self._memory is None or num_pushed <= self._landing.num_free

    def reserve(self, num_blocks: int, num_pushed: int) -> tuple[list[BlockId], list[BlockId]]:
        """For a grant: the blocks that it names, and those of the pool that wait for them, none where these are the same.

        `num_blocks` is for the sequence and its first token, `num_pushed` of them are pushed. The caller has asked for room.
        """
        blocks = self._pool.allocate(num_blocks)
        assert blocks is not None, "room was checked"
        if self._memory is None:
            return blocks, []
        named = self._landing.allocate(num_pushed)
        assert named is not None, "room was checked"
        self._num_reserved += num_blocks
        return named, blocks

    def free(self, named: Iterable[BlockId]) -> None:
        """Nobody can write these blocks of a grant any more."""
        self._landing.release(named)

    def unreserve(self, blocks: list[BlockId]) -> None:
        """Nothing will be copied into these blocks of the pool."""
        self._pool.release(blocks)
        self._num_reserved -= len(blocks)

    def copy_in(self, landed: tuple[BlockId, ...], blocks: list[BlockId]) -> Copy:
        """Begin to copy what has landed into the blocks that were reserved for it."""
        assert self._memory is not None
        return Copy(landed, blocks, self._memory.copy_in(landed, blocks[: len(landed)]))

    def copied(self, copy: Copy) -> list[BlockId]:
        """The copy is done: what landed may be overwritten, and the blocks of the pool are the caller's."""
        self._landing.release(copy.landed)
        self._num_reserved -= len(copy.blocks)
        return copy.blocks
