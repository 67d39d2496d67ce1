"""The kernels in C++ for x86-64 CPUs (`native/`), called through ctypes. Their formulas are those of `reference.py` and
`reference_sampling.py`.

The library is built with the package where a compiler is at hand, holds each kernel for several instruction sets, and works on
torch's own threads. Calls release the GIL. Knows tensors, nothing of models or batches.
"""

import ctypes
import logging
import sysconfig
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from disaggd.kernels import native_sources, onednn
from disaggd.kernels.draws import Draws

log = logging.getLogger(__name__)

PANEL = 64
"""Outputs whose weights lie side by side in a packed weight: 4 vectors of 16."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""As the library counts them."""

_STEPS = {torch.float32: 1, torch.bfloat16: 2}
"""Inputs that lie side by side in a packed weight."""


class Isa(IntEnum):
    """Instruction sets the kernels are compiled for, each with all before it."""

    BASELINE = 0
    """Any x86-64."""
    AVX2 = 1
    AVX512 = 2
    AVX512_BF16 = 3


_SIGNATURES = {
    "disaggd_add_rms_norm": [c_int, c_int, *[c_void_p] * 4, c_int64, c_int64, c_float],
    "disaggd_rotate_and_store": [c_int, c_int, *[c_void_p] * 7, *[c_int64] * 5, c_float],
    "disaggd_silu_mul": [c_int, c_int, c_void_p, c_void_p, c_int64, c_int64],
    "disaggd_attend": [c_int, c_int, *[c_void_p] * 6, *[c_int64] * 7, c_float],
    "disaggd_linear": [c_int, c_int, *[c_void_p] * 4, *[c_int64] * 3],
    "disaggd_linear_int8": [c_int, c_int, *[c_void_p] * 4, *[c_int64] * 3],
    "disaggd_decode": [c_int, c_int, c_void_p],
    "disaggd_sample": [c_int, c_void_p, c_void_p, *[c_int64] * 3, *[c_void_p] * 6],
    "disaggd_noise": [c_int, *[c_void_p] * 3, c_int64],
    "disaggd_repack": [c_int, c_int, c_int, *[c_void_p] * 3, *[c_int64] * 9],
    "disaggd_repack_fp8": [c_int, c_int, *[c_void_p] * 3, *[c_int64] * 9],
    "disaggd_unpack_fp8": [c_int, c_int, *[c_void_p] * 4, *[c_int64] * 7],
}


@cache
def library() -> ctypes.CDLL | None:
    """The library; None, and one warning, where it was not built or was built from other sources."""
    here = Path(__file__)
    built = here.with_name(f"_native{sysconfig.get_config_var('EXT_SUFFIX')}")  # named as if it were a module of Python's
    return _load(built, here.with_name("native"))


def _load(built: Path, sources: Path) -> ctypes.CDLL | None:
    """A library of other sources may read the structs that it is handed otherwise than `native_layers.py` writes them, and never return."""
    if not built.exists():
        log.warning("no native CPU kernels (was there a C++ compiler at install?): serving from PyTorch's operations, several times slower")
        return None
    loaded = ctypes.CDLL(str(built))
    if sources.is_dir() and _digest_of(loaded) != native_sources.digest(sources):  # a wheel has none beside it
        log.warning(
            "the native kernels were built from other sources: run make. Until then PyTorch's operations serve, several times slower"
        )
        return None
    for name, arguments in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    return loaded


def _digest_of(loaded: ctypes.CDLL) -> str | None:
    """Of the sources that it was built from; None for a library from before they were noted."""
    try:
        function = loaded.disaggd_sources
    except AttributeError:
        return None
    function.argtypes, function.restype = [], c_char_p
    text: bytes = function()
    return text.decode()


def best_isa(loaded: ctypes.CDLL) -> Isa:
    """The latest instruction set that this CPU has."""
    return Isa(loaded.disaggd_best_isa())


@dataclass(frozen=True, slots=True)
class Native:
    """The operations of `kernels.Ops`, for one instruction set."""

    library: ctypes.CDLL
    isa: Isa

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(x, None, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        assert residual.is_contiguous() and residual.shape == x.shape and residual.dtype == x.dtype
        return self._norm(x, residual, weight, eps)

    def _norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        rows, dim = x.shape
        assert x.is_contiguous() and weight.shape == (dim,) and weight.dtype == x.dtype
        normed = torch.empty_like(x)
        self.library.disaggd_add_rms_norm(
            self.isa,
            DTYPES[x.dtype],
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            normed.data_ptr(),
            rows,
            dim,
            eps,
        )
        return normed

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        assert gate_up.is_contiguous()
        rows, width = gate_up.shape
        out = gate_up.new_empty(rows, width // 2)
        self.library.disaggd_silu_mul(self.isa, DTYPES[out.dtype], gate_up.data_ptr(), out.data_ptr(), rows, width // 2)
        return out

    def pack(self, weight: Tensor) -> Tensor:
        """`weight` [out, in] as [out / PANEL, in / step, PANEL, step], 4 bytes a step; where our product does not apply, oneDNN's."""
        outputs, inputs = weight.shape
        step = _STEPS.get(weight.dtype)
        if step is None or outputs % PANEL or inputs % step:
            return onednn.pack(weight)
        return weight.view(outputs // PANEL, PANEL, inputs // step, step).transpose(1, 2).contiguous()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if weight.is_mkldnn or weight.dim() == 2:
            return onednn.linear(x, weight, bias)
        assert x.is_contiguous() and x.dtype == weight.dtype
        rows, inputs = x.shape
        outputs = weight.shape[0] * PANEL
        out = x.new_empty(rows, outputs)
        self.library.disaggd_linear(
            self.isa,
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
        return self.silu_mul(self.linear(x, weight, bias))

    def greedy(self, logits: Tensor) -> Tensor:
        return self._sample(logits, [None] * 6)

    def sample(self, logits: Tensor, draws: Draws) -> Tensor:
        draws.check(len(logits))
        columns = (draws.temperatures, draws.top_k, draws.top_p, draws.floors, draws.seeds, draws.positions)
        return self._sample(logits, [column.data_ptr() for column in columns])

    def _sample(self, logits: Tensor, columns: list[int] | list[None]) -> Tensor:
        rows, vocab_size = logits.shape
        assert logits.dtype == torch.float32 and logits.stride(1) == 1, f"{logits.dtype}, strides {logits.stride()}"
        tokens = torch.empty(rows, dtype=torch.int64)
        self.library.disaggd_sample(self.isa, logits.data_ptr(), tokens.data_ptr(), rows, vocab_size, logits.stride(0), *columns)
        return tokens

    def paged_attention(
        self,
        slot_mapping: Tensor,
        query_start: Tensor,
        context_lens: Tensor,
        block_tables: Tensor,
        *,
        kv_heads: int,
        block_size: int,
        window: int | None,
    ) -> "PagedAttention":
        return PagedAttention(self, slot_mapping, query_start, context_lens, block_tables, kv_heads, block_size, window)


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """Attention of one batch over a pool, layer by layer; see `disaggd.kernels.PagedAttention`."""

    native: Native
    slot_mapping: Tensor
    query_start: Tensor
    context_lens: Tensor
    block_tables: Tensor
    kv_heads: int
    block_size: int
    window: int | None

    def __post_init__(self) -> None:
        assert self.slot_mapping.dtype == torch.int64 and self.slot_mapping.is_contiguous()
        tables = (self.query_start, self.context_lens, self.block_tables)
        assert all(table.dtype == torch.int32 and table.is_contiguous() for table in tables)

    def rotate_and_store(
        self, kv: Tensor, projected: Tensor, norm_weight: Tensor | None, eps: float, rotation: tuple[Tensor, Tensor]
    ) -> Tensor:
        cos, signed_sin = rotation
        num_tokens, head_dim = len(projected), kv.shape[-1]
        num_heads = projected.shape[1] // head_dim - 2 * self.kv_heads
        assert projected.is_contiguous() and kv.is_contiguous() and cos.is_contiguous() and signed_sin.is_contiguous()
        assert kv.dtype == projected.dtype == cos.dtype == signed_sin.dtype
        assert norm_weight is None or (norm_weight.shape == (num_heads + self.kv_heads, head_dim) and norm_weight.dtype == kv.dtype)
        queries = projected.new_empty(num_tokens, num_heads, head_dim)
        self.native.library.disaggd_rotate_and_store(
            self.native.isa,
            DTYPES[kv.dtype],
            projected.data_ptr(),
            None if norm_weight is None else norm_weight.data_ptr(),
            cos.data_ptr(),
            signed_sin.data_ptr(),
            self.slot_mapping.data_ptr(),
            queries.data_ptr(),
            kv.data_ptr(),
            num_tokens,
            num_heads,
            self.kv_heads,
            head_dim,
            self.block_size,
            eps,
        )
        return queries

    def attend(self, kv: Tensor, queries: Tensor) -> Tensor:
        assert queries.is_contiguous() and kv.is_contiguous() and kv.dtype == queries.dtype
        _, num_heads, head_dim = queries.shape
        out = torch.empty_like(queries)
        self.native.library.disaggd_attend(
            self.native.isa,
            DTYPES[queries.dtype],
            queries.data_ptr(),
            kv.data_ptr(),
            out.data_ptr(),
            self.query_start.data_ptr(),
            self.context_lens.data_ptr(),
            self.block_tables.data_ptr(),
            *self.block_tables.shape,
            num_heads,
            self.kv_heads,
            head_dim,
            self.block_size,
            self.window or 0,
            head_dim**-0.5,
        )
        return out
