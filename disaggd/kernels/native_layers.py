"""A decoder's layers in one call of the native library, for steps of few tokens: `native/decoder.h`.

A step of a small model is some hundred kernels of a few microseconds, and as many calls from Python and meetings of threads between them;
here it is one, and the threads meet in place.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from disaggd.kernels.int8 import SCALE_BYTES
from disaggd.kernels.layer_weights import LayerWeights, Projection
from disaggd.kernels.native import DTYPES, PANEL, Isa, Native

MAX_ROWS = 128


class _Projection(ctypes.Structure):
    _fields_ = (("packed", c_void_p), ("bias", c_void_p), ("inputs", c_int64), ("outputs", c_int64))


class _Layer(ctypes.Structure):
    _fields_ = (
        ("attention_norm", c_void_p),
        ("head_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("qkv", _Projection),
        ("out", _Projection),
        ("gate_up", _Projection),
        ("down", _Projection),
    )


class _Decode(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("layers", "before", "residual", "x", "cos", "signed_sin", "slots", "pool")),
        *((name, c_void_p) for name in ("query_start", "context_lens", "block_tables")),
        *((name, c_int64) for name in ("num_layers", "layer_bytes", "int8_weights", "rows", "sequences", "table_stride")),
        *((name, c_int64) for name in ("heads", "kv_heads", "head_dim", "block_size", "window")),
        ("scale", c_float),
        ("eps", c_float),
    )


@dataclass(frozen=True, slots=True)
class Fusing:
    """`Ops.fuse`."""

    native: Native

    def __call__(self, layers: Sequence[LayerWeights], window: int | None) -> "NativeLayers | None":
        """None unless every projection is packed for our own product, in one dtype."""
        dtype = layers[0].attention_norm.dtype
        if not all(_is_ours(self.native, projection, dtype) for layer in layers for projection in _projections(layer)):
            return None
        if any(_outputs(layer.gate_up) % (2 * PANEL) or _inputs(layer.qkv) != len(layer.attention_norm) for layer in layers):
            return None  # gate and up would share a panel; int8 was padded to whole steps
        return NativeLayers(self.native, layers, window)


class NativeLayers:
    """See `disaggd.kernels.FusedLayers`."""

    def __init__(self, kernels: Native, layers: Sequence[LayerWeights], window: int | None) -> None:
        self.max_rows = MAX_ROWS
        self._kernels = kernels
        self._weights = tuple(layers)  # whose memory the next line points to
        self._layers = (_Layer * len(layers))(*map(_layer, layers))
        self._window = window
        self._eps = layers[0].eps
        self._int8 = layers[0].qkv.weight.dtype == torch.int8
        self._hidden = len(layers[0].attention_norm)
        self._projected = _outputs(layers[0].qkv)

    def __call__(
        self,
        layers: range,
        x: Tensor | None,
        residual: Tensor,
        rotation: tuple[Tensor, Tensor],
        kv: Tensor,
        slot_mapping: Tensor,
        query_start: Tensor,
        context_lens: Tensor,
        block_tables: Tensor,
    ) -> Tensor:
        cos, signed_sin = rotation
        rows, sequences, tables = len(residual), len(context_lens), (query_start, context_lens, block_tables)
        num_layers, _, kv_heads, _, block_size, head_dim = kv.shape
        before = residual if x is None else x
        assert residual.shape == before.shape == (rows, self._hidden) and rows <= self.max_rows
        assert num_layers == len(self._weights) and layers == range(num_layers)[layers.start : layers.stop]
        assert slot_mapping.shape == (rows,) and query_start.shape == (sequences + 1,) and len(block_tables) == sequences
        assert all(tensor.is_contiguous() for tensor in (before, residual, cos, signed_sin, kv, slot_mapping, *tables))
        assert before.dtype == residual.dtype == kv.dtype == cos.dtype == signed_sin.dtype == self._weights[0].attention_norm.dtype
        assert slot_mapping.dtype == torch.int64 and all(table.dtype == torch.int32 for table in tables)
        result = torch.empty_like(residual)
        step = _Decode(
            layers=ctypes.addressof(self._layers) + layers.start * ctypes.sizeof(_Layer),
            before=None if x is None else x.data_ptr(),
            residual=residual.data_ptr(),
            x=result.data_ptr(),
            cos=cos.data_ptr(),
            signed_sin=signed_sin.data_ptr(),
            slots=slot_mapping.data_ptr(),
            pool=kv[layers.start].data_ptr(),
            query_start=query_start.data_ptr(),
            context_lens=context_lens.data_ptr(),
            block_tables=block_tables.data_ptr(),
            num_layers=len(layers),
            layer_bytes=kv.stride(0) * kv.element_size(),
            int8_weights=self._int8,
            rows=rows,
            sequences=sequences,
            table_stride=block_tables.shape[1],
            heads=self._projected // head_dim - 2 * kv_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            window=self._window or 0,
            scale=head_dim**-0.5,
            eps=self._eps,
        )
        self._kernels.library.disaggd_decode(self._kernels.isa, DTYPES[kv.dtype], ctypes.byref(step))
        return result


def _projections(layer: LayerWeights) -> tuple[Projection, ...]:
    return layer.qkv, layer.out, layer.gate_up, layer.down


def _is_ours(kernels: Native, projection: Projection, dtype: torch.dtype) -> bool:
    weight = projection.weight
    if weight.dtype == torch.int8:
        return dtype == torch.float32 or (dtype == torch.bfloat16 and kernels.isa >= Isa.AVX512_BF16)
    return weight.dtype == dtype and not weight.is_mkldnn and weight.dim() == 4


def _inputs(projection: Projection) -> int:
    weight = projection.weight
    return weight.shape[1] - SCALE_BYTES if weight.dtype == torch.int8 else weight.shape[1] * weight.shape[3]


def _outputs(projection: Projection) -> int:
    return projection.weight.shape[0] * (1 if projection.weight.dtype == torch.int8 else PANEL)


def _projection(projection: Projection) -> _Projection:
    bias = projection.bias
    return _Projection(projection.weight.data_ptr(), None if bias is None else bias.data_ptr(), _inputs(projection), _outputs(projection))


def _layer(layer: LayerWeights) -> _Layer:
    return _Layer(
        layer.attention_norm.data_ptr(),
        None if layer.head_norm is None else layer.head_norm.data_ptr(),
        layer.mlp_norm.data_ptr(),
        *map(_projection, _projections(layer)),
    )
