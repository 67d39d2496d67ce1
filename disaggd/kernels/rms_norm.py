"""RMS norm (Zhang & Sennrich 2019), with the residual stream's addition before it.

x   = x + residual                                 rounded to their dtype, as the unfused sum is
out = x / √(mean(x²) + eps) · weight               in float32, rounded once
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from disaggd.kernels.chain import chained, let_next_start, wait_for_previous
from disaggd.kernels.configurations import NORM
from disaggd.kernels.pool import check_floats


@triton.jit
def _norm(
    out,
    x,
    residual,
    weight,
    eps,
    stride_out,
    stride_x,
    stride_residual,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
    CHAINED: tl.constexpr,
):
    let_next_start(CHAINED)
    wait_for_previous(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    real = columns < COLUMNS
    loaded = tl.load(x + row * stride_x + columns, mask=real, other=0.0)
    value = loaded.to(tl.float32)
    if ADD:
        to = residual + row * stride_residual + columns
        rounded = (value + tl.load(to, mask=real, other=0.0).to(tl.float32)).to(loaded.dtype)
        tl.store(to, rounded, mask=real)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / COLUMNS + eps)
    by = tl.load(weight + columns, mask=real, other=0.0).to(tl.float32)
    tl.store(out + row * stride_out + columns, (value * scale * by).to(loaded.dtype), mask=real)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x` [n, dim], `weight` [dim] → normalized `x`, a new tensor."""
    return _launch(x, None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds `x` [n, dim] to `residual` in place; returns the sum normalized, a new tensor."""
    return _launch(x, residual, weight, eps)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    num_rows, dim = x.shape
    check_floats(x, weight, *([] if residual is None else [residual]))
    assert weight.shape == (dim,) and (residual is None or residual.shape == x.shape)
    out = torch.empty((num_rows, dim), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    tile = next((tile for tile in NORM if dim <= tile.size), None)
    assert tile is not None, f"rows of {dim} are wider than {NORM[-1].size}"
    other = x if residual is None else residual
    _norm[(num_rows,)](
        out,
        x,
        other,
        weight,
        eps,
        out.stride(0),
        x.stride(0),
        other.stride(0),
        COLUMNS=dim,
        WIDTH=tile.size,
        ADD=residual is not None,
        num_warps=tile.warps,
        **chained(),
    )
    return out
