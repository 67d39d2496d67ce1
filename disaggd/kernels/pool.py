"""Where a layer's pool keeps the keys and values of a sequence, as the Triton kernels see it.

A layer's pool is `kv` [num_blocks, kv_heads, 2, block_size, head_dim], any strides but 1 along `head_dim`. Position p of a sequence lies in
block `block_table[p // block_size]` at offset `p % block_size`. Block ids are widened to int64 before they are multiplied: a pool of an
8B model passes 2³¹ elements at 455 blocks.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels run in Triton's interpreter, on the CPU: for tests."""


@triton.jit
def token_offsets(block_table, start, end, stride_block, stride_token, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr):
    """int64 [KEYS]: where positions start, start + 1, … lie, counted from their head's first key. Those from `end` on lie in some block.

    `start` is a multiple of KEYS. Where a tile of KEYS positions lies within one block, one block id is read, and the tile is one run
    of memory.
    """
    if BLOCK_SIZE % KEYS == 0:
        block = tl.load(block_table + start // BLOCK_SIZE).to(tl.int64)
        offsets = block * stride_block + (start % BLOCK_SIZE + tl.arange(0, KEYS)) * stride_token
    else:
        positions = start + tl.arange(0, KEYS)
        blocks = tl.load(block_table + positions // BLOCK_SIZE, mask=positions < end, other=0).to(tl.int64)
        offsets = blocks * stride_block + (positions % BLOCK_SIZE) * stride_token
    return offsets


def check_floats(*tensors: Tensor) -> None:
    """Assert one floating dtype, and elements side by side along the last dimension."""
    dtype = tensors[0].dtype
    assert dtype in FLOATS, f"kernels compute in {FLOATS}, not in {dtype}"
    assert not (INTERPRETED and dtype == torch.bfloat16), "Triton's interpreter multiplies bfloat16 as integers: test in float32"
    assert all(tensor.dtype == dtype for tensor in tensors), f"dtypes differ: {[tensor.dtype for tensor in tensors]}"
    assert all(tensor.stride(-1) == 1 for tensor in tensors), "the last dimension must be contiguous"


def check_pool(kv: Tensor, kv_heads: int, head_dim: int) -> None:
    """Assert that `kv` is one layer's pool of so many heads of such a width."""
    assert kv.dim() == 5, f"a layer's pool has five dimensions, not {kv.dim()}"
    assert (kv.shape[1], kv.shape[2], kv.shape[4]) == (kv_heads, 2, head_dim), f"pool {tuple(kv.shape)}, heads {kv_heads} × {head_dim}"
    assert kv.stride(4) == 1, "a token's key must be contiguous"


def check_batch(query_start: Tensor, context_lens: Tensor, block_tables: Tensor) -> None:
    """Assert the dtypes and shapes that `disaggd.model.batch.Batch` gives them."""
    num_sequences = len(context_lens)
    assert query_start.dtype == context_lens.dtype == block_tables.dtype == torch.int32
    assert query_start.shape == (num_sequences + 1,)
    assert block_tables.shape[0] == num_sequences
    assert query_start.is_contiguous() and context_lens.is_contiguous() and block_tables.stride(1) == 1
