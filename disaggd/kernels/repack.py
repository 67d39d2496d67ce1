"""Tokens of a sequence from the pool's blocks into blocks of another layout, and fp8 blocks back into a pool.

    out[l, b, h, v, j] = kv[layers[l], block_ids[p // block_size], heads[h], v, p % block_size],  p = start + b · target_size + j

and 0 behind the last token; cast where the sides differ in dtype. Into the wire format of `fp8`, and from it, by that module's formula.

A program makes tokens of one head's keys, or values, of one target block. Quantizing reads them twice, the second time from the cache.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from disaggd.kernels import fp8
from disaggd.kernels.configurations import REPACK
from disaggd.kernels.pool import FLOATS, INTERPRETED
from disaggd.kernels.reference_repack import check_repack, check_unpack, target_block_size

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _e4m3(x):
    """The code of a finite number: to the nearest, ties to even. So a GPU's instruction has it; Triton's interpreter loses carries."""
    if _INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFFF + (bits >> 20 & 1)) & -0x100000).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) >= 0.015625, nearest, x)
    return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def _from_e4m3(code):
    """As float32. The interpreter knows no NaN."""
    x = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    if _INTERPRETED:
        x = tl.where(code & 0x7F == 0x7F, float("nan"), x)
    return x


@triton.jit
def _read(part, block_ids, within, tokens, columns, start, num_tokens, stride_block, SOURCE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """[tokens, columns] of one head's keys or values, which begin `within` elements behind their block; zero where there are none."""
    real = tokens < num_tokens
    positions = start + tokens
    blocks = tl.load(block_ids + positions // SOURCE_SIZE, mask=real, other=0).to(tl.int64)
    rows = blocks * stride_block + positions % SOURCE_SIZE * HEAD_DIM
    return tl.load(part + within + rows[:, None] + columns[None, :], mask=real[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)


# What differs between a pair's writes is not specialized on: what its check has compiled serves it, and nothing is compiled amid transfers.
@triton.jit(do_not_specialize=["start", "num_tokens", "num_blocks", "heads"])
def _repack(
    out,
    part,
    block_ids,
    start,
    num_tokens,
    num_blocks,  # of the target
    heads,
    stride_layer,
    stride_block,
    stride_head,
    SOURCE_SIZE: tl.constexpr,
    TARGET_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    piece = tl.program_id(0).to(tl.int64)  # ((layer · blocks + block) · heads + head) · 2 + values
    head = piece // 2 % heads
    block = piece // 2 // heads % num_blocks
    layer = piece // 2 // heads // num_blocks
    within = layer * stride_layer + head * stride_head + piece % 2 * (SOURCE_SIZE * HEAD_DIM)
    in_target = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.arange(0, WIDTH)
    tokens = block * TARGET_SIZE + in_target
    last = tl.minimum(num_tokens, (block + 1) * TARGET_SIZE)
    x = _read(part, block_ids, within, tokens, columns, start, last, stride_block, SOURCE_SIZE, HEAD_DIM)
    to = out + (piece * TARGET_SIZE + in_target)[:, None] * HEAD_DIM + columns[None, :]
    tl.store(to, x.to(out.dtype.element_ty), mask=(in_target < TARGET_SIZE)[:, None] & (columns < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=["start", "num_tokens", "num_blocks", "heads"])
def _repack_fp8(
    out,
    scales,  # the same memory, as float32
    part,
    block_ids,
    start,
    num_tokens,
    num_blocks,
    heads,
    stride_layer,
    stride_block,
    stride_head,
    SOURCE_SIZE: tl.constexpr,
    TARGET_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADER: tl.constexpr,
    LARGEST: tl.constexpr,
    LEAST_SCALE: tl.constexpr,
):
    piece = tl.program_id(0).to(tl.int64)
    values = piece % 2
    head = piece // 2 % heads
    block = piece // 2 // heads % num_blocks
    layer = piece // 2 // heads // num_blocks
    within = layer * stride_layer + head * stride_head + values * (SOURCE_SIZE * HEAD_DIM)
    columns = tl.arange(0, WIDTH)
    last = tl.minimum(num_tokens, (block + 1) * TARGET_SIZE)
    most = tl.zeros((TOKENS, WIDTH), dtype=tl.float32)
    for first in range(0, TARGET_SIZE, TOKENS):
        tokens = block * TARGET_SIZE + first + tl.arange(0, TOKENS)
        x = _read(part, block_ids, within, tokens, columns, start, last, stride_block, SOURCE_SIZE, HEAD_DIM).to(tl.float32)
        most = tl.maximum(most, tl.where(tl.abs(x) < float("inf"), tl.abs(x), 0.0))
    scale = tl.maximum(tl.div_rn(tl.max(tl.max(most, 1), 0), LARGEST), LEAST_SCALE)
    inverse = tl.div_rn(1.0, scale)
    begin = piece // 2 * (HEADER + 2 * TARGET_SIZE * HEAD_DIM)
    tl.store(scales + begin // 4 + values, scale)
    tl.store(scales + begin // 4 + 2 + values, 0.0)
    for first in range(0, TARGET_SIZE, TOKENS):
        in_target = first + tl.arange(0, TOKENS)
        tokens = block * TARGET_SIZE + in_target
        x = _read(part, block_ids, within, tokens, columns, start, last, stride_block, SOURCE_SIZE, HEAD_DIM).to(tl.float32)
        q = tl.where(tl.abs(x) < float("inf"), _e4m3(x * inverse), 0x7F)
        to = out + begin + HEADER + (values * TARGET_SIZE + in_target)[:, None] * HEAD_DIM + columns[None, :]
        tl.store(to, q, mask=(in_target < TARGET_SIZE)[:, None] & (columns < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=["num_ids", "heads", "wire_blocks"])
def _unpack_fp8(
    kv,
    wire,
    scales,  # the same memory, as float32
    block_ids,
    landed_ids,
    num_ids,
    heads,
    wire_blocks,
    stride_layer,
    stride_block,
    stride_head,
    LENGTH: tl.constexpr,  # elements of one head's keys in a block
    SIZE: tl.constexpr,
    HEADER: tl.constexpr,
):
    piece = tl.program_id(0).to(tl.int64)  # ((layer · ids + i) · heads + head) · 2 + values
    values = piece % 2
    head = piece // 2 % heads
    index = piece // 2 // heads % num_ids
    layer = piece // 2 // heads // num_ids
    block = tl.load(block_ids + index).to(tl.int64)
    landed = tl.load(landed_ids + index).to(tl.int64)
    begin = ((layer * wire_blocks + landed) * heads + head) * (HEADER + 2 * LENGTH)
    scale = tl.load(scales + begin // 4 + values)
    within = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    q = tl.load(wire + begin + HEADER + values * LENGTH + within, mask=within < LENGTH, other=0)
    to = kv + layer * stride_layer + block * stride_block + head * stride_head + values * LENGTH + within
    tl.store(to, (_from_e4m3(q) * scale).to(kv.dtype.element_ty), mask=within < LENGTH)


def repack(out: Tensor, kv: Tensor, block_ids: Tensor, *, layers: range, heads: range, start: int, num_tokens: int) -> None:
    """See `kernels.Repack`. All on one device; `out` may be pinned memory of the host."""
    (block_size, head_dim), target_size = kv.shape[4:], target_block_size(out, kv.shape[-1])
    check_repack(out, kv, block_ids, layers, heads, start, num_tokens, target_size)
    _check(kv, block_ids)
    if out.numel() == 0:
        return
    part = kv[layers.start : layers.stop, :, heads.start : heads.stop]
    num_blocks = out.shape[1]
    pieces, width = len(layers) * num_blocks * len(heads) * 2, triton.next_power_of_2(head_dim)
    tile = max(1, min(triton.next_power_of_2(target_size), REPACK.size // width))
    geometry = (block_ids, start, num_tokens, num_blocks, len(heads), *part.stride()[:3], block_size, target_size, head_dim, width, tile)
    if out.dtype != torch.uint8:
        assert out.dtype in FLOATS, f"blocks of {out.dtype}"
        _repack[(pieces, triton.cdiv(target_size, tile))](out, part, *geometry, num_warps=REPACK.warps)
        return
    assert head_dim % 2 == 0, "scales are aligned where head_dim is even"
    codec = (fp8.HEADER_BYTES, fp8.LARGEST, fp8.LEAST_SCALE)
    _repack_fp8[(pieces,)](out, _scales(out), part, *geometry, *codec, num_warps=REPACK.warps)


def unpack_fp8(kv: Tensor, wire: Tensor, block_ids: Tensor, landed_ids: Tensor) -> None:
    """See `kernels.Ops`. All on one device; `wire` may be pinned memory of the host."""
    check_unpack(kv, wire, block_ids, landed_ids)
    _check(kv, block_ids, landed_ids)
    assert wire.is_contiguous() and kv.shape[-1] % 2 == 0
    if len(block_ids) == 0:
        return
    num_layers, _, heads, _, block_size, head_dim = kv.shape
    length = block_size * head_dim
    _unpack_fp8[(num_layers * len(block_ids) * heads * 2, triton.cdiv(length, REPACK.size))](
        kv,
        wire,
        _scales(wire),
        block_ids,
        landed_ids,
        len(block_ids),
        heads,
        wire.shape[1],
        *kv.stride()[:3],
        LENGTH=length,
        SIZE=REPACK.size,
        HEADER=fp8.HEADER_BYTES,
        num_warps=REPACK.warps,
    )


def _scales(wire: Tensor) -> Tensor:
    return wire.flatten().view(torch.float32)


def _check(kv: Tensor, *ids: Tensor) -> None:
    block_size, head_dim = kv.shape[4:]
    assert kv.dtype in FLOATS and not (INTERPRETED and kv.dtype == torch.bfloat16), "Triton's interpreter gets bfloat16 wrong"
    assert kv.stride()[3:] == (block_size * head_dim, head_dim, 1), "a head of a block must be one run of memory"
    assert all(each.dtype in (torch.int32, torch.int64) and each.is_contiguous() for each in ids)
