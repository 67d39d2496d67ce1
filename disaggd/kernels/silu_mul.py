"""The gated activation of an MLP, from the fused projection's output.

out = silu(gate) · up,   silu(x) = x / (1 + e⁻ˣ)     in float32, rounded once
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from disaggd.kernels.chain import chained, let_next_start, wait_for_previous
from disaggd.kernels.configurations import SILU_MUL
from disaggd.kernels.pool import check_floats


@triton.jit
def _silu_mul(out, gate_up, stride_out, stride_gate_up, COLUMNS: tl.constexpr, SIZE: tl.constexpr, CHAINED: tl.constexpr):
    let_next_start(CHAINED)
    wait_for_previous(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    real = columns < COLUMNS
    at = gate_up + row * stride_gate_up + columns
    gate = tl.load(at, mask=real, other=0.0).to(tl.float32)
    up = tl.load(at + COLUMNS, mask=real, other=0.0).to(tl.float32)
    tl.store(out + row * stride_out + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=real)


def silu_mul(gate_up: Tensor) -> Tensor:
    """`[gate, up]` [n, 2 · f] → [n, f], a new tensor."""
    num_rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    check_floats(gate_up)
    assert gate_up.shape[1] == 2 * columns
    out = torch.empty((num_rows, columns), dtype=gate_up.dtype, device=gate_up.device)
    if num_rows and columns:
        _silu_mul[(num_rows, triton.cdiv(columns, SILU_MUL.size))](
            out, gate_up, out.stride(0), gate_up.stride(0), COLUMNS=columns, SIZE=SILU_MUL.size, num_warps=SILU_MUL.warps, **chained()
        )
    return out
