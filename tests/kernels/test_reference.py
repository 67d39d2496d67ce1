"""The reference operations against their formulas, written out naively in float64."""

import pytest
import torch

from disaggd.kernels import reference

KV_HEADS, GROUP, HEAD_DIM, BLOCK = 2, 3, 8, 4
NUM_BLOCKS = 64


def made(table, num_new, window=None):
    """Attention of sequences `(block ids, context length, new tokens)`."""
    slots, starts, lens = [], [0], []
    for (blocks, context_len), count in zip(table, num_new, strict=True):
        slots += [blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(context_len - count, context_len)]
        starts.append(starts[-1] + count)
        lens.append(context_len)
    width = max(len(blocks) for blocks, _ in table)
    tables = [blocks + [0] * (width - len(blocks)) for blocks, _ in table]
    int32 = torch.int32
    return reference.PagedAttention(
        torch.tensor(slots),
        torch.tensor(starts, dtype=int32),
        torch.tensor(lens, dtype=int32),
        torch.tensor(tables, dtype=int32),
        kv_heads=KV_HEADS,
        block_size=BLOCK,
        window=window,
    )


def naive(kv, blocks, context_len, queries, window):
    """Attention of the last `len(queries)` tokens of one sequence, one head and one token at a time."""
    cached = kv[blocks].double().permute(1, 2, 0, 3, 4).reshape(KV_HEADS, 2, -1, HEAD_DIM)
    out = torch.empty(queries.shape, dtype=torch.float64)
    for row in range(len(queries)):
        position = context_len - len(queries) + row
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(KV_HEADS * GROUP):
            keys, values = cached[head // GROUP, :, first : position + 1]
            out[row, head] = (keys @ queries[row, head].double() / HEAD_DIM**0.5).softmax(0) @ values
    return out


@pytest.mark.parametrize("window", [None, 1, 5, 16, 1000])
@pytest.mark.parametrize(
    "shape",
    [
        [(1, 1)],
        [(4, 1), (5, 1)],  # a block just full, a block just begun
        [(40, 1), (3, 1), (19, 1), (37, 1)],  # two groups, out of order
        [(9, 9)],
        [(21, 6), (30, 1), (12, 12), (2, 1), (8, 2)],
    ],
)
def test_attention_equals_the_formula(shape, window):
    generator = torch.Generator().manual_seed(7)
    kv = torch.randn(NUM_BLOCKS, KV_HEADS, 2, BLOCK, HEAD_DIM, generator=generator)
    free = torch.randperm(NUM_BLOCKS, generator=generator).tolist()
    table = [([free.pop() for _ in range(-(-context_len // BLOCK))], context_len) for context_len, _ in shape]
    num_new = [count for _, count in shape]
    queries = torch.randn(sum(num_new), KV_HEADS * GROUP, HEAD_DIM, generator=generator)
    ours = made(table, num_new, window).attend(kv, queries)
    rows = queries.split(num_new)
    expected = torch.cat([naive(kv, *sequence, part, window) for sequence, part in zip(table, rows, strict=True)])
    torch.testing.assert_close(ours.double(), expected, atol=2e-6, rtol=0)  # float32


def test_chunks_longer_than_a_query_block(monkeypatch):
    monkeypatch.setattr(reference, "QUERY_BLOCK", 4)
    for window in (None, 3, 6):
        test_attention_equals_the_formula([(21, 11), (30, 30), (9, 1)], window)


def test_store_writes_each_token_at_its_slot_and_nothing_else():
    kv = torch.full((NUM_BLOCKS, KV_HEADS, 2, BLOCK, HEAD_DIM), 7.0)
    keys, values = torch.randn(2, 5, KV_HEADS, HEAD_DIM).unbind()
    made([([9, 63], 6), ([2], 1)], [4, 1]).store(kv, keys, values)
    expected = torch.full_like(kv, 7.0)
    for token, (block, offset) in enumerate([(9, 2), (9, 3), (63, 0), (63, 1), (2, 0)]):
        expected[block, :, 0, offset], expected[block, :, 1, offset] = keys[token], values[token]
    assert torch.equal(kv, expected)


def test_store_takes_views():
    kv = torch.zeros(NUM_BLOCKS, KV_HEADS, 2, BLOCK, HEAD_DIM)
    fused = torch.randn(1, 5, KV_HEADS, HEAD_DIM).transpose(0, 1)
    made([([3], 2)], [2]).store(kv, fused[1:3, 0], fused[3:5, 0])
    assert torch.equal(kv[3, :, 0, :2], fused[1:3, 0].transpose(0, 1))
    assert torch.equal(kv[3, :, 1, :2], fused[3:5, 0].transpose(0, 1))


def test_norms_equal_the_formula():
    x, weight = torch.randn(5, 3, 8), torch.randn(3, 8)
    expected = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 0.1).sqrt()
    normed = reference.rms_norm(x[:, 0], weight[0], 0.1)
    torch.testing.assert_close(normed.double(), expected[:, 0] * weight[0], atol=5e-6, rtol=0)
    torch.testing.assert_close(reference.head_norm(x, weight, 0.1).double(), expected * weight, atol=5e-6, rtol=0)


def test_the_residual_is_added_to_before_the_norm():
    x, residual, weight = torch.randn(3, 5, 8).unbind()
    total = x + residual
    normed = reference.add_rms_norm(x, residual, weight[0], 0.1)
    assert torch.equal(residual, total)
    assert torch.equal(normed, reference.rms_norm(total, weight[0], 0.1))


def test_rotate_and_store_norms_and_rotates_queries_and_keys_but_no_values():
    projected, weight = torch.randn(2, (GROUP + 2) * KV_HEADS * HEAD_DIM), torch.randn((GROUP + 1) * KV_HEADS, HEAD_DIM)
    cos, sin = torch.randn(2, 2, 1, HEAD_DIM).unbind()
    kv = torch.zeros(NUM_BLOCKS, KV_HEADS, 2, BLOCK, HEAD_DIM)
    queries = made([([3], 2)], [2]).rotate_and_store(kv, projected, weight, 0.1, (cos, sin))
    heads = projected.view(2, -1, HEAD_DIM)
    rotated = reference.rotate(reference.head_norm(heads[:, :-KV_HEADS], weight, 0.1), cos, sin)
    assert torch.equal(torch.cat((queries, kv[3, :, 0, :2].transpose(0, 1)), 1), rotated)
    assert torch.equal(kv[3, :, 1, :2].transpose(0, 1), heads[:, -KV_HEADS:])


def test_rotate_turns_pairs_half_a_head_apart():
    x, angles = torch.randn(5, 3, 8), torch.randn(5, 1, 4)
    cos, sin = angles.cos(), angles.sin()
    ours = reference.rotate(x, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(ours, torch.cat((turned.real, turned.imag), -1))


def test_silu_mul_equals_the_formula():
    gate, up = torch.randn(2, 4, 6).unbind()
    torch.testing.assert_close(reference.silu_mul(torch.cat((gate, up), -1)), gate / (1 + (-gate).exp()) * up)
