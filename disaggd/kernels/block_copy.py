"""Blocks of a range of heads and layers, between the paged pool and a contiguous buffer: what repacking for another layout is made of.

    gather:  staging[l, i, h] = pool[layers[l], block_ids[i], heads[h]]
    scatter: pool[layers[l], block_ids[i], heads[h]] = staging[l, i, h]

A head's keys and values of one block, [2, block_size, head_dim], are one run of memory on both sides and stay as they are; where the sides
differ in dtype they are cast.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from disaggd.kernels.configurations import COPY
from disaggd.kernels.pool import check_floats


@triton.jit
def _copy(
    staging,
    pool,
    block_ids,
    heads,
    run,  # elements of one head of one block
    stride_staging_layer,
    stride_staging_block,
    stride_staging_head,
    stride_pool_layer,
    stride_pool_block,
    stride_pool_head,
    SIZE: tl.constexpr,
    SCATTER: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    layer = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    block = tl.load(block_ids + index).to(tl.int64)
    within = tl.program_id(2) * SIZE + tl.arange(0, SIZE)
    in_staging = staging + layer * stride_staging_layer + index * stride_staging_block + head * stride_staging_head + within
    in_pool = pool + layer * stride_pool_layer + block * stride_pool_block + head * stride_pool_head + within
    if SCATTER:
        tl.store(in_pool, tl.load(in_staging, mask=within < run).to(pool.dtype.element_ty), mask=within < run)
    else:
        tl.store(in_staging, tl.load(in_pool, mask=within < run).to(staging.dtype.element_ty), mask=within < run)


def gather_blocks(staging: Tensor, kv: Tensor, block_ids: Tensor, *, layers: range, heads: range) -> None:
    """Fill `staging` [len(layers), len(block_ids), len(heads), 2, block_size, head_dim] from the pool.

    `kv` [layers, num_blocks, kv_heads, 2, block_size, head_dim]; `block_ids` int32 or int64, on the pool's device; ranges of step 1.
    """
    _launch(staging, kv, block_ids, layers, heads, scatter=False)


def scatter_blocks(kv: Tensor, staging: Tensor, block_ids: Tensor, *, layers: range, heads: range) -> None:
    """The inverse of `gather_blocks`. A block id may stand in `block_ids` only once."""
    _launch(staging, kv, block_ids, layers, heads, scatter=True)


def _launch(staging: Tensor, kv: Tensor, block_ids: Tensor, layers: range, heads: range, *, scatter: bool) -> None:
    part = kv[layers.start : layers.stop, :, heads.start : heads.stop]
    check_floats(staging)
    check_floats(kv)
    assert layers.step == heads.step == 1, "layers and heads are intervals"
    assert 0 <= layers.start <= layers.stop <= kv.shape[0] and 0 <= heads.start <= heads.stop <= kv.shape[2], f"{layers}, {heads}"
    assert staging.shape == (len(layers), len(block_ids), len(heads), *kv.shape[3:]), f"staging {tuple(staging.shape)}"
    assert _is_run(staging) and _is_run(kv), "a head of a block must be one run of memory"
    assert block_ids.dtype in (torch.int32, torch.int64) and block_ids.is_contiguous()
    if staging.numel() == 0:
        return
    run = kv.shape[3:].numel()
    _copy[(len(block_ids), len(layers) * len(heads), triton.cdiv(run, COPY.size))](
        staging,
        part,
        block_ids,
        len(heads),
        run,
        *staging.stride()[:3],
        *part.stride()[:3],
        SIZE=COPY.size,
        SCATTER=scatter,
        num_warps=COPY.warps,
    )


def _is_run(blocks: Tensor) -> bool:
    return blocks.stride()[3:] == (blocks.shape[4] * blocks.shape[5], blocks.shape[5], 1)
