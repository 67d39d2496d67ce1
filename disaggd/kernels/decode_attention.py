"""Attention of sequences with one new token each over the paged pool.

    out[h] = Σ_p softmax_p(q[h] · k[p] / √head_dim) · v[p]     p over the context, or over its last `window` positions

The query heads of a KV head are the rows of one matrix, so K and V are read once. A long context is split over programs, each of which
leaves its part's attention and log₂ Σ exp₂ in float32; a second kernel adds the parts up. How many parts is a pure function of shapes
(`num_splits`); how long each is, of the sequence's own context, so a launch captured for long contexts serves short ones as well.

Sequences with another number of new tokens are left alone: `prefill_attention` is for them. An empty context gives zeros.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from disaggd.kernels.chain import chained, let_next_start, wait_for_previous
from disaggd.kernels.configurations import COMBINE_SPLITS, DECODE, MAX_SPLITS, MIN_SPLIT_KEYS, padded_head_dim
from disaggd.kernels.pool import check_batch, check_floats, check_pool, token_offsets

_LEAST_ROWS = 16  # of a tensor-core product


@triton.jit
def _parts(context_len, window, splits, KEYS: tl.constexpr, MIN_KEYS: tl.constexpr, WINDOWED: tl.constexpr):
    """(first position walked, positions per part, number of parts): the parts start at multiples of KEYS, and none is empty."""
    first = 0
    if WINDOWED:
        first = tl.maximum(context_len - window, 0) // KEYS * KEYS
    span = context_len - first
    wanted = tl.maximum(tl.minimum(tl.cdiv(span, MIN_KEYS), splits), 1)
    length = tl.maximum(tl.cdiv(tl.cdiv(span, wanted), KEYS), 1) * KEYS
    return first, length, tl.cdiv(span, length)


# What changes from step to step is not specialized on: a new parity of it would compile anew, under a request.
@triton.jit(do_not_specialize=["stride_table"])
def _attend(
    out,
    parts_out,  # float32 [num_sequences, heads, splits, HEAD_DIM]
    parts_log,  # float32 [num_sequences, heads, splits]
    q,
    kv,
    query_start,
    context_lens,
    block_tables,
    window,
    scale,  # log₂e / √head_dim
    stride_out_token,
    stride_out_head,
    stride_q_token,
    stride_q_head,
    stride_block,
    stride_head,
    stride_value,
    stride_token,
    stride_table,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    MIN_KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
    SPLIT: tl.constexpr,
    CHAINED: tl.constexpr,
):
    let_next_start(CHAINED)
    wait_for_previous(CHAINED)
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    token = tl.load(query_start + sequence).to(tl.int64)
    if tl.load(query_start + sequence + 1) - token != 1:
        return
    context_len = tl.load(context_lens + sequence)
    first, length, parts = _parts(context_len, window, tl.num_programs(2), KEYS, MIN_KEYS, WINDOWED)
    if part > 0 and part >= parts:
        return  # the first part of an empty context stays, to write its zeros
    start = first + part * length
    end = tl.minimum(start + length, context_len)

    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    heads = kv_head * GROUP + rows
    of_group = (rows < GROUP)[:, None] & (columns < HEAD_DIM)[None, :]
    queries = tl.load(q + token * stride_q_token + heads[:, None] * stride_q_head + columns[None, :], mask=of_group, other=0.0)

    keys_at = kv + kv_head.to(tl.int64) * stride_head + columns[None, :]
    table = block_tables + sequence * stride_table
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDTH], tl.float32)
    for tile in range(start, end, KEYS):
        positions = tile + tl.arange(0, KEYS)
        offsets = token_offsets(table, tile, end, stride_block, stride_token, BLOCK_SIZE, KEYS)[:, None]
        seen = positions < end
        here = seen[:, None] & (columns < HEAD_DIM)[None, :]
        keys = tl.load(keys_at + offsets, mask=here, other=0.0)
        if WINDOWED:
            seen = seen & (positions >= context_len - window)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        scores = tl.where(seen[None, :], scores, float("-inf"))
        best_now = tl.maximum(best, tl.max(scores, 1) * scale)
        fading = tl.exp2(best - best_now)
        weights = tl.exp2(scores * scale - best_now[:, None])
        values = tl.load(keys_at + stride_value + offsets, mask=here, other=0.0)
        mixed = tl.dot(weights.to(values.dtype), values, mixed * fading[:, None], input_precision="ieee")
        total = total * fading + tl.sum(weights, 1)
        best = best_now

    total = tl.where(parts > 0, total, 1.0)  # 0 / 1 where nothing was seen
    mixed = mixed / total[:, None]
    if SPLIT:
        at = ((sequence * tl.num_programs(1) * GROUP + heads) * tl.num_programs(2) + part).to(tl.int64)
        tl.store(parts_out + at[:, None] * HEAD_DIM + columns[None, :], mixed, mask=of_group)
        tl.store(parts_log + at, best + tl.log2(total), mask=rows < GROUP)
    else:
        at = token * stride_out_token + heads[:, None] * stride_out_head + columns[None, :]
        tl.store(out + at, mixed.to(out.dtype.element_ty), mask=of_group)


@triton.jit(do_not_specialize=["splits"])
def _combine(
    out,
    parts_out,
    parts_log,
    query_start,
    context_lens,
    window,
    splits,
    stride_out_token,
    stride_out_head,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    MIN_KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
    SPLITS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """out = Σᵢ exp₂(logᵢ) · outᵢ / Σᵢ exp₂(logᵢ), over the parts of one head of one sequence."""
    let_next_start(CHAINED)
    wait_for_previous(CHAINED)
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    token = tl.load(query_start + sequence).to(tl.int64)
    if tl.load(query_start + sequence + 1) - token != 1:
        return
    context_len = tl.load(context_lens + sequence)
    _first, _length, parts = _parts(context_len, window, splits, KEYS, MIN_KEYS, WINDOWED)
    row = (sequence * tl.num_programs(1) + head) * splits
    columns = tl.arange(0, WIDTH)
    best = float("-inf")
    total = 0.0
    mixed = tl.zeros([WIDTH], tl.float32)
    for start in range(0, parts, SPLITS):
        at = start + tl.arange(0, SPLITS)
        logs = tl.load(parts_log + row + at, mask=at < parts, other=float("-inf"))
        inside = (at < parts)[:, None] & (columns < HEAD_DIM)[None, :]
        part = tl.load(parts_out + (row + at)[:, None] * HEAD_DIM + columns[None, :], mask=inside, other=0.0)
        best_now = tl.maximum(best, tl.max(logs, 0))
        weights = tl.exp2(logs - best_now)
        fading = tl.exp2(best - best_now)
        mixed = mixed * fading + tl.sum(part * weights[:, None], 0)
        total = total * fading + tl.sum(weights, 0)
        best = best_now
    mixed = mixed / tl.where(parts > 0, total, 1.0)
    at = token * stride_out_token + head * stride_out_head + columns
    tl.store(out + at, mixed.to(out.dtype.element_ty), mask=columns < HEAD_DIM)


@lru_cache(maxsize=1024)  # 10 µs, once a layer
def num_splits(programs: int, max_context: int, slots: int) -> int:
    """Into how many parts to split each context: `programs` of one part each, `slots` of which run at once.

    The fewest that keep the slots busy for at least 85 % of what the best number does.
    """
    most = max(1, min(MAX_SPLITS, max_context // MIN_SPLIT_KEYS))
    busy = [_share_busy(programs * splits, slots) for splits in range(1, most + 1)]
    return next(index for index, share in enumerate(busy, 1) if share >= 0.85 * max(busy))


def _share_busy(programs: int, slots: int) -> float:
    return programs / (max(1, -(-programs // slots)) * slots)


def decode_attention(
    out: Tensor,
    queries: Tensor,
    kv: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    *,
    window: int | None,
    processors: int,
) -> None:
    """Write to `out` [num_tokens, heads, head_dim] the rows of the sequences that have one new token.

    `queries` is shaped like `out`; `kv` is a layer's pool (see `pool`) and holds the new tokens too; the next three are those of
    `disaggd.model.batch.Batch`. `processors`: multiprocessors of the device, to split contexts for.
    """
    num_sequences, (_, num_heads, head_dim), kv_heads = len(context_lens), queries.shape, kv.shape[1]
    check_floats(out, queries, kv)
    check_pool(kv, kv_heads, head_dim)
    check_batch(query_start, context_lens, block_tables)
    assert out.shape == queries.shape and num_heads % kv_heads == 0
    if num_sequences == 0:
        return
    width = padded_head_dim(head_dim)
    tile = DECODE[width, kv.itemsize]
    max_context = block_tables.shape[1] * kv.shape[3]
    splits = num_splits(num_sequences * kv_heads, min(max_context, window or max_context), processors * tile.programs)
    parts_out = parts_log = out  # unused unless split
    if splits > 1:
        parts_out = torch.empty((num_sequences, num_heads, splits, head_dim), dtype=torch.float32, device=out.device)
        parts_log = torch.empty((num_sequences, num_heads, splits), dtype=torch.float32, device=out.device)
    group = num_heads // kv_heads
    of_parts = {
        "HEAD_DIM": head_dim,
        "WIDTH": width,
        "KEYS": tile.keys,
        "MIN_KEYS": MIN_SPLIT_KEYS,
        "WINDOWED": window is not None,
    }
    _attend[(num_sequences, kv_heads, splits)](
        out,
        parts_out,
        parts_log,
        queries,
        kv,
        query_start,
        context_lens,
        block_tables,
        window or 0,
        math.log2(math.e) / math.sqrt(head_dim),
        *out.stride()[:2],
        *queries.stride()[:2],
        *kv.stride()[:4],
        block_tables.stride(0),
        GROUP=group,
        ROWS=max(_LEAST_ROWS, triton.next_power_of_2(group)),
        BLOCK_SIZE=kv.shape[3],
        SPLIT=splits > 1,
        **of_parts,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **chained(),
    )
    if splits > 1:
        _combine[(num_sequences, num_heads)](
            out,
            parts_out,
            parts_log,
            query_start,
            context_lens,
            window or 0,
            splits,
            *out.stride()[:2],
            SPLITS=COMBINE_SPLITS,
            **of_parts,
            num_warps=4,
            **chained(),
        )
