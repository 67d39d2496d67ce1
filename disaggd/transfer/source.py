"""`Source`: the memory that writes to one rank of a peer read from, and how blocks come to be there. Runs on the transfer thread.

NIXL moves bytes between the memories of two hosts. A pool in one of them is registered, and read where it lies. A pool in a
GPU's memory is not: its blocks are copied to memory of the host, from there to the host of the peer, and there to its GPU.
UCX would write from GPU to GPU by itself, and does over TCP by copies and messages of its own: at 1.3 GB/s, and when the writer
dies over it, the process that it writes to aborts (`ucp_request.inl: Endpoint timeout`, SIGABRT; measured on an H200).
"""

from typing import Protocol

import msgspec
import numpy as np

from disaggd.errors import ConfigError
from disaggd.transfer.layout import KVPath, KVSpec, PoolPlace, Span, check_pair
from disaggd.transfer.messages import IsReady, at_once
from disaggd.transfer.pool import Descriptors, Indices, Pool, Region
from disaggd.transfer.reshape import HeadCut
from disaggd.transfer.share import Share, block_bytes


class Load(msgspec.Struct, frozen=True):
    """Blocks, where a write finds them."""

    indices: Indices
    """Descriptors of `registered`, one for each target block and layer, layer by layer."""
    is_ready: IsReady
    """Whether they are there."""
    made_bytes: int = 0
    """That the call itself has made, and taken its time for."""


class Source(Protocol):
    """What one rank of a peer is written from: a descriptor is what a block of its pool, in one layer, gets from this rank."""

    path: KVPath
    registered: Descriptors
    """What NIXL reads, in one of the `regions`."""

    def load(self, layers: range, span: Span) -> Load | None:
        """Begin to bring computed tokens to where they can be read. None: there is no room, until something is unloaded."""

    def unload(self, load: Load) -> None:
        """Nothing reads it any more, or will, ready or not."""


class Sources(Protocol):
    """All that this rank writes to its peers from."""

    share: Share
    pool: Pool
    """Whose blocks are pushed."""
    regions: tuple[Region, ...]
    """What NIXL has to know."""

    def of(self, cut: HeadCut, target: Share) -> Source:
        """What the cut's rank of the target is written from. Raises ConfigError where that cannot be."""


def check_direct(ours: KVSpec, theirs: KVSpec) -> None:
    """Raises ConfigError naming the field over which a block of one cannot be copied to a block of the other as it is."""
    check_pair(ours, theirs)
    for field in ("dtype", "block_size"):
        if getattr(ours, field) != getattr(theirs, field):
            raise ConfigError(f"{field} differs: {getattr(ours, field)} and {getattr(theirs, field)}")
    if ours != theirs:
        raise ConfigError(f"groups differ: {ours.groups} and {theirs.groups}")


class InPlace:
    """The pool is registered itself: nothing is to be brought anywhere."""

    def __init__(self, share: Share, place: PoolPlace) -> None:
        self.share = share
        self.pool = Pool(place, share.held)
        self.regions: tuple[Region, ...] = (self.pool.region,)

    def of(self, cut: HeadCut, target: Share) -> Source:
        check_direct(self.share.kv, target.kv)
        return InPlaceCut(self.pool, self.share.local(cut))


class InPlaceCut:
    """Some heads of each block of the pool, read where they lie."""

    path: KVPath = "direct"

    def __init__(self, pool: Pool, heads: range) -> None:
        self._pool = pool
        self.registered = pool.slices(heads)

    def load(self, layers: range, span: Span) -> Load:
        assert span.start == 0, "whole blocks are written"
        return Load(self._pool.indices(layers, span.blocks), at_once)

    def unload(self, load: Load) -> None:
        """It is the pool's."""


class OutOfReach:
    """A pool that NIXL is not shown, and no memory to copy it to: what of it is written is made into other blocks first, if any is."""

    regions: tuple[Region, ...] = ()

    def __init__(self, share: Share, place: PoolPlace) -> None:
        self.share = share
        self.pool = Pool(place, share.held)

    def of(self, cut: HeadCut, target: Share) -> Source:
        check_pair(self.share.kv, target.kv)
        raise ConfigError("wire_dtype differs: a node on a GPU that is written to in fp8 writes no blocks as they are")


class Staging(Protocol):
    """Memory of the host, laid out as a pool of fewer blocks, for the blocks of a pool that lies elsewhere."""

    @property
    def place(self) -> PoolPlace: ...

    def copy_out(self, sources: Indices, targets: Indices) -> IsReady:
        """Copy descriptors of the pool to descriptors of this memory. Copies are made in the order of the calls."""


class Staged:
    """Each load takes as many descriptors of the staging memory as it has, whichever are free: all layers' are of one size.

    What is unloaded before it is ready can be taken by others at once: their copies come after its own.
    """

    def __init__(self, share: Share, place: PoolPlace, staging: Staging) -> None:
        self.share = share
        self.pool = Pool(place, share.held)
        self.staged = Pool(staging.place, share.held)
        self.regions: tuple[Region, ...] = (self.staged.region,)
        self._copy_out = staging.copy_out
        self._num_descriptors = self.staged.whole().count
        self._free = list(range(self._num_descriptors))
        """The last that came free is taken first: what was just sent may still be in the processor's cache."""

    def of(self, cut: HeadCut, target: Share) -> Source:
        check_direct(self.share.kv, target.kv)
        return StagedCut(self, self.share.local(cut))

    def load(self, layers: range, span: Span) -> Load | None:
        """Whole blocks, whichever of their heads are written."""
        assert span.start == 0, "whole blocks are written"
        sources = self.pool.indices(layers, span.blocks)
        assert 0 < len(sources) <= self._num_descriptors, f"{len(sources)} descriptors at once, of {self._num_descriptors} that there are"
        if len(sources) > len(self._free):
            return None
        targets = np.array(self._free[-len(sources) :], dtype=np.int32)
        del self._free[-len(sources) :]
        return Load(targets, self._copy_out(sources, targets))

    def unload(self, load: Load) -> None:
        self._free += load.indices.tolist()


class StagedCut:
    """Some heads of each block of the staging memory, which each is brought to anew for every rank that it is written to."""

    path: KVPath = "staged"

    def __init__(self, staged: Staged, heads: range) -> None:
        self.registered = staged.staged.slices(heads)
        self.load, self.unload = staged.load, staged.unload


def staging_blocks(
    kv: KVSpec, staging_bytes: int, *, num_ranks: int, pool_blocks: int | None, max_step_tokens: int, layer_group: int
) -> int:
    """How many blocks the staging memory has: what `staging_bytes` of all ranks hold, and no more than the pool has, where that is known.

    Raises ConfigError where it does not hold what one write takes: a layer group of what a step computes of one prompt.
    """
    num_bytes = block_bytes(kv, num_ranks)
    held = staging_bytes // num_bytes
    num_blocks = held if pool_blocks is None else min(held, pool_blocks)
    written = min(layer_group, kv.num_layers) * kv.blocks_for(max_step_tokens)
    if num_blocks == pool_blocks or (num_blocks and written <= num_blocks * kv.num_layers):
        return num_blocks
    least = max(1, -(-written // kv.num_layers)) * num_bytes
    raise ConfigError(f"transfer.staging: {staging_bytes:,} bytes are less than one write takes; it must have {least:,}")
