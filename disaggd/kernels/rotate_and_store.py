"""From the fused projection's output to queries and stored keys and values, in one pass: head norm, rotary embedding, KV store.

    [q, k, v] = projected[token]                                    by heads
    q, k      = x / rms(x) · norm_weight[head]                      where there is one, by heads
    q, k      = [x₁·cos − x₂·sin, x₂·cos + x₁·sin]                  x₁, x₂: the halves of a head (Su et al. 2021)
    queries[token] = q,   kv[slot] = k, v

All of it in float32 but what is loaded and stored. A negative slot stores no key or value: that is how a captured batch is padded.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from disaggd.kernels.chain import chained, let_next_start, wait_for_previous
from disaggd.kernels.configurations import FEW_TOKENS, ROTATE, ROTATE_FEW
from disaggd.kernels.pool import check_floats, check_pool


@triton.jit
def _rotate_and_store(
    queries,
    kv,
    projected,
    norm_weight,
    cos,
    signed_sin,
    slot_mapping,
    eps,
    num_heads,
    kv_heads,
    stride_queries_token,
    stride_queries_head,
    stride_block,
    stride_head,
    stride_value,
    stride_token,
    stride_projected,
    stride_rotation,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NORMALIZED: tl.constexpr,
    CHAINED: tl.constexpr,
):
    let_next_start(CHAINED)
    wait_for_previous(CHAINED)
    token = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    columns = tl.arange(0, HALF_WIDTH)[None, :]
    within = columns < HALF
    is_value = heads >= num_heads + kv_heads
    real = (heads < num_heads + 2 * kv_heads) & within

    at = projected + token * stride_projected + heads * (2 * HALF) + columns
    low_in = tl.load(at, mask=real, other=0.0)
    high_in = tl.load(at + HALF, mask=real, other=0.0)
    low = low_in.to(tl.float32)
    high = high_in.to(tl.float32)
    if NORMALIZED:
        weight_at = norm_weight + heads * (2 * HALF) + columns
        rstd = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps)[:, None]
        low = low * rstd * tl.load(weight_at, mask=real & ~is_value, other=0.0).to(tl.float32)
        high = high * rstd * tl.load(weight_at + HALF, mask=real & ~is_value, other=0.0).to(tl.float32)
    # Both halves turn by the same angles; the second half of the signed sine has the plain sign.
    cosine = tl.load(cos + token * stride_rotation + columns, mask=within, other=0.0).to(tl.float32)
    sine = tl.load(signed_sin + token * stride_rotation + HALF + columns, mask=within, other=0.0).to(tl.float32)
    low_out = tl.where(is_value, low_in, (low * cosine - high * sine).to(low_in.dtype))
    high_out = tl.where(is_value, high_in, (high * cosine + low * sine).to(low_in.dtype))

    to_queries = queries + token * stride_queries_token + heads * stride_queries_head + columns
    tl.store(to_queries, low_out, mask=real & (heads < num_heads))
    tl.store(to_queries + HALF, high_out, mask=real & (heads < num_heads))
    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        stored = heads - num_heads  # keys, then values
        in_block = (stored % kv_heads).to(tl.int64) * stride_head + (stored // kv_heads) * stride_value
        to_pool = kv + slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_token + in_block + columns
        tl.store(to_pool, low_out, mask=real & (stored >= 0))
        tl.store(to_pool + HALF, high_out, mask=real & (stored >= 0))


def rotate_and_store(
    kv: Tensor,
    projected: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    rotation: tuple[Tensor, Tensor],
    slot_mapping: Tensor,
) -> Tensor:
    """The queries [num_tokens, heads, head_dim] of a layer; its keys and values go into its pool `kv` (see `pool`).

    `projected` [num_tokens, (heads + 2 · kv_heads) · head_dim]: the fused projection's output, biases added. `norm_weight` [heads +
    kv_heads, head_dim]: the query norm's weight for each query head, then the key norm's; None where heads are not normalized. `rotation`:
    cosine and signed sine (its first half negated) [num_tokens, 1, head_dim]. `slot_mapping` int64 [num_tokens].
    """
    (num_tokens, width), (_, kv_heads, _, block_size, head_dim) = projected.shape, kv.shape
    cos, signed_sin = rotation
    num_heads = width // head_dim - 2 * kv_heads
    check_floats(kv, projected, *rotation, *([] if norm_weight is None else [norm_weight]))
    check_pool(kv, kv_heads, head_dim)
    assert num_heads > 0 and width == (num_heads + 2 * kv_heads) * head_dim and head_dim % 2 == 0
    assert cos.shape == signed_sin.shape == (num_tokens, 1, head_dim) and cos.stride(0) == signed_sin.stride(0)
    assert norm_weight is None or (norm_weight.shape == (num_heads + kv_heads, head_dim) and norm_weight.is_contiguous())
    assert slot_mapping.shape == (num_tokens,) and slot_mapping.dtype == torch.int64 and slot_mapping.is_contiguous()
    queries = torch.empty((num_tokens, num_heads, head_dim), dtype=kv.dtype, device=kv.device)
    if num_tokens == 0:
        return queries
    tile = ROTATE_FEW if num_tokens <= FEW_TOKENS else ROTATE
    _rotate_and_store[(num_tokens, triton.cdiv(num_heads + 2 * kv_heads, tile.size))](
        queries,
        kv,
        projected,
        projected if norm_weight is None else norm_weight,
        cos,
        signed_sin,
        slot_mapping,
        eps,
        num_heads,
        kv_heads,
        *queries.stride()[:2],
        *kv.stride()[:4],
        projected.stride(0),
        cos.stride(0),
        HEADS=tile.size,
        HALF=head_dim // 2,
        HALF_WIDTH=triton.next_power_of_2(head_dim // 2),
        BLOCK_SIZE=block_size,
        NORMALIZED=norm_weight is not None,
        num_warps=tile.warps,
        **chained(),
    )
    return queries
