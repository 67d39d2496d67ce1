"""`KVRepacker`: blocks as another node's pool has them, in memory of this host; `KVUnpacker`: and back from the wire format.

The transfer thread repacks and the compute thread unpacks; `transfer/repack.py` and `roles/landing.py` say what for.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from disaggd.engine.staging import upload
from disaggd.engine.stream import SideStream
from disaggd.errors import ResourceError
from disaggd.ids import BlockId
from disaggd.kernels import Ops, select
from disaggd.transfer.layout import KVSpec, PoolPlace, Span, in_fp8
from disaggd.transfer.messages import IsReady
from disaggd.transfer.pool import Region


class KVRepacker:
    """Repacks blocks of `kv` [layers, num_blocks, kv_heads, 2, block_size, head_dim] into `num_bytes` of the host's memory.

    A GPU writes them there itself, in what is pinned. Raises ResourceError where the memory cannot be had.
    """

    def __init__(self, kv: Tensor, ops: Ops, num_bytes: int) -> None:
        self._kv = kv
        self._ops = ops
        self._memory = _memory(num_bytes, kv)
        self._stream = SideStream(kv.device)

    @property
    def region(self) -> Region:
        return Region(self._memory.data_ptr(), self._memory.numel())

    def repack(self, offset: int, target: KVSpec, layers: range, heads: range, span: Span) -> IsReady:
        [group] = target.groups
        shape = (len(layers), target.blocks_for(span.num_tokens), len(heads), group.head_bytes)
        out = self._memory[offset : offset + torch.Size(shape).numel()].view(shape)
        if target.dtype != "fp8":
            out = out.view(getattr(torch, target.dtype)).view(*shape[:3], 2, target.block_size, target.head_dim)

        def make() -> None:
            [ids] = upload([np.array(span.blocks)], self._kv.device)
            self._ops.repack(out, self._kv, ids, layers=layers, heads=heads, start=span.start, num_tokens=span.num_tokens)

        return self._stream.run(make)


class KVUnpacker:
    """Memory that peers write in fp8 in place of the pool `kv`, whose geometry is `spec`: `num_blocks` blocks of every layer.

    Raises ResourceError where it cannot be had.
    """

    def __init__(self, kv: Tensor, spec: KVSpec, ops: Ops, num_blocks: int) -> None:
        self.spec = in_fp8(spec)
        """Its own geometry."""
        [group] = self.spec.groups
        self._kv = kv
        self._ops = ops
        shape = (group.layers, num_blocks, group.kv_heads, group.head_bytes)
        self._memory = _memory(torch.Size(shape).numel(), kv).view(shape)
        self._stream = SideStream(kv.device)

    @property
    def place(self) -> PoolPlace:
        return PoolPlace(self._memory.data_ptr(), self._memory.shape[1])

    def copy_in(self, landed: Sequence[BlockId], blocks: Sequence[BlockId]) -> IsReady:
        """Unpack all layers of blocks of this memory into blocks of the pool, which no launched step writes."""

        def unpack() -> None:
            ids, landed_ids = upload([np.array(blocks), np.array(landed)], self._kv.device)
            self._ops.unpack_fp8(self._kv, self._memory, ids, landed_ids)

        return self._stream.run(unpack)


def make_repacker(kv: Tensor, num_bytes: int) -> KVRepacker:
    """By the kernels of the pool's device."""
    return KVRepacker(kv, select(kv.device), num_bytes)


def make_unpacker(kv: Tensor, spec: KVSpec, num_blocks: int) -> KVUnpacker:
    """By the kernels of the pool's device."""
    return KVUnpacker(kv, spec, select(kv.device), num_blocks)


def _memory(num_bytes: int, kv: Tensor) -> Tensor:
    """Of the host; what is not pinned is there when it is first touched."""
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=kv.is_cuda)
    except RuntimeError as error:
        raise ResourceError(f"no memory for {num_bytes:,} bytes of repacked KV: {error}") from error
