"""`PrefixCache`: what a sequence finds computed already, what it leaves behind, and what another is computing for it right now.

Full blocks are found by the digest of all tokens up to their end (`disaggd/prefix.py`), a prompt's and generated ones alike. A block
is registered once its K and V are known to be there: after the step that filled it has been settled, or the whole grant has landed.

Owned by the compute thread alone. Knows nothing of tensors.
"""

from collections.abc import Iterable

from disaggd.engine.blocks import BlockPool
from disaggd.engine.sequence import Sequence
from disaggd.ids import BlockId


class PrefixCache:
    """The cache of one pool; if that has no hasher, nothing is ever found."""

    def __init__(self, pool: BlockPool) -> None:
        self.queried_tokens = 0
        """Of sequences that began here, since the start; not again of those that were preempted."""
        self.hit_tokens = 0
        """Of those, the ones whose K and V were cached."""
        self._pool = pool
        self._pending: dict[bytes, Sequence] = {}
        """Full blocks that running sequences compute, and which one does."""

    def find(self, sequence: Sequence) -> list[BlockId]:
        """Blocks of its longest cached prefix; the last token is always left to compute, for its logits are wanted. Takes nothing."""
        if self._pool.hasher is None:
            return []
        found = self._pool.find(self._digests(sequence)[: self._most(sequence)])
        sequence.num_found = len(found) * self._pool.block_size
        return found

    def find_all(self, sequence: Sequence) -> list[BlockId] | None:
        """As `find`; None while a running sequence computes the next block that this one lacks: it is to wait for it."""
        if sequence.awaited in self._pending:
            return None
        found = self.find(sequence)
        sequence.awaited = sequence.digests[len(found)] if len(found) < min(self._most(sequence), len(sequence.digests)) else None
        return None if sequence.awaited in self._pending else found

    def begin(self, sequence: Sequence, blocks: list[BlockId]) -> None:
        """`sequence` starts from `blocks`, which it found, and whose references are its own."""
        num_cached = len(blocks) * self._pool.block_size
        sequence.num_computed = num_cached
        sequence.num_registered = len(blocks)
        if sequence.num_preemptions:
            return
        sequence.num_cached = num_cached
        self.queried_tokens += len(sequence.tokens)
        self.hit_tokens += num_cached

    # ── blocks that are filled ───────────────────────────────────────────────────────────────────────────────────────

    def register(self, sequence: Sequence, num_tokens: int) -> None:
        """K and V of its first `num_tokens` tokens are in its blocks, which it holds: the full ones may be found from now on."""
        num_full = num_tokens // self._pool.block_size
        if self._pool.hasher is None or num_full <= sequence.num_registered:
            return
        digests = self._digests(sequence)
        for index in range(sequence.num_registered, num_full):
            self._pool.register(sequence.block_table[index], digests[index])
            self._drop(sequence, digests[index])
        sequence.num_registered = num_full

    def keep(self, sequence: Sequence, first: int, blocks: Iterable[BlockId]) -> None:
        """K and V of its full blocks from the `first` on are in `blocks`, which another holds: they may be found from now on."""
        for block, digest in zip(blocks, self._digests(sequence)[first:], strict=False):
            self._pool.register(block, digest)

    # ── blocks that are being filled ─────────────────────────────────────────────────────────────────────────────────

    def announce(self, sequence: Sequence) -> None:
        """It is about to compute the rest of its tokens: those who need the same blocks may wait for them."""
        for digest in sequence.digests[sequence.num_registered :]:
            self._pending.setdefault(digest, sequence)

    def leave(self, sequence: Sequence) -> None:
        """It computes no more, whether it has ended or was preempted: nobody need wait for it."""
        for digest in sequence.digests[sequence.num_registered :]:
            self._drop(sequence, digest)

    def _drop(self, sequence: Sequence, digest: bytes) -> None:
        if self._pending.get(digest) is sequence:
            del self._pending[digest]

    def _most(self, sequence: Sequence) -> int:
        """Blocks that it could find."""
        return (len(sequence.tokens) - 1) // self._pool.block_size

    def _digests(self, sequence: Sequence) -> list[bytes]:
        """Of all its full blocks; each is computed once."""
        assert self._pool.hasher is not None
        if len(sequence.digests) < len(sequence.tokens) // self._pool.block_size:
            sequence.digests = self._pool.hasher.digests(sequence.tokens, sequence.salt, sequence.digests)
        return sequence.digests
