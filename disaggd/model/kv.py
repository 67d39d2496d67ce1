"""The KV pool's memory. Knows the layout's order of dimensions; who uses which block is the engine's business."""

import torch
from torch import Tensor, device

from disaggd.errors import ModelError, ResourceError
from disaggd.model.spec import DTYPE_BYTES
from disaggd.transfer.layout import KVSpec


def allocate_kv(spec: KVSpec, num_blocks: int, where: device, *, pinned: bool = False) -> Tensor:
    """The pool [layers, num_blocks, kv_heads, 2, block_size, head_dim] in `spec.dtype`, contiguous and zero.

    `pinned`: memory of the host that a GPU copies from and to by itself.

    Every page is touched now, so that a host without the memory fails at its start rather than under load, and no step pays
    for a page fault. Raises ResourceError when the memory cannot be had.
    """
    if len(spec.groups) != 1:
        raise ModelError(f"a pool holds one group of layers, the model has {len(spec.groups)}")
    [group] = spec.groups
    assert group.head_bytes == 2 * spec.block_size * spec.head_dim * DTYPE_BYTES[spec.dtype], "KVGroup.head_bytes disagrees with its KVSpec"
    shape = (group.layers, num_blocks, group.kv_heads, 2, spec.block_size, spec.head_dim)
    try:
        return torch.empty(shape, dtype=getattr(torch, spec.dtype), device=where, pin_memory=pinned).zero_()
    except RuntimeError as error:
        raise ResourceError(f"no memory for a KV pool of {num_blocks * spec.bytes_per_block:,} bytes on {where}: {error}") from error
