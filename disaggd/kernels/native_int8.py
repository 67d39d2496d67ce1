"""Projections by weights of 8 bits in the native kernels: `native/linear_int8.h`. Their formulas are those of `int8.py`."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from disaggd.kernels import int8
from disaggd.kernels.native import DTYPES, PANEL, Isa, Native


@dataclass(frozen=True, slots=True)
class NativeInt8:
    """Those operations of `kernels.Ops` that know a packed weight.

    A row's result is the same bits alone and among others. Where this CPU does not multiply the dtype of `x`, it is multiplied as float32.
    """

    native: Native

    def pack(self, weight: Tensor) -> Tensor:
        """`weight` [out, in] as int8 in panels of PANEL outputs: the bytes of their scales, then q [in / step, PANEL, step].

        The shape says [out, in + 4], `in` rounded up to whole steps; the storage goes on to the end of the last panel.
        """
        outputs, inputs = weight.shape
        step = self._step(weight.dtype)
        steps, panels = -(-inputs // step), -(-outputs // PANEL)
        packed = torch.zeros(panels * PANEL, steps * step + int8.SCALE_BYTES, dtype=torch.int8)
        scales_of, q_of = torch.split(packed.view(panels, -1), [PANEL * int8.SCALE_BYTES, PANEL * steps * step], dim=1)
        for first, q, scales in int8.quantized_parts(weight):
            part = slice(first // PANEL, -(-(first + len(q)) // PANEL))
            padded = F.pad(q, (0, steps * step - inputs, 0, -len(q) % PANEL))
            q_of[part] = padded.view(-1, PANEL, steps, step).transpose(1, 2).flatten(1)
            scales_of[part] = F.pad(scales, (0, -len(q) % PANEL)).view(-1, PANEL).view(torch.int8)
        return packed[:outputs]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.dtype != torch.float32 and self._step(x.dtype) == 1:
            return self.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)
        (rows, given), (outputs, row_bytes) = x.shape, weight.shape
        inputs = row_bytes - int8.SCALE_BYTES
        if given < inputs:
            x = F.pad(x, (0, inputs - given))
        assert x.is_contiguous()
        out = x.new_empty(rows, outputs)
        self.native.library.disaggd_linear_int8(
            self.native.isa,
            DTYPES[x.dtype],
            x.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            rows,
            inputs,
            outputs,
        )
        return out

    def linear_silu_mul(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.native.silu_mul(self.linear(x, weight, bias))

    def _step(self, dtype: torch.dtype) -> int:
        """Inputs that are multiplied at a time."""
        return 2 if dtype == torch.bfloat16 and self.native.isa >= Isa.AVX512_BF16 else 1
