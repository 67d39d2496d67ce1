"""Keys and values into the paged pool, each token at its slot.

    kv[slot // block_size, h, 0, slot % block_size] = keys[token, h]     and 1 for values

A token whose slot is negative is not stored: that is how a captured batch is padded.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from disaggd.kernels.configurations import ROTATE
from disaggd.kernels.pool import check_floats, check_pool


@triton.jit
def _store(
    kv,
    keys,
    values,
    slot_mapping,
    kv_heads,
    stride_block,
    stride_head,
    stride_value,
    stride_token,
    stride_keys_token,
    stride_keys_head,
    stride_values_token,
    stride_values_head,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None].to(tl.int64)
    columns = tl.arange(0, WIDTH)[None, :]
    real = (heads < kv_heads) & (columns < HEAD_DIM)
    to = kv + slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_token + heads * stride_head + columns
    key = tl.load(keys + token * stride_keys_token + heads * stride_keys_head + columns, mask=real)
    value = tl.load(values + token * stride_values_token + heads * stride_values_head + columns, mask=real)
    tl.store(to, key, mask=real)
    tl.store(to + stride_value, value, mask=real)


def kv_store(kv: Tensor, keys: Tensor, values: Tensor, slot_mapping: Tensor) -> None:
    """Write `keys`, `values` [num_tokens, kv_heads, head_dim] into a layer's pool `kv` (see `pool`); `slot_mapping` int64 [num_tokens]."""
    num_tokens, kv_heads, head_dim = keys.shape
    check_floats(kv, keys, values)
    check_pool(kv, kv_heads, head_dim)
    assert values.shape == keys.shape and slot_mapping.shape == (num_tokens,)
    assert slot_mapping.dtype == torch.int64 and slot_mapping.is_contiguous()
    if num_tokens == 0:
        return
    _store[(num_tokens, triton.cdiv(kv_heads, ROTATE.size))](
        kv,
        keys,
        values,
        slot_mapping,
        kv_heads,
        *kv.stride()[:4],
        *keys.stride()[:2],
        *values.stride()[:2],
        HEADS=ROTATE.size,
        HEAD_DIM=head_dim,
        WIDTH=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=kv.shape[3],
        num_warps=ROTATE.warps,
    )
