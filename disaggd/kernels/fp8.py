"""KV in 8 bits, as a wire format: float8 e4m3, and a float32 scale for the keys and one for the values of each head of a block.

    scale = max(amax |x| / 448, 2⁻¹²⁶)      over the finite x of one head's keys, or values, in one block of one layer
    q     = e4m3(x · (1 / scale))            to the nearest, ties to even
    x     ≈ q · scale

A value is off by at most a 16th of itself, or by 2⁻¹⁰ of the scale where that is more. What is no finite number becomes NaN, and changes
no other value. A head's block is

    K's scale, V's scale, 8 unused bytes | q of the keys [block_size, head_dim] | q of the values

so that a range of heads is contiguous, as it is in the pool, and 128-bit stores are aligned.
"""

import torch
from torch import Tensor

HEADER_BYTES = 16
LARGEST = 448.0
LEAST_SCALE = 2.0**-126
"""Below it the reciprocal is not finite, or not exact: what is so small loses bits, at most 2⁻¹³⁶ of them."""


def head_bytes(block_size: int, head_dim: int) -> int:
    """Of one head's keys and values in a block."""
    return HEADER_BYTES + 2 * block_size * head_dim


def quantize(heads: Tensor) -> Tensor:
    """`heads` [..., 2, block_size, head_dim], floats → uint8 [..., head_bytes]."""
    x = heads.float().flatten(-2)  # [..., 2, block_size · head_dim]
    is_finite = x.isfinite()
    largest = x.new_tensor(LARGEST)  # on the same device: by a number a GPU divides as it multiplies by the reciprocal, a last bit off
    scale = (x.where(is_finite, 0).abs().amax(-1) / largest).clamp(min=LEAST_SCALE)
    q = (x * scale.reciprocal()[..., None]).where(is_finite, torch.nan).to(torch.float8_e4m3fn)
    header = torch.zeros(*scale.shape[:-1], HEADER_BYTES, dtype=torch.uint8, device=x.device)
    header.view(torch.float32)[..., :2] = scale
    return torch.cat([header, q.flatten(-2).view(torch.uint8)], -1)


def dequantize(wire: Tensor, block_size: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """The inverse: uint8 [..., head_bytes] → `dtype` [..., 2, block_size, head_dim]."""
    scale = wire[..., :HEADER_BYTES].contiguous().view(torch.float32)[..., :2, None, None]
    q = wire[..., HEADER_BYTES:].contiguous().view(torch.float8_e4m3fn).float()
    return (q.view(*wire.shape[:-1], 2, block_size, head_dim) * scale).to(dtype)
