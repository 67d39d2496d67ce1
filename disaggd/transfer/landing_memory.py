"""`LandingMemory`: what peers write in place of a pool. The one contract of whoever copies KV on from there into the pool."""

from collections.abc import Sequence
from typing import Protocol

from disaggd.ids import BlockId
from disaggd.transfer.layout import PoolPlace
from disaggd.transfer.messages import IsReady


class LandingMemory(Protocol):
    """Memory of the host, of one rank or of all: `KVStaging`, `KVUnpacker`, `RanksLanding`, or a test's."""

    @property
    def place(self) -> PoolPlace:
        """Where it lies; of several ranks, the first one's part."""

    def copy_in(self, landed: Sequence[BlockId], blocks: Sequence[BlockId]) -> IsReady:
        """Copy blocks of this memory to blocks of the pool, all layers of them, which no launched step writes. Raises RankLost."""
