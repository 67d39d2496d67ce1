"""What a decoder's layers are made of, for kernels that compute all of them in one call. Knows tensors, nothing of models or batches."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Projection:
    """As `Ops.linear` takes it: a packed weight, and a bias [out] or None."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One pre-norm decoder layer."""

    attention_norm: Tensor  # [hidden]
    qkv: Projection
    head_norm: Tensor | None  # [heads + kv_heads, head_dim]
    out: Projection
    mlp_norm: Tensor  # [hidden]
    gate_up: Projection
    down: Projection
    eps: float  # of all norms
