"""Causal attention of sequences with several new tokens each over the paged pool, behind whatever prefix they have there.

    out[i, h] = Σ_p softmax_p(q[i, h] · k[p] / √head_dim) · v[p]     p ≤ i's position, and > that − window where there is one

A program holds a tile of (token, query head) pairs of one KV head as the rows of one matrix: K and V are read once for all heads of the
group, and little of the diagonal is computed in vain. Tiles are numbered over the whole batch so that a program finds its sequence by
bisection of `query_start`: the host need not know where sequences begin, and never waits for the device. With n tokens in b sequences and t
tokens a tile, sequence i owns the tiles from `query_start[i] // t + i` on, and n // t + b of them hold all; some stay empty. The last tiles
of a long chunk see most keys and start first.

Sequences with one new token or none are left alone: `decode_attention` is for them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import math

import triton
import triton.language as tl
from torch import Tensor

from disaggd.kernels.chain import chained, let_next_start, wait_for_previous
from disaggd.kernels.configurations import PREFILL, padded_head_dim
from disaggd.kernels.pool import check_batch, check_floats, check_pool, token_offsets


@triton.jit
def _sequence_of(tile, query_start, num_sequences, TOKENS: tl.constexpr):
    """The last sequence whose tiles start at `tile` or before."""
    low = 0
    high = num_sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(query_start + middle) // TOKENS + middle <= tile:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def _walk(
    mixed,
    total,
    best,
    queries,
    start,
    end,
    own,  # [ROWS, 1]: position of each row's token
    keys_at,
    table,
    window,
    scale,
    stride_block,
    stride_value,
    stride_token,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Attend to positions `start` … `end` − 1; unless MASKED, all rows see all of them, and they are whole tiles."""
    columns = tl.arange(0, WIDTH)
    for tile in range(start, end, KEYS):
        positions = tile + tl.arange(0, KEYS)
        offsets = token_offsets(table, tile, end, stride_block, stride_token, BLOCK_SIZE, KEYS)[:, None]
        here = (columns < HEAD_DIM)[None, :]
        if MASKED:
            here = here & (positions < end)[:, None]
        keys = tl.load(keys_at + offsets, mask=here, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        if MASKED:
            seen = positions[None, :] <= own
            if WINDOWED:
                seen = seen & (positions[None, :] > own - window)
            scores = tl.where(seen, scores, float("-inf"))
        best_now = tl.maximum(best, tl.max(scores, 1) * scale)
        origin = best_now
        if WINDOWED:
            origin = tl.where(best_now == float("-inf"), 0.0, best_now)  # rows whose window begins in a later tile
        fading = tl.exp2(best - origin)
        weights = tl.exp2(scores * scale - origin[:, None])  # one fused multiply-add a score: the product is not needed elsewhere
        values = tl.load(keys_at + stride_value + offsets, mask=here, other=0.0)
        mixed = tl.dot(weights.to(values.dtype), values, mixed * fading[:, None], input_precision="ieee")
        total = total * fading + tl.sum(weights, 1)
        best = best_now
    return mixed, total, best


# What changes from step to step is not specialized on: a new parity of it would compile anew, under a request.
@triton.jit(do_not_specialize=["num_sequences", "stride_table"])
def _attend(
    out,
    q,
    kv,
    query_start,
    context_lens,
    block_tables,
    num_sequences,
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
    WINDOWED: tl.constexpr,
    CHAINED: tl.constexpr,
):
    let_next_start(CHAINED)
    wait_for_previous(CHAINED)
    TOKENS: tl.constexpr = ROWS // GROUP
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = _sequence_of(tile, query_start, num_sequences, TOKENS)
    query_first = tl.load(query_start + sequence)
    num_new = tl.load(query_start + sequence + 1) - query_first
    token_first = (tile - query_first // TOKENS - sequence) * TOKENS
    if num_new <= 1 or token_first >= num_new:
        return
    context_len = tl.load(context_lens + sequence)
    first = context_len - num_new + token_first  # position of the tile's first token

    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    tokens = token_first + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    real = ((rows < TOKENS * GROUP) & (tokens < num_new))[:, None] & (columns < HEAD_DIM)[None, :]
    at = (query_first + tokens).to(tl.int64)[:, None]
    queries = tl.load(q + at * stride_q_token + heads[:, None] * stride_q_head + columns[None, :], mask=real, other=0.0)

    keys_at = kv + kv_head.to(tl.int64) * stride_head + columns[None, :]
    table = block_tables + sequence.to(tl.int64) * stride_table
    own = (first + rows // GROUP)[:, None]
    start = 0
    masked_from = (first + 1) // KEYS * KEYS  # all rows see all keys before
    if WINDOWED:
        start = tl.maximum(first - window + 1, 0) // KEYS * KEYS
        masked_from = start
    end = tl.minimum(first + TOKENS, context_len)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDTH], tl.float32)
    if not WINDOWED:
        mixed, total, best = _walk(
            mixed, total, best, queries, start, masked_from, own, keys_at, table, window, scale,
            stride_block, stride_value, stride_token, HEAD_DIM, WIDTH, BLOCK_SIZE, KEYS, False, False,
        )  # fmt: skip
    mixed, total, best = _walk(
        mixed, total, best, queries, masked_from, end, own, keys_at, table, window, scale,
        stride_block, stride_value, stride_token, HEAD_DIM, WIDTH, BLOCK_SIZE, KEYS, True, WINDOWED,
    )  # fmt: skip
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]  # rows beyond the chunk may have seen nothing
    tl.store(out + at * stride_out_token + heads[:, None] * stride_out_head + columns[None, :], mixed.to(out.dtype.element_ty), mask=real)


def prefill_attention(
    out: Tensor,
    queries: Tensor,
    kv: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    *,
    window: int | None,
) -> None:
    """Write to `out` [num_tokens, heads, head_dim] the rows of the sequences that have more than one new token.

    `queries` is shaped like `out`; `kv` is a layer's pool (see `pool`) and holds the new tokens too; the next three are those of
    `disaggd.model.batch.Batch`.
    """
    num_sequences, (num_tokens, num_heads, head_dim), kv_heads = len(context_lens), queries.shape, kv.shape[1]
    check_floats(out, queries, kv)
    check_pool(kv, kv_heads, head_dim)
    check_batch(query_start, context_lens, block_tables)
    assert out.shape == queries.shape and num_heads % kv_heads == 0
    if num_sequences == 0:
        return
    width, group = padded_head_dim(head_dim), num_heads // kv_heads
    tile = PREFILL[width, kv.itemsize]
    assert group <= tile.rows, f"{group} query heads share a KV head, a tile has {tile.rows} rows"
    tiles = num_tokens // (tile.rows // group) + num_sequences
    _attend[(tiles, kv_heads)](
        out,
        queries,
        kv,
        query_start,
        context_lens,
        block_tables,
        num_sequences,
        window or 0,
        math.log2(math.e) / math.sqrt(head_dim),
        *out.stride()[:2],
        *queries.stride()[:2],
        *kv.stride()[:4],
        block_tables.stride(0),
        GROUP=group,
        ROWS=tile.rows,
        HEAD_DIM=head_dim,
        WIDTH=width,
        BLOCK_SIZE=kv.shape[3],
        KEYS=tile.keys,
        WINDOWED=window is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **chained(),
    )
