"""Where the kernels find a position, beyond 2³¹ elements too."""

import pytest
import torch
import triton
import triton.language as tl

from disaggd.kernels.pool import check_floats, token_offsets


@triton.jit
def write_offsets(out, block_table, start, end, stride_block, stride_token, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr):
    offsets = token_offsets(block_table, start, end, stride_block, stride_token, BLOCK_SIZE, KEYS)
    tl.store(out + tl.arange(0, KEYS), offsets)


@pytest.mark.parametrize("block_size", [4, 12, 16, 64])
def test_offsets_pass_two_to_the_31st(block_size, where):
    table = torch.tensor([70_000, 80_000, 90_001, 3, 123_456, 8, 77_777, 2], dtype=torch.int32, device=where)
    out = torch.empty(16, dtype=torch.int64, device=where)
    stride_block, stride_token = 8 * 2 * 64 * 128, 128  # a layer of an 8B model: 2³¹ elements at 16,384 blocks
    write_offsets[(1,)](out, table, 16, 28, stride_block, stride_token, BLOCK_SIZE=block_size, KEYS=16)
    expected = [int(table[p // block_size]) * stride_block + p % block_size * stride_token for p in range(16, 28)]
    assert out[:12].tolist() == expected
    assert max(expected) > 2**31


def test_the_interpreter_refuses_what_it_gets_wrong(where):
    if where.type == "cuda":
        pytest.skip("no interpreter")
    with pytest.raises(AssertionError, match="float32"):
        check_floats(torch.zeros(1, dtype=torch.bfloat16))
