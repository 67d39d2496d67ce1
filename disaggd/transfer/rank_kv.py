"""`RankKV`: all that whoever moves a rank's KV must know of it. Plain data; knows no NIXL and no torch."""

from collections.abc import Callable

import msgspec

from disaggd.transfer.layout import KVSpec, PoolPlace
from disaggd.transfer.repack import Repacker
from disaggd.transfer.share import Share
from disaggd.transfer.source import Staging


class RankKV(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank has of its node's KV."""

    kv: KVSpec
    """Of all ranks."""
    rank: int
    num_ranks: int
    place: PoolPlace
    """Of its part of the pool."""
    num_bytes: int
    is_hosts: bool
    """Whether it lies in the host's own memory."""
    make_repacker: Callable[[int], Repacker]
    """Given the bytes of its memory."""
    staging: Staging | None
    """What the KV goes through if NIXL is not shown the pool."""
    fp8_landing: PoolPlace | None
    """Where peers write in fp8, if they do."""
    on_start: Callable[[], None]
    """To be called first on each thread that has a device copy."""

    @property
    def share(self) -> Share:
        return Share(self.kv, self.rank, self.num_ranks)
