"""The KV pool's blocks: which are free, and how many hold on to each.

References decide a block's life, never a sequence's state: a sequence holds one reference on each block of its table, a
grant one on each block it promised, a push one on each block it reads. A block is free when the last is released.

Owned by the compute thread alone. Knows block ids only: not what the bytes are, nor where they lie.
"""

from collections import deque
from collections.abc import Iterable

from disaggd.ids import BlockId

GRANT_MARGIN = 20
"""One block in so many stays free of grants: 5 %."""


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, handed out least recently freed first.

    That order keeps neighbours together (a sequence's blocks are freed in order), and neighbours travel as one
    descriptor; it is also the order in which cached blocks will be evicted.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0 and block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = deque(BlockId(i) for i in range(num_blocks))
        self._references = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def references(self, block: BlockId) -> int:
        """How many hold on to `block`."""
        return self._references[block]

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[BlockId] | None:
        """`count` blocks with one reference each, or None, and nothing taken, when fewer are free."""
        if count > len(self._free):
            return None
        blocks = [self._free.popleft() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def retain(self, blocks: Iterable[BlockId]) -> None:
        """Add one reference to each of `blocks`, which somebody must hold already."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is free: nothing to retain"
            self._references[block] += 1

    def release(self, blocks: Iterable[BlockId]) -> None:
        """Give back one reference to each of `blocks`; those that nobody holds any more are free."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is freed twice"
            self._references[block] -= 1
            if not self._references[block]:
                self._free.append(block)

    def room_for_grant(self, need: int, num_running: int) -> bool:
        """Whether `need` blocks may be promised to another node while `num_running` sequences grow here.

        Each running sequence keeps a block to grow into, and the pool a margin, so that a grant does not preempt at
        once. A pool that nobody uses has no one to protect: whatever fits it can be granted.
        """
        if self.num_free == self.num_blocks:
            return need <= self.num_blocks
        margin = -(-self.num_blocks // GRANT_MARGIN)
        return self.num_free >= need + num_running + margin
