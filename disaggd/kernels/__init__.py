"""The operations a transformer is made of, as one frozen record per kind of device. Knows tensors, nothing of models or batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal, Protocol

from torch import Tensor, cuda, device

from disaggd.kernels import int8, native, native_int8, native_layers, native_repack, onednn, reference, reference_repack, reference_sampling
from disaggd.kernels.draws import Draws
from disaggd.kernels.layer_weights import LayerWeights


class PagedAttention(Protocol):
    """Attention of one step's tokens over the paged pool. What is the same in every layer is worked out once, when it is made."""

    def rotate_and_store(
        self, kv: Tensor, projected: Tensor, norm_weight: Tensor | None, eps: float, rotation: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Write one layer's keys and values into its pool, each token's at its slot; returns the queries [num_tokens, heads, head_dim].

        `projected` [num_tokens, (heads + 2 · kv_heads) · head_dim] is the fused projection's output. Every query and key head is
        RMS-normalized by itself where `norm_weight` [heads + kv_heads, head_dim] is given, then turned by `rotation`: cosine and signed
        sine, see `model.layers.rotation_of`.
        """

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


class FusedLayers(Protocol):
    """Layers over a few new tokens of some sequences, in one call. Its bits are those of the operations one after another."""

    max_rows: int
    """Beyond so many tokens the operations are as fast one by one."""

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
        """Adds to `residual` [n, hidden] what the layers add, but for what the last one's MLP adds: that it returns, [n, hidden].

        `x` [n, hidden] is what the layer before these returned, and is added first; None for the model's first.
        `kv` [layers, num_blocks, kv_heads, 2, block_size, head_dim] is read and written as by `PagedAttention`.
        """


class Repack(Protocol):
    """Tokens of a sequence from the pool's blocks into blocks of another layout, those that another node's pool has."""

    def __call__(self, out: Tensor, kv: Tensor, block_ids: Tensor, *, layers: range, heads: range, start: int, num_tokens: int) -> None:
        """Fill `out` [len(layers), ⌈num_tokens / block size⌉, len(heads), 2, block size, head_dim], with zeros behind the last token.

        Block sizes and floating dtypes differ as they like; `out` of uint8 is in the wire format of `fp8`, its last dimension
        `fp8.head_bytes`. `kv` [layers, num_blocks, kv_heads, 2, block_size, head_dim]; `block_ids` int32 or int64: of the blocks that the
        tokens lie in, from the `start`-th of the first one on.
        """


@dataclass(frozen=True, slots=True)
class Ops:
    """What an operation returns is a new tensor or an input that it changed; where it changes another, it says so."""

    paged_attention: MakePagedAttention
    pack: Callable[[Tensor], Tensor]
    """A weight [out, in] → the same in the layout that `linear` multiplies fastest; done once, at load."""
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """`x` [n, in], packed weight, bias [out] or None → [n, out]."""
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    """`x` [n, dim], weight [dim], eps → `x / rms(x) · weight`, the mean in float32."""
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    """`x`, residual [n, dim], weight [dim], eps → adds `x` to the residual in place, and `rms_norm` of the sum."""
    linear_silu_mul: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """`[gate, up]` [n, 2·f], as `linear` gives it → `silu(gate) · up` [n, f]."""
    fuse: Callable[[Sequence[LayerWeights], int | None], FusedLayers | None]
    """Packed layers and the window they attend to → these as one operation for small steps; None where it has none for their shapes."""
    greedy: Callable[[Tensor], Tensor]
    """Logits float32 [rows, vocab_size] → int64 [rows]: each row's best entry, of equals the lowest."""
    sample: Callable[[Tensor, Draws], Tensor]
    """Logits → int64 [rows]: a token for each row, by `reference_sampling`'s formula."""
    top_logprobs: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
    """Logits, the chosen tokens int64 [rows], n → (the tokens' log-probabilities [rows], the n likeliest entries, theirs [rows, n])."""
    repack: Repack
    unpack_fp8: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    """`kv` as `Repack` has it, `wire` uint8 [layers, wire blocks, kv_heads, `fp8.head_bytes`], block ids of `kv`, as many of `wire`: writes
    these blocks of `wire` into those of `kv`, all layers of them."""


REFERENCE = Ops(
    paged_attention=reference.PagedAttention,
    pack=reference.pack,
    linear=reference.linear,
    rms_norm=reference.rms_norm,
    add_rms_norm=reference.add_rms_norm,
    linear_silu_mul=reference.linear_silu_mul,
    fuse=reference.fuse,
    greedy=reference_sampling.greedy,
    sample=reference_sampling.sample,
    top_logprobs=reference_sampling.top_logprobs,
    repack=reference_repack.repack,
    unpack_fp8=reference_repack.unpack_fp8,
)


def select(where: device, weights: Literal["auto", "int8"] = "auto") -> Ops:
    """The fastest operations for tensors on `where`; `int8` (CPUs only): `pack` quantizes, and `linear` multiplies what it made."""
    if weights == "int8":
        assert where.type == "cpu", "the config refuses int8 weights on other devices"
        return cpu_int8_ops()
    if where.type == "cuda":
        return gpu_ops(cuda.get_device_properties(where).multi_processor_count)
    return cpu_ops()


def gpu_ops(processors: int) -> Ops:
    """The Triton kernels, for a device of so many multiprocessors; products of many rows are the vendor's."""
    # Lazily: a host without a GPU needs no Triton.
    from disaggd.kernels import linear, logprobs, paged_attention, repack, rms_norm, sampling  # noqa: PLC0415

    return replace(
        REFERENCE,
        linear=linear.linear,
        linear_silu_mul=linear.linear_silu_mul,
        paged_attention=partial(paged_attention.PagedAttention, processors=processors),
        rms_norm=rms_norm.rms_norm,
        add_rms_norm=rms_norm.add_rms_norm,
        greedy=sampling.greedy,
        sample=sampling.sample,
        top_logprobs=logprobs.top_logprobs,
        repack=repack.repack,
        unpack_fp8=repack.unpack_fp8,
    )


@cache
def cpu_ops() -> Ops:
    """The native kernels for what this CPU has; without them PyTorch's operations."""
    library = native.library()
    if library is None:
        return replace(REFERENCE, pack=onednn.pack, linear=onednn.linear, linear_silu_mul=onednn.linear_silu_mul)
    return native_ops(native.Native(library, native.best_isa(library)))


@cache
def cpu_int8_ops() -> Ops:
    """`cpu_ops`, but for the weights."""
    library = native.library()
    if library is None:
        return replace(cpu_ops(), pack=int8.pack, linear=int8.linear, linear_silu_mul=int8.linear_silu_mul)
    kernels = native.Native(library, native.best_isa(library))
    weights = native_int8.NativeInt8(kernels)
    return replace(native_ops(kernels), pack=weights.pack, linear=weights.linear, linear_silu_mul=weights.linear_silu_mul)


def native_ops(kernels: native.Native) -> Ops:
    repacking = native_repack.NativeRepack(kernels)
    return replace(
        REFERENCE,
        paged_attention=kernels.paged_attention,
        pack=kernels.pack,
        linear=kernels.linear,
        rms_norm=kernels.rms_norm,
        add_rms_norm=kernels.add_rms_norm,
        linear_silu_mul=kernels.linear_silu_mul,
        fuse=native_layers.Fusing(kernels),
        greedy=kernels.greedy,
        sample=kernels.sample,
        repack=repacking.repack,
        unpack_fp8=repacking.unpack_fp8,
    )
