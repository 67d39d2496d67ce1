"""The fused kernel against the three reference operations that it replaces."""

import pytest
import torch

from disaggd.kernels import reference
from disaggd.kernels.rotate_and_store import rotate_and_store

BLOCK_SIZE = 4


def rotation(num_tokens, head_dim, dtype, generator):
    angles = 100 * torch.rand(num_tokens, 1, head_dim // 2, generator=generator, device=generator.device)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


@pytest.mark.parametrize("few_tokens", [0, 64], ids=["many", "few"])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 2, 64), (3, 1, 80), (7, 7, 16), (1, 1, 256)])
def test_equals_norm_rotation_and_store(heads, kv_heads, head_dim, normalized, few_tokens, dtype, generator, where, monkeypatch):
    monkeypatch.setattr("disaggd.kernels.rotate_and_store.FEW_TOKENS", few_tokens)
    random = {"generator": generator, "device": where}
    projected = torch.randn(3, (heads + 2 * kv_heads) * head_dim + 16, **random).to(dtype)[:, :-16]
    weight = torch.randn(heads + kv_heads, head_dim, **random).to(dtype) if normalized else None
    turned = rotation(3, head_dim, dtype, generator)
    kv = torch.full((5, kv_heads, 2, BLOCK_SIZE, head_dim), 7.0, dtype=dtype, device=where)
    expected_kv = kv.clone()
    slots = [6, 19, 2]

    queries = rotate_and_store(kv, projected, weight, 1e-6, turned, torch.tensor(slots, device=where))

    by_head = projected.double().view(3, -1, head_dim)
    qk, values = by_head[:, : heads + kv_heads], by_head[:, heads + kv_heads :]
    if weight is not None:
        qk = reference.head_norm(qk, weight.double(), 1e-6)
    qk = reference.rotate(qk, *(part.double() for part in turned))
    for token, slot in enumerate(slots):
        expected_kv[slot // BLOCK_SIZE, :, 0, slot % BLOCK_SIZE] = qk[token, heads:].to(dtype)
        expected_kv[slot // BLOCK_SIZE, :, 1, slot % BLOCK_SIZE] = values[token].to(dtype)
    tolerance = {"atol": 4 * torch.finfo(dtype).eps, "rtol": 4 * torch.finfo(dtype).eps}  # a value near 4, and its rounding
    torch.testing.assert_close(queries, qk[:, :heads].to(dtype), **tolerance)
    torch.testing.assert_close(kv, expected_kv, **tolerance)
    assert torch.equal(kv[:, :, 1], expected_kv[:, :, 1])  # values are moved, not computed


def test_a_negative_slot_is_not_stored(generator, where):
    kv = torch.full((2, 1, 2, BLOCK_SIZE, 16), 7.0, device=where)
    projected = torch.randn(2, 3 * 16, generator=generator, device=where)
    queries = rotate_and_store(kv, projected, None, 0.0, rotation(2, 16, torch.float32, generator), torch.tensor([-1, -5], device=where))
    assert torch.equal(kv, torch.full_like(kv, 7.0))
    assert not queries.isnan().any()


def test_no_tokens(generator, where):
    kv = torch.zeros(1, 1, 2, BLOCK_SIZE, 16, device=where)
    slots = torch.zeros(0, dtype=torch.int64, device=where)
    queries = rotate_and_store(kv, torch.zeros(0, 64, device=where), None, 0.0, rotation(0, 16, torch.float32, generator), slots)
    assert queries.shape == (0, 2, 16)
