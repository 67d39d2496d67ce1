"""How KV gets from one cut into another: read where it lies, or repacked first. Pure, but for `Paths`, which is the transfer thread's."""

from collections.abc import Callable
from typing import Literal, TypeAlias

import msgspec

from disaggd.transfer.layout import KVSpec, check_pair
from disaggd.transfer.pool import Pool, Region
from disaggd.transfer.repack import Repacked, Repacker, StagingRoom, check_made, check_room, room_bytes
from disaggd.transfer.reshape import HeadCut
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


class Repacking(msgspec.Struct, frozen=True, kw_only=True):
    """What repacked writes are made by, and when. No write has more than `max_layers` layers of `max_tokens` tokens."""

    repacker: Repacker
    direct_slice_bytes: int
    max_layers: int
    max_tokens: int


class RepackSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the file says of it, for every rank of a node."""

    staging_bytes: int
    """At most."""
    direct_slice_bytes: int
    max_layers: int
    max_tokens: int

    def made(self, held: KVSpec, make_repacker: Callable[[int], Repacker]) -> Repacking:
        """For a rank that holds so much of every block; `make_repacker` is given the bytes of its memory."""
        return Repacking(
            repacker=make_repacker(self._room_bytes(held)),
            direct_slice_bytes=self.direct_slice_bytes,
            max_layers=self.max_layers,
            max_tokens=self.max_tokens,
        )

    def check(self, source: KVSpec, num_sources: int, target: KVSpec, num_targets: int) -> None:
        """Raises ConfigError naming the field over which some rank of a node could not write to a rank of another."""
        for rank in range(num_sources):
            ours = Share(source, rank, num_sources)
            for cut in ours.cuts_to(num_targets):
                if path_of(ours, Share(target, cut.target_rank, num_targets), cut, self.direct_slice_bytes) == "repacked":
                    check_room(self._room_bytes(ours.held), cut.heads, target, self.max_layers, self.max_tokens)

    def _room_bytes(self, held: KVSpec) -> int:
        return min(self.staging_bytes, room_bytes(held, self.max_layers, self.max_tokens))


class Paths:
    """`Sources` of both kinds: those of `direct`, and blocks that are made of the same pool."""

    def __init__(self, direct: Sources, repacking: Repacking) -> None:
        region = repacking.repacker.region
        self.share: Share = direct.share
        self.pool: Pool = direct.pool
        self.regions: tuple[Region, ...] = (*direct.regions, region)
        self._direct = direct
        self._repacking = repacking
        self._room = StagingRoom(region.num_bytes)

    def of(self, cut: HeadCut, target: Share) -> Source:
        repacking = self._repacking
        if path_of(self.share, target, cut, repacking.direct_slice_bytes) == "direct":
            return self._direct.of(cut, target)
        check_made(target.kv)
        heads, repacker = self.share.local(cut), repacking.repacker
        check_room(repacker.region.num_bytes, heads, target.kv, repacking.max_layers, repacking.max_tokens)
        return Repacked(repacker, self._room, heads, target.kv)
