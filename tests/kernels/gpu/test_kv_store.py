import torch

from disaggd.kernels.kv_store import kv_store


def test_each_token_goes_to_its_slot_and_nothing_else_changes(dtype, generator, where):
    block_size, kv_heads, head_dim = 4, 3, 80
    kv = torch.full((9, kv_heads, 2, block_size, head_dim), 7.0, dtype=dtype, device=where)
    fused = torch.randn(5, 2 * kv_heads + 4, head_dim, generator=generator, device=where).to(dtype)
    keys, values = fused[:, 4 : 4 + kv_heads], fused[:, 4 + kv_heads :]
    slots = torch.tensor([3, 4, 35, -1, 18], device=where)
    expected = kv.clone()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:  # negative: padding of a captured batch
            expected[slot // block_size, :, 0, slot % block_size] = keys[token]
            expected[slot // block_size, :, 1, slot % block_size] = values[token]
    kv_store(kv, keys, values, slots)
    assert torch.equal(kv, expected)


def test_more_heads_than_a_program_holds(generator, where):
    kv = torch.zeros(2, 11, 2, 1, 16, device=where)
    keys, values = torch.randn(2, 1, 11, 16, generator=generator, device=where)
    kv_store(kv, keys, values, torch.tensor([1], device=where))
    assert torch.equal(kv[1, :, 0, 0], keys[0]) and torch.equal(kv[1, :, 1, 0], values[0]) and not kv[0].any()


def test_no_tokens(where):
    nothing = torch.zeros(0, 2, 16, device=where)
    kv_store(torch.zeros(1, 2, 2, 4, 16, device=where), nothing, nothing, torch.zeros(0, dtype=torch.int64, device=where))
