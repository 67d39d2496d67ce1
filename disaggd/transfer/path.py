"""How KV gets from one cut into another: read where it lies, or repacked first. Pure, but for `Paths`, which is the transfer thread's."""

from typing import Literal, TypeAlias

from disaggd.transfer.pool import Pool, Region
from disaggd.transfer.repack import Repacked, Repacker, StagingRoom, check_room
from disaggd.transfer.reshape import HeadCut, check_pair
from disaggd.transfer.share import Share
from disaggd.transfer.source import Source, Sources

Path: TypeAlias = Literal["direct", "repacked"]


def path_of(source: Share, target: Share, cut: HeadCut, direct_slice_bytes: int) -> Path:
    """Which of the two a cut takes. Raises ConfigError naming the field over which there is none.

    Blocks of another size or dtype are always repacked. Blocks of the same are where it saves writes, and these are short: the target's
    rank has no other heads than these, so that its neighbouring blocks are one run of memory, and the source's has others in between.
    """
    check_pair(source.kv, target.kv)
    if (source.kv.dtype, source.kv.block_size) != (target.kv.dtype, target.kv.block_size):
        return "repacked"
    slice_bytes = len(cut.heads) * source.kv.groups[0].head_bytes
    merges = cut.heads == target.heads and cut.heads != source.heads
    return "repacked" if merges and slice_bytes < direct_slice_bytes else "direct"


class Paths:
    """`Sources` of both kinds: those of `direct`, and blocks that `repacker` makes of the same pool.

    No write has more than `max_layers` layers of `max_tokens` tokens.
    """

    def __init__(self, direct: Sources, repacker: Repacker, *, direct_slice_bytes: int, max_layers: int, max_tokens: int) -> None:
        self.share: Share = direct.share
        self.pool: Pool = direct.pool
        self.regions: tuple[Region, ...] = (*direct.regions, repacker.region)
        self._direct = direct
        self._repacker = repacker
        self._room = StagingRoom(repacker.region.num_bytes)
        self._direct_slice_bytes = direct_slice_bytes
        self._max_layers = max_layers
        self._max_tokens = max_tokens

    def of(self, cut: HeadCut, target: Share) -> Source:
        if path_of(self.share, target, cut, self._direct_slice_bytes) == "direct":
            return self._direct.of(cut, target)
        heads = self.share.local(cut)
        check_room(self._repacker.region.num_bytes, heads, target.kv, self._max_layers, self._max_tokens)
        return Repacked(self._repacker, self._room, heads, target.kv)
