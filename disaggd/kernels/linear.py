"""Projections of a few rows: decoding multiplies each weight by hardly anything, so all that counts is how fast the weights are read.

    out[r] = x[r] · weightᵀ + bias                                 in float32, rounded once
    out[r] = silu(gate) · up,   [gate, up] = x[r] · weightᵀ + bias     gated: an MLP's first projection and what follows it

One row is multiplied element by element, a few on tensor cores. A weight with too few outputs to keep the device reading is split along its
inputs, and a second kernel adds the parts. More rows, or a prompt's, are the vendor's library's: there it is as fast or faster.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from disaggd.kernels.chain import chained, let_next_start, wait_for_previous
from disaggd.kernels.configurations import (
    ADD_PARTS,
    LINEAR_ROW,
    LINEAR_ROW_GATED,
    LINEAR_ROWS,
    LINEAR_ROWS_GATED,
    LINEAR_ROWS_WIDE,
    MOST_ROWS,
)
from disaggd.kernels.pool import check_floats
from disaggd.kernels.silu_mul import silu_mul

_LEAST_ROWS = 16  # of a tensor-core product
_ENOUGH_PROGRAMS = 96
_WIDE = 65_536  # outputs


@triton.jit
def _gate(gate, up, out):
    """As if both had been stored between, in the dtype of `out`."""
    gate = gate.to(out.dtype.element_ty).to(tl.float32)
    return gate * tl.sigmoid(gate) * up.to(out.dtype.element_ty).to(tl.float32)


@triton.jit
def _one_row(
    out,
    x,
    weight,
    bias,
    outputs,
    inputs,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    CHAINED: tl.constexpr,
):
    rows = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    depth = tl.arange(0, DEPTH)
    real = (rows < outputs)[:, None]
    at = weight + rows[:, None].to(tl.int64) * inputs + depth[None, :]
    to_up = outputs.to(tl.int64) * inputs
    let_next_start(CHAINED)
    # The first stretch of the weights is on its way while the kernel before still computes `x`.
    here = None if EVEN else real & (depth < inputs)[None, :]
    ahead = tl.load(at, mask=here, other=None if EVEN else 0.0)
    up_ahead = ahead
    if GATED:
        up_ahead = tl.load(at + to_up, mask=here, other=None if EVEN else 0.0)
    wait_for_previous(CHAINED)
    total = tl.zeros([OUTPUTS, DEPTH], tl.float32)
    up_total = total
    for first in range(0, inputs, DEPTH):
        values = tl.load(x + first + depth, mask=None if EVEN else first + depth < inputs, other=None if EVEN else 0.0).to(tl.float32)
        beyond = real & (first + DEPTH + depth < inputs)[None, :]
        weights = ahead
        ahead = tl.load(at + first + DEPTH, mask=beyond, other=0.0)
        total += weights.to(tl.float32) * values[None, :]
        if GATED:
            weights = up_ahead
            up_ahead = tl.load(at + to_up + first + DEPTH, mask=beyond, other=0.0)
            up_total += weights.to(tl.float32) * values[None, :]
    sums = tl.sum(total, 1)
    if BIAS:
        sums += tl.load(bias + rows, mask=rows < outputs, other=0.0).to(tl.float32)
    if GATED:
        up_sums = tl.sum(up_total, 1)
        if BIAS:
            up_sums += tl.load(bias + outputs + rows, mask=rows < outputs, other=0.0).to(tl.float32)
        sums = _gate(sums, up_sums, out)
    tl.store(out + rows, sums.to(out.dtype.element_ty), mask=rows < outputs)


# What changes from step to step is not specialized on: a new parity of it would compile anew, under a request.
@triton.jit(do_not_specialize=["num_rows"])
def _few_rows(
    out,  # float32 [splits, num_rows, outputs] where the inputs are split
    x,
    weight,
    bias,
    num_rows,
    outputs,
    inputs,
    stride_x,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    CHAINED: tl.constexpr,
):
    columns = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    part = tl.program_id(1)
    rows = tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    span = tl.cdiv(tl.cdiv(inputs, DEPTH), tl.num_programs(1)) * DEPTH
    start = part * span
    end = tl.minimum(start + span, inputs)
    weight_at = weight + columns[:, None].to(tl.int64) * inputs + depth[None, :]
    x_at = x + rows[None, :].to(tl.int64) * stride_x + depth[:, None]
    up_at = weight_at + outputs.to(tl.int64) * inputs
    let_next_start(CHAINED)
    wait_for_previous(CHAINED)
    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    up_total = total
    for first in range(start, end, DEPTH):
        inside = first + depth < end
        here = None if EVEN else (columns < outputs)[:, None] & inside[None, :]
        seen = (rows < num_rows)[None, :] if EVEN else (rows < num_rows)[None, :] & inside[:, None]
        values = tl.load(x_at + first, mask=seen, other=0.0)
        weights = tl.load(weight_at + first, mask=here, other=None if EVEN else 0.0)
        total = tl.dot(weights, values, total, input_precision="ieee")
        if GATED:
            weights = tl.load(up_at + first, mask=here, other=None if EVEN else 0.0)
            up_total = tl.dot(weights, values, up_total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + columns, mask=columns < outputs, other=0.0).to(tl.float32)[:, None]
    if GATED:
        if BIAS:
            up_total += tl.load(bias + outputs + columns, mask=columns < outputs, other=0.0).to(tl.float32)[:, None]
        total = _gate(total, up_total, out)
    to = out + (part * num_rows + rows[None, :]) * outputs + columns[:, None]
    tl.store(to, total.to(out.dtype.element_ty), mask=(rows < num_rows)[None, :] & (columns < outputs)[:, None])


@triton.jit
def _add_parts(out, parts, bias, total, outputs, SPLITS: tl.constexpr, SIZE: tl.constexpr, BIAS: tl.constexpr, CHAINED: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    let_next_start(CHAINED)
    wait_for_previous(CHAINED)
    sums = tl.zeros([SIZE], tl.float32)
    for part in tl.static_range(SPLITS):
        sums += tl.load(parts + part * total + at, mask=at < total, other=0.0)
    if BIAS:
        sums += tl.load(bias + at % outputs, mask=at < total, other=0.0).to(tl.float32)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=at < total)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x` [n, in] · `weight` [out, in]ᵀ + `bias` [out] → [n, out], a new tensor; up to `MOST_ROWS` rows by these kernels."""
    if not 0 < x.shape[0] <= MOST_ROWS:
        return F.linear(x, weight, bias)
    return _project(x, weight, bias, weight.shape[0], gated=False)


def linear_silu_mul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`silu_mul` of `linear`: `weight` [2 · f, in] is a gate's above its other factor's → [n, f], a new tensor."""
    if not 0 < x.shape[0] <= MOST_ROWS:
        return silu_mul(F.linear(x, weight, bias))
    return _project(x, weight, bias, weight.shape[0] // 2, gated=True)


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int, *, gated: bool) -> Tensor:
    check_floats(x, weight, *([] if bias is None else [bias]))
    assert weight.is_contiguous() and x.shape[1] == weight.shape[1] and (bias is None or bias.is_contiguous())
    out = torch.empty((x.shape[0], outputs), dtype=x.dtype, device=x.device)
    launch = _launch_one_row if len(x) == 1 else _launch_few_rows
    launch(out, x, weight, bias, gated)
    return out


def _launch_one_row(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool) -> None:
    outputs, inputs = out.shape[1], weight.shape[1]
    tile = LINEAR_ROW_GATED if gated else LINEAR_ROW
    _one_row[(triton.cdiv(outputs, tile.outputs),)](
        out,
        x,
        weight,
        weight if bias is None else bias,
        outputs,
        inputs,
        OUTPUTS=tile.outputs,
        DEPTH=tile.depth,
        EVEN=outputs % tile.outputs == 0 and inputs % tile.depth == 0,
        BIAS=bias is not None,
        GATED=gated,
        num_warps=tile.warps,
        **chained(),
    )


def _launch_few_rows(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool) -> None:
    (num_rows, outputs), inputs = out.shape, weight.shape[1]
    tile = (LINEAR_ROWS_GATED if gated else LINEAR_ROWS_WIDE if outputs >= _WIDE else LINEAR_ROWS)[weight.itemsize]
    programs = triton.cdiv(outputs, tile.outputs)
    splits = 1 if gated else min(triton.cdiv(_ENOUGH_PROGRAMS, programs), triton.cdiv(inputs, tile.depth))
    has_bias = bias is not None
    parts = out if splits == 1 else torch.empty((splits, num_rows, outputs), dtype=torch.float32, device=x.device)
    _few_rows[(programs, splits)](
        parts,
        x,
        weight,
        weight if bias is None else bias,
        num_rows,
        outputs,
        inputs,
        x.stride(0),
        ROWS=max(_LEAST_ROWS, triton.next_power_of_2(num_rows)),
        OUTPUTS=tile.outputs,
        DEPTH=tile.depth,
        EVEN=outputs % tile.outputs == 0 and inputs % tile.depth == 0,
        BIAS=has_bias and splits == 1,
        GATED=gated,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **chained(),
    )
    if splits > 1:
        _add_parts[(triton.cdiv(out.numel(), ADD_PARTS.size),)](
            out,
            parts,
            weight if bias is None else bias,
            out.numel(),
            outputs,
            SPLITS=splits,
            SIZE=ADD_PARTS.size,
            BIAS=has_bias,
            num_warps=ADD_PARTS.warps,
            **chained(),
        )
