"""`Source`: the memory that writes read from, and how blocks come to be there. Runs on the transfer thread.

NIXL moves bytes between the memories of two hosts. A pool in one of them is registered, and read where it lies. A pool in a
GPU's memory is not: its blocks are copied to memory of the host, from there to the host of the peer, and there to its GPU.
UCX would write from GPU to GPU by itself, and does over TCP by copies and messages of its own: at 1.3 GB/s, and when the writer
dies over it, the process that it writes to aborts (`ucp_request.inl: Endpoint timeout`, SIGABRT; measured on an H200).
"""

from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np

from disaggd.errors import ConfigError
from disaggd.ids import BlockId
from disaggd.transfer.layout import KVSpec, PoolPlace
from disaggd.transfer.messages import IsReady, at_once
from disaggd.transfer.pool import Indices, Pool


class Load(msgspec.Struct, frozen=True):
    """Blocks, where a write finds them."""

    indices: Indices
    """Descriptors of the registered memory, in the order of `Pool.indices`."""
    is_ready: IsReady
    """Whether the blocks are there."""


class Source(Protocol):
    pool: Pool
    """Whose blocks are pushed."""
    registered: Pool
    """What NIXL reads."""

    def load(self, layers: range, blocks: Sequence[BlockId]) -> Load | None:
        """Begin to bring computed blocks to where they can be read. None: there is no room, until something is unloaded."""

    def unload(self, load: Load) -> None:
        """Nothing reads it any more, or will, ready or not."""


class InPlace:
    """The pool is registered itself: nothing is to be brought anywhere."""

    def __init__(self, pool: Pool) -> None:
        self.pool = self.registered = pool

    def load(self, layers: range, blocks: Sequence[BlockId]) -> Load:
        return Load(self.pool.indices(layers, blocks), at_once)

    def unload(self, load: Load) -> None:
        """It is the pool's."""


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

    def __init__(self, pool: Pool, staging: Staging) -> None:
        assert len(pool.kv.groups) == 1, "descriptors of several sizes cannot stand for each other"
        self.pool = pool
        self.registered = Pool(staging.place, pool.kv)
        self._copy_out = staging.copy_out
        self._num_descriptors = pool.kv.num_layers * self.registered.num_blocks
        self._free = list(range(self._num_descriptors))
        """The last that came free is taken first: what was just sent may still be in the processor's cache."""

    def load(self, layers: range, blocks: Sequence[BlockId]) -> Load | None:
        sources = self.pool.indices(layers, blocks)
        assert 0 < len(sources) <= self._num_descriptors, f"{len(sources)} descriptors at once, of {self._num_descriptors} that there are"
        if len(sources) > len(self._free):
            return None
        targets = np.array(self._free[-len(sources) :], dtype=np.int32)
        del self._free[-len(sources) :]
        return Load(targets, self._copy_out(sources, targets))

    def unload(self, load: Load) -> None:
        self._free += load.indices.tolist()


def staging_blocks(kv: KVSpec, staging_bytes: int, *, pool_blocks: int | None, max_step_tokens: int, layer_group: int) -> int:
    """How many blocks the staging memory has: what `staging_bytes` hold, and no more than the pool has, where that is known.

    Raises ConfigError where it does not hold what one write takes: a layer group of what a step computes of one prompt.
    """
    held = staging_bytes // kv.bytes_per_block
    num_blocks = held if pool_blocks is None else min(held, pool_blocks)
    written = min(layer_group, kv.num_layers) * kv.blocks_for(max_step_tokens)
    if num_blocks == pool_blocks or (num_blocks and written <= num_blocks * kv.num_layers):
        return num_blocks
    least = max(1, -(-written // kv.num_layers)) * kv.bytes_per_block
    raise ConfigError(f"transfer.staging: {staging_bytes:,} bytes are less than one write takes; it must have {least:,}")
