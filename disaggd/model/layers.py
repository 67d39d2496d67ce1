"""A decoder layer, written as its equation. Plain classes: calling an `nn.Module` costs 2 µs, hundreds of times a step.

Knows tensors and operations; nothing of files, families or batches. Of several ranks each has rows of `qkv` and `gate_up`, and columns of
`out` and `down`, so that after each of the latter two the ranks add up their shares.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from disaggd.kernels import Ops, PagedAttention
from disaggd.kernels.layer_weights import LayerWeights, Projection
from disaggd.model.parallel import Ranks
from disaggd.model.spec import RopeScaling

Rotation = tuple[Tensor, Tensor]
"""Cosine and signed sine, [num_tokens, 1, head_dim] each, in the model's dtype."""


@dataclass(slots=True)
class Linear:
    """`x · weightᵀ + bias`."""

    ops: Ops
    weight: Tensor  # [out, in]; once packed, in a layout that only `ops.linear` reads
    bias: Tensor | None  # [out]

    def pack(self) -> None:
        self.weight = self.ops.pack(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.weight, self.bias)

    @property
    def projection(self) -> Projection:
        return Projection(self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """`x / rms(x) · weight` (Zhang & Sennrich 2019) of the residual stream, to which `x`, if any, is added in place first."""

    ops: Ops
    weight: Tensor  # [hidden]
    eps: float

    def __call__(self, x: Tensor | None, residual: Tensor) -> Tensor:
        if x is None:
            return self.ops.rms_norm(residual, self.weight, self.eps)
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """Every query and key head RMS-normalized by itself (Qwen3)."""

    weight: Tensor  # [heads + kv_heads, head_dim]: the query norm's weight per query head, the key norm's per KV head
    eps: float


@dataclass(frozen=True, slots=True)
class Attention:
    """Rotary attention of grouped heads over the paged pool."""

    qkv: Linear
    out: Linear
    head_norm: HeadNorm | None

    def __call__(self, x: Tensor, rotation: Rotation, attention: PagedAttention, kv: Tensor) -> Tensor:
        weight, eps = (None, 0.0) if self.head_norm is None else (self.head_norm.weight, self.head_norm.eps)
        queries = attention.rotate_and_store(kv, self.qkv(x), weight, eps, rotation)
        return self.out(attention.attend(kv, queries).flatten(1))


@dataclass(frozen=True, slots=True)
class MLP:
    """`down(silu(gate(x)) · up(x))`."""

    ops: Ops
    gate_up: Linear
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.ops.linear_silu_mul(x, self.gate_up.weight, self.gate_up.bias))


@dataclass(frozen=True, slots=True)
class Layer:
    """A pre-norm decoder layer. `x`, what the layer before adds to the residual stream, is added with the norm, in one pass over both."""

    attention_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: MLP
    ranks: Ranks

    def __call__(self, x: Tensor | None, residual: Tensor, rotation: Rotation, attention: PagedAttention, kv: Tensor) -> Tensor:
        x = self.ranks.sum(self.attention(self.attention_norm(x, residual), rotation, attention, kv))
        return self.ranks.sum(self.mlp(self.mlp_norm(x, residual)))

    @property
    def weights(self) -> LayerWeights:
        """For kernels that compute whole layers."""
        head_norm = self.attention.head_norm
        return LayerWeights(
            attention_norm=self.attention_norm.weight,
            qkv=self.attention.qkv.projection,
            head_norm=None if head_norm is None else head_norm.weight,
            out=self.attention.out.projection,
            mlp_norm=self.mlp_norm.weight,
            gate_up=self.mlp.gate_up.projection,
            down=self.mlp.down.projection,
            eps=self.attention_norm.eps,
        )


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians per position of each pair of a head's coordinates, float32 [head_dim / 2].

    `theta^(−2i/d)` (Su et al. 2021), with Llama 3.1's scaling: wavelengths beyond `original / low_freq_factor` are stretched by
    `factor`, those within `original / high_freq_factor` kept, those between blended.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((scaling.original_max_position_embeddings / wavelengths - low) / (high - low)).clamp(0, 1)
    return frequencies * kept + frequencies / scaling.factor * (1 - kept)


def rotation_of(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Rotation:
    """The rotation of each of `positions` [num_tokens], in float32; the sine's first half is negated for `kernels.reference.rotate`.

    Computed every step: for one token it is 6 small calls a step, a table for 131,072 positions would be 134 MB.
    """
    angles = positions[:, None, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)
