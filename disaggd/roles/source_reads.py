"""`SourceReads`: the blocks that posted writes read, each with a reference until the write has ended. Runs on the compute thread."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from disaggd.engine.blocks import BlockPool
from disaggd.ids import BlockId, GrantToken

Reader = TypeVar("Reader")


class SourceReads(Generic[Reader]):
    """Of one node's pushes. A block may be read by several at once, and by sequences."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._reads: Counter[BlockId] = Counter()
        """Writes that read a block; no zeros."""
        self._by_push: dict[GrantToken, tuple[Reader, Counter[BlockId]]] = {}

    def begin(self, token: GrantToken, reader: Reader, blocks: tuple[BlockId, ...]) -> None:
        """`reader` is whatever shall be told of the push for which they are read."""
        self._pool.retain(blocks)
        self._reads.update(blocks)
        _, reads = self._by_push.setdefault(token, (reader, Counter()))
        reads.update(blocks)

    def end(self, token: GrantToken, blocks: tuple[BlockId, ...]) -> None:
        self._pool.release(blocks)
        _, of_push = self._by_push[token]
        for reads in (self._reads, of_push):
            _subtract(reads, blocks)
        if not of_push:
            del self._by_push[token]

    @property
    def num_held(self) -> int:
        """Blocks that only pushes hold on to."""
        return sum(self._is_held(block) for block in self._reads)

    def held(self) -> Iterator[tuple[Reader, tuple[BlockId, ...]]]:
        """Those blocks, by push; a block that two of them read is with both."""
        for reader, reads in self._by_push.values():
            if blocks := tuple(sorted(filter(self._is_held, reads))):
                yield reader, blocks

    def _is_held(self, block: BlockId) -> bool:
        return self._pool.references(block) == self._reads[block]


def _subtract(reads: Counter[BlockId], blocks: Iterable[BlockId]) -> None:
    for block in blocks:
        reads[block] -= 1
        if not reads[block]:
            del reads[block]
