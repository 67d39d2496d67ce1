"""The KV pool's blocks: how many hold on to each, and which full ones are still worth finding again.

References decide a block's life, never a sequence's state: a sequence holds one reference on each block of its table, a
grant one on each block it promised, a push one on each block it reads. When the last is released, a block that was
registered under its digest stays cached until its memory is wanted; any other is free. So each block is one of three:

    free ─► held ─► free                 nothing in it can be found
            held ⇄ cached ─► held        found again by its digest; or evicted, and held for something else

Owned by the compute thread alone. Knows block ids and digests only: not what the bytes are, nor where they lie.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass

from disaggd.ids import BlockHash, BlockId
from disaggd.prefix import PrefixHasher

GRANT_MARGIN = 20
"""One block in so many stays free of grants: 5 %."""


@dataclass(frozen=True, slots=True)
class CacheChanges:
    """Hashes that can be found since the last time somebody asked, and those that no longer can."""

    stored: tuple[BlockHash, ...]
    evicted: tuple[BlockHash, ...]


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, handed out least recently used first. `hasher` None: nothing is cached.

    Free blocks go first, in the order they were freed, then cached ones. That order keeps neighbours together (a sequence's
    blocks are freed in order), and neighbours travel as one descriptor.
    """

    def __init__(self, num_blocks: int, block_size: int, hasher: PrefixHasher | None = None) -> None:
        assert num_blocks > 0 and block_size > 0
        assert hasher is None or hasher.block_size == block_size
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.hasher = hasher
        self.num_evicted = 0
        self._free = deque(BlockId(i) for i in range(num_blocks))
        self._cached: OrderedDict[BlockId, None] = OrderedDict()
        """Registered, and held by nobody; the least recently used first."""
        self._references = [0] * num_blocks
        self._digests: dict[BlockId, bytes] = {}
        """Of registered blocks, held or cached."""
        self._registered: dict[BlockHash, BlockId] = {}
        self._stored: dict[BlockHash, None] = {}
        self._evicted: dict[BlockHash, None] = {}

    # ── what there is ────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and that can be found: evicted when their memory is wanted."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """What `allocate` can give: free or cached."""
        return len(self._free) + len(self._cached)

    def references(self, block: BlockId) -> int:
        """How many hold on to `block`."""
        return self._references[block]

    def num_unheld(self, blocks: Iterable[BlockId]) -> int:
        """How many of `blocks` nobody holds: whoever takes them leaves so many fewer available."""
        return sum(not self._references[block] for block in blocks)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    # ── references ───────────────────────────────────────────────────────────────────────────────────────────────────

    def allocate(self, count: int) -> list[BlockId] | None:
        """`count` blocks with one reference each, or None, and nothing taken, when fewer are available."""
        if count > self.num_available:
            return None
        num_free = min(count, len(self._free))
        blocks = [self._free.popleft() for _ in range(num_free)]
        evicted = [self._evict() for _ in range(count - num_free)]
        blocks += reversed(evicted)  # of a sequence the deepest goes first: neighbours again
        for block in blocks:
            self._references[block] = 1
        return blocks

    def retain(self, blocks: Iterable[BlockId]) -> None:
        """Add one reference to each of `blocks`, which somebody must hold already."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is free: nothing to retain"
            self._references[block] += 1

    def take(self, blocks: Iterable[BlockId]) -> None:
        """Add one reference to each of `blocks`, which are registered, held or not."""
        for block in blocks:
            assert block in self._digests, f"block {block} is not registered: nothing to take"
            if not self._references[block]:
                del self._cached[block]
            self._references[block] += 1

    def release(self, blocks: Iterable[BlockId]) -> None:
        """Give back one reference to each of `blocks`; those that nobody holds any more are free, or cached.

        `blocks` are in a sequence's order: the deepest of them are evicted first, for they are of no use without those before.
        """
        unheld = []
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is freed twice"
            self._references[block] -= 1
            if not self._references[block]:
                unheld.append(block)
        self._free.extend(block for block in unheld if block not in self._digests)
        self._cached.update((block, None) for block in reversed(unheld) if block in self._digests)

    def room_for_grant(self, need: int, num_running: int) -> bool:
        """Whether `need` blocks may be promised to another node while `num_running` sequences grow here.

        Each running sequence keeps a block to grow into, and the pool a margin, so that a grant does not preempt at
        once. A pool that nobody uses has no one to protect: whatever fits it can be granted.
        """
        if self.num_available == self.num_blocks:
            return need <= self.num_blocks
        margin = -(-self.num_blocks // GRANT_MARGIN)
        return self.num_available >= need + num_running + margin

    # ── what can be found ────────────────────────────────────────────────────────────────────────────────────────────

    def register(self, block: BlockId, digest: bytes) -> None:
        """A held block is full and stands for `digest` from now on; it may not be written again while it can be found.

        Nothing happens if another block does already, or has the same hash: this one stays as it is, its holders' own.
        """
        assert self.hasher is not None and self._references[block] > 0, f"block {block} is free: nothing to register"
        assert block not in self._digests, f"block {block} is registered twice"
        name = self.hasher.hash(digest)
        if name in self._registered:
            return
        self._registered[name] = block
        self._digests[block] = digest
        if name in self._evicted:
            del self._evicted[name]
        else:
            self._stored[name] = None

    def find(self, digests: Iterable[bytes]) -> list[BlockId]:
        """Registered blocks of the longest beginning of `digests`. Takes nothing: hold them, or they may be gone."""
        found: list[BlockId] = []
        if self.hasher is None:
            return found
        for digest in digests:
            block = self._registered.get(self.hasher.hash(digest))
            if block is None or self._digests[block] != digest:
                break
            found.append(block)
        return found

    def touch(self, digests: Iterable[bytes]) -> None:
        """These were used just now, in a sequence's order; for who released them piecemeal."""
        for block in reversed(self.find(digests)):
            if not self._references[block]:
                self._cached.move_to_end(block)

    def clear(self) -> None:
        """Evict all that is cached."""
        self._free.extend([self._evict() for _ in range(len(self._cached))])

    def hashes(self) -> list[BlockHash]:
        """All that can be found, held or cached."""
        return list(self._registered)

    def take_changes(self) -> CacheChanges:
        """What has changed since this was last called. Never more than twice the pool: what came and went is left out."""
        changes = CacheChanges(tuple(self._stored), tuple(self._evicted))
        self._stored, self._evicted = {}, {}
        return changes

    def _evict(self) -> BlockId:
        assert self.hasher is not None
        block, _ = self._cached.popitem(last=False)
        name = self.hasher.hash(self._digests.pop(block))
        del self._registered[name]
        self.num_evicted += 1
        if name in self._stored:
            del self._stored[name]
        else:
            self._evicted[name] = None
        return block
