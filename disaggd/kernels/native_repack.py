"""Repacking in the native kernels: `native/repack.h`. On the calling thread alone, beside which others compute; unpacking on all."""

from dataclasses import dataclass

import torch
from torch import Tensor

from disaggd.kernels.native import DTYPES, Native
from disaggd.kernels.reference_repack import check_repack, check_unpack, target_block_size


@dataclass(frozen=True, slots=True)
class NativeRepack:
    """Those operations of `kernels.Ops` that know blocks of other layouts. A float32 that is not normal may become 0 in bfloat16."""

    native: Native

    def repack(self, out: Tensor, kv: Tensor, block_ids: Tensor, *, layers: range, heads: range, start: int, num_tokens: int) -> None:
        head_dim, target_size = kv.shape[-1], target_block_size(out, kv.shape[-1])
        check_repack(out, kv, block_ids, layers, heads, start, num_tokens, target_size)
        assert kv.is_contiguous()
        if not out.numel():
            return
        part, ids = kv[layers.start : layers.stop, :, heads.start : heads.stop], _ids(block_ids, kv.shape[1])
        sizes = (*kv.stride()[:2], len(layers), len(heads), kv.shape[4], target_size, head_dim, start, num_tokens)
        pointers = (part.data_ptr(), ids.data_ptr(), out.data_ptr())
        if out.dtype == torch.uint8:
            self.native.library.disaggd_repack_fp8(self.native.isa, DTYPES[kv.dtype], *pointers, *sizes)
        else:
            self.native.library.disaggd_repack(self.native.isa, DTYPES[kv.dtype], DTYPES[out.dtype], *pointers, *sizes)

    def unpack_fp8(self, kv: Tensor, wire: Tensor, block_ids: Tensor, landed_ids: Tensor) -> None:
        check_unpack(kv, wire, block_ids, landed_ids)
        assert kv.is_contiguous() and wire.is_contiguous()
        (layers, pool_blocks, kv_heads, _, block_size, head_dim), wire_blocks = kv.shape, wire.shape[1]
        blocks, landed = _ids(block_ids, pool_blocks), _ids(landed_ids, wire_blocks)
        pointers = (wire.data_ptr(), kv.data_ptr(), landed.data_ptr(), blocks.data_ptr())
        sizes = (len(blocks), layers, wire_blocks, pool_blocks, kv_heads, block_size, head_dim)
        self.native.library.disaggd_unpack_fp8(self.native.isa, DTYPES[kv.dtype], *pointers, *sizes)


def _ids(block_ids: Tensor, num_blocks: int) -> Tensor:
    """As int64; the library does not look whether there are such blocks."""
    ids = block_ids.long().contiguous()
    assert not len(ids) or (int(ids.min()) >= 0 and int(ids.max()) < num_blocks), f"ids beyond {num_blocks} blocks"
    return ids
