"""The operations a transformer is made of, as one frozen record per kind of device. Knows tensors, nothing of models or batches."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor, device

from disaggd.kernels import onednn, reference


class PagedAttention(Protocol):
    """Attention of one step's tokens over the paged pool. What is the same in every layer is worked out once, when it is made."""

    def store(self, kv: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write `keys`, `values` [num_tokens, kv_heads, head_dim] into one layer's pool, each token at its slot."""

    def attend(self, kv: Tensor, queries: Tensor) -> Tensor:
        """Causal attention of `queries` [num_tokens, heads, head_dim] over one layer's pool; returns their shape and dtype.

        `kv` is [num_blocks, kv_heads, 2, block_size, head_dim] and already holds this step's keys and values.
        """


class MakePagedAttention(Protocol):
    """See `disaggd.model.batch.Batch` for the four tensors. `window`: attend to the last so many positions only."""

    def __call__(
        self,
        slot_mapping: Tensor,
        query_start: Tensor,
        context_lens: Tensor,
        block_tables: Tensor,
        *,
        kv_heads: int,
        block_size: int,
        window: int | None,
    ) -> PagedAttention: ...


@dataclass(frozen=True, slots=True)
class Ops:
    """Every operation may return a new tensor or one of its inputs changed; callers use the result only."""

    paged_attention: MakePagedAttention
    pack: Callable[[Tensor], Tensor]
    """A weight [out, in] → the same in the layout that `linear` multiplies fastest; done once, at load."""
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """`x` [n, in], packed weight, bias [out] or None → [n, out]."""
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    """`x` [n, dim], weight [dim], eps → `x / rms(x) · weight`, the mean in float32."""
    head_norm: Callable[[Tensor, Tensor, float], Tensor]
    """`x` [n, heads, head_dim], weight [heads, head_dim], eps → every head RMS-normalized by itself."""
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    """`x` [n, heads, head_dim], cos and signed sin [n, 1, head_dim] → rotary embedding of every head."""
    silu_mul: Callable[[Tensor], Tensor]
    """`[gate, up]` [n, 2·f] → `silu(gate) · up` [n, f]."""


REFERENCE = Ops(
    paged_attention=reference.PagedAttention,
    pack=reference.pack,
    linear=reference.linear,
    rms_norm=reference.rms_norm,
    head_norm=reference.head_norm,
    rotate=reference.rotate,
    silu_mul=reference.silu_mul,
)


CPU = replace(REFERENCE, pack=onednn.pack, linear=onednn.linear)

_BY_DEVICE_TYPE = {"cpu": CPU, "cuda": REFERENCE}


def select(where: device) -> Ops:
    """The fastest operations for tensors on `where`."""
    return _BY_DEVICE_TYPE[where.type]
