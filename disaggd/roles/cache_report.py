"""`CacheReport`: what an engine node's prefix cache holds, as one router is told. Runs on the compute thread.

A hash says that a block could be found when it was sent. It may be evicted by the time a request comes for it; then that is computed.
"""

from disaggd.cluster.protocol import CacheEvents
from disaggd.engine.blocks import BlockPool, CacheChanges


class CacheReport:
    """The events of one link, in order: a snapshot first, and again when the router asks, for it may have missed one."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._number = 0

    def snapshot(self) -> CacheEvents:
        """All that can be found. Nobody may have left changes of before in the pool, to be taken later."""
        return self._numbered(snapshot=True, stored=b"".join(self._pool.hashes()), evicted=b"")

    def changes(self, changes: CacheChanges) -> CacheEvents:
        return self._numbered(snapshot=False, stored=b"".join(changes.stored), evicted=b"".join(changes.evicted))

    def _numbered(self, *, snapshot: bool, stored: bytes, evicted: bytes) -> CacheEvents:
        number, self._number = self._number, self._number + 1
        return CacheEvents(number, snapshot, stored, evicted)
