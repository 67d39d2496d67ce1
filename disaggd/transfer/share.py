"""`Share`: what one rank of a node holds of its KV cache, and which heads go from it to the ranks of another node. Pure arithmetic."""

import msgspec

from disaggd.transfer.layout import KVSpec
from disaggd.transfer.reshape import HeadCut, head_cuts, heads_of


class Share(msgspec.Struct, frozen=True):
    """Of a cache whose geometry over all ranks is `kv`. A node of one rank holds it whole."""

    kv: KVSpec
    rank: int = 0
    num_ranks: int = 1

    @property
    def heads(self) -> range:
        """The KV heads that it holds."""
        return heads_of(self.rank, self.num_ranks, self._kv_heads)

    @property
    def held(self) -> KVSpec:
        """The geometry of the rank's own pool."""
        if self.num_ranks == 1:
            return self.kv
        [group] = self.kv.groups
        return msgspec.structs.replace(self.kv, groups=(msgspec.structs.replace(group, kv_heads=len(self.heads)),))

    def local(self, cut: HeadCut) -> range:
        """The heads of `cut`, counted from the first that this rank holds."""
        return range(cut.heads.start - self.heads.start, cut.heads.stop - self.heads.start)

    def cuts_to(self, num_targets: int) -> list[HeadCut]:
        """What it writes into the ranks of a node of so many; nothing, where other ranks hold the same heads and do."""
        return [cut for cut in head_cuts(self._kv_heads, self.num_ranks, num_targets) if cut.source_rank == self.rank]

    def cuts_from(self, num_sources: int) -> list[HeadCut]:
        """What the ranks of a node of so many write into it: each of its heads once."""
        return [cut for cut in head_cuts(self._kv_heads, num_sources, self.num_ranks) if cut.target_rank == self.rank]

    @property
    def _kv_heads(self) -> int:
        return self.kv.groups[0].kv_heads


def block_bytes(kv: KVSpec, num_ranks: int) -> int:
    """Of a block over all layers and ranks: what is written for it to a node of so many. A head that several ranks hold counts for each."""
    return sum(Share(kv, rank, num_ranks).held.bytes_per_block for rank in range(num_ranks))
