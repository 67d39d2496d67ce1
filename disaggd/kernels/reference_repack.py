"""Blocks of the pool in another layout, and back, in plain torch; `kernels.Ops` says what each does."""

import torch
from torch import Tensor

from disaggd.kernels import fp8


def repack(out: Tensor, kv: Tensor, block_ids: Tensor, *, layers: range, heads: range, start: int, num_tokens: int) -> None:
    num_blocks, target_size = out.shape[1], target_block_size(out, kv.shape[-1])
    check_repack(out, kv, block_ids, layers, heads, start, num_tokens, target_size)
    chosen = kv[layers.start : layers.stop, block_ids.long(), heads.start : heads.stop]  # [layers, blocks, heads, 2, block_size, head_dim]
    tokens = chosen.permute(0, 2, 3, 1, 4, 5).flatten(3, 4)[:, :, :, start : start + num_tokens]
    padded = torch.nn.functional.pad(tokens, (0, 0, 0, num_blocks * target_size - num_tokens))
    blocks = padded.reshape(*padded.shape[:3], num_blocks, target_size, -1).permute(0, 3, 1, 2, 4, 5)
    out.copy_(fp8.quantize(blocks) if out.dtype == torch.uint8 else blocks)


def unpack_fp8(kv: Tensor, wire: Tensor, block_ids: Tensor, landed_ids: Tensor) -> None:
    check_unpack(kv, wire, block_ids, landed_ids)
    kv[:, block_ids.long()] = fp8.dequantize(wire[:, landed_ids.long()], kv.shape[-2], kv.shape[-1], kv.dtype)


def target_block_size(out: Tensor, head_dim: int) -> int:
    """Tokens in a block of `repack`'s output."""
    return int(out.shape[4]) if out.dtype != torch.uint8 else (int(out.shape[3]) - fp8.HEADER_BYTES) // (2 * head_dim)


def check_repack(
    out: Tensor, kv: Tensor, block_ids: Tensor, layers: range, heads: range, start: int, num_tokens: int, target_size: int
) -> None:
    """Assert that shapes fit each other, and that the ids name as many blocks as the tokens lie in."""
    _, _, kv_heads, two, block_size, head_dim = kv.shape
    assert two == 2 and layers.step == heads.step == 1, "layers and heads are intervals"
    assert 0 <= layers.start <= layers.stop <= kv.shape[0] and 0 <= heads.start <= heads.stop <= kv_heads, f"{layers}, {heads}"
    assert target_size > 0 and 0 <= start < block_size and num_tokens >= 0
    assert len(block_ids) == -(-(start + num_tokens) // block_size), f"{len(block_ids)} blocks for {num_tokens} tokens from {start}"
    in_head = (fp8.head_bytes(target_size, head_dim),) if out.dtype == torch.uint8 else (2, target_size, head_dim)
    shape = (len(layers), -(-num_tokens // target_size), len(heads), *in_head)
    assert out.shape == shape and out.is_contiguous(), f"{tuple(out.shape)} instead of {shape}"


def check_unpack(kv: Tensor, wire: Tensor, block_ids: Tensor, landed_ids: Tensor) -> None:
    num_layers, _, kv_heads, _, block_size, head_dim = kv.shape
    assert wire.dtype == torch.uint8 and len(block_ids) == len(landed_ids)
    assert (wire.shape[0], *wire.shape[2:]) == (num_layers, kv_heads, fp8.head_bytes(block_size, head_dim)), f"wire {tuple(wire.shape)}"
