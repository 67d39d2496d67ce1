"""Weights of 8 bits: `w ≈ scale · q`, one float32 scale per output, q in −127 … 127; and projections by them in plain torch.

Symmetric, to the nearest: no element is off by more than half its scale. Activations stay in the model's dtype. The native kernels
(`native_int8.py`) multiply the same q in a layout of their own; this is their reference, and what serves where they were not built.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from disaggd.kernels.reference import silu_mul

SCALE_BYTES = 4
"""A packed weight holds an output's scale beside its q."""

_ROWS_AT_ONCE = 4096
"""Outputs that are held in float32 at a time: 16 MB of a weight 1,024 wide, where a whole head would be 0.6 GB."""


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` [out, in] → q int8 [out, in] and scales float32 [out]. A row of zeros has the scale 1."""
    weight = weight.float()
    largest = weight.abs().amax(1)
    scales = torch.where(largest > 0, largest / 127, 1.0)
    return (weight / scales[:, None]).round_().to(torch.int8), scales


def quantized_parts(weight: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """`quantize`, some rows at a time: the first of them, their q and their scales."""
    for first in range(0, len(weight), _ROWS_AT_ONCE):
        yield first, *quantize(weight[first : first + _ROWS_AT_ONCE])


def pack(weight: Tensor) -> Tensor:
    """`weight` [out, in] as int8 [out, in + 4]: every output's q, and the bytes of its scale."""
    outputs, inputs = weight.shape
    packed = weight.new_empty(outputs, inputs + SCALE_BYTES, dtype=torch.int8)
    for first, q, scales in quantized_parts(weight):
        rows = packed[first : first + len(q)]
        rows[:, :inputs], rows[:, inputs:] = q, scales[:, None].view(torch.int8)
    return packed


def linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Summed in float32, then scaled, then rounded once to the dtype of `x`."""
    q, scales = packed[:, :-SCALE_BYTES], packed[:, -SCALE_BYTES:].contiguous().view(torch.float32)[:, 0]
    y = torch.cat([F.linear(x.float(), part.float()) for part in torch.split(q, _ROWS_AT_ONCE)], dim=1) * scales
    return (y if bias is None else y + bias).to(x.dtype)


def linear_silu_mul(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return silu_mul(linear(x, packed, bias))
