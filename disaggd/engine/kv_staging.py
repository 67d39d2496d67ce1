"""`KVStaging`: pinned memory of the host that a GPU's KV goes through on its way to another node, and from one.

The transfer thread copies out, the compute thread copies in; each direction has a stream of its own. `transfer/source.py` says
why there is a host in between.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from disaggd.engine.stream import SideStream
from disaggd.ids import BlockId
from disaggd.model.kv import allocate_kv
from disaggd.transfer.layout import KVSpec, PoolPlace
from disaggd.transfer.messages import IsReady
from disaggd.transfer.pool import Indices, Pool


class KVStaging:
    """`host` [layers, blocks, …] is laid out as the pool `kv` is, with fewer blocks: peers name its blocks by the same arithmetic."""

    def __init__(self, kv: Tensor, host: Tensor, spec: KVSpec) -> None:
        assert kv.is_contiguous() and host.is_contiguous() and kv.shape[2:] == host.shape[2:] and kv.dtype == host.dtype
        assert not kv.is_cuda or host.is_pinned(), "copies of pageable memory wait for the device"
        self._pool, self._landing = (Pool(PoolPlace(memory.data_ptr(), memory.shape[1]), spec) for memory in (kv, host))
        self._rows, self._staged = kv.flatten(0, 1), host.flatten(0, 1)  # by descriptor: [layers · blocks, …]
        self._outward, self._inward = SideStream(kv.device), SideStream(kv.device)

    @property
    def place(self) -> PoolPlace:
        """Where it lies, and how many blocks it has."""
        return self._landing.place

    def copy_out(self, sources: Indices, targets: Indices) -> IsReady:
        """Copy descriptors of the pool, which are computed, to descriptors of this memory. Transfer thread."""
        return self._outward.copy(self._staged, targets, self._rows, sources)

    def copy_in(self, landed: Sequence[BlockId], blocks: Sequence[BlockId]) -> IsReady:
        """Copy all layers of blocks of this memory to blocks of the pool, which no launched step writes. Compute thread."""
        layers = range(self._pool.kv.num_layers)
        return self._inward.copy(self._rows, self._pool.indices(layers, blocks), self._staged, self._landing.indices(layers, landed))


def make_staging(kv: Tensor, spec: KVSpec, num_blocks: int) -> KVStaging:
    """Staging memory for the pool `kv`; pinned if that lies in a GPU's memory. Raises ResourceError when it cannot be had."""
    return KVStaging(kv, allocate_kv(spec, num_blocks, torch.device("cpu"), pinned=kv.is_cuda), spec)
