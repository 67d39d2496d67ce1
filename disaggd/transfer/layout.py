"""Where the bytes of the KV cache lie. Pure arithmetic; with the kernels, the only place that knows of the `2`.

A pool is `kv[layers, num_blocks, kv_heads, 2, block_size, head_dim]`: a block of one layer is contiguous (one
descriptor), a range of its heads is contiguous too, and neighbouring block ids of a layer are neighbours in memory.
"""

from typing import Annotated, Literal

import msgspec

from disaggd.errors import ConfigError
from disaggd.ids import BlockId
from disaggd.model.spec import DTYPE_BYTES, ModelSpec
from disaggd.units import MAX_BLOCK_SIZE

KVDtype = Literal["float32", "bfloat16", "float16", "fp8"]
"""A model's, or `fp8`: float8 e4m3 with scales, in which KV may go over the wire and land. No pool that a model computes with is in it."""

KVPath = Literal["direct", "staged", "repacked"]
"""How KV gets where NIXL reads it: it lies there; a GPU's is copied to host memory; it is brought into the target's own layout."""

FP8_HEADER_BYTES = 16
"""Before one head's keys and values in a block: their scales, see `kernels/fp8.py`."""

Size = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
"""Of what there is one at least. A spec may have come from another node."""


class KVGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Layers that store their keys and values alike."""

    layers: Size
    kv_heads: Size
    head_bytes: Size
    """Bytes of one head's K and V in one block of one layer: `2 · block_size · head_dim · itemsize`, and in fp8 their scales."""
    window: int | None = None
    replicated: bool = False

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer: the unit that a transfer descriptor names."""
        return self.kv_heads * self.head_bytes


class KVSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The geometry of a node's pool; two nodes can hand KV over if theirs agree in what `check_pair` looks at."""

    dtype: KVDtype
    block_size: Size
    """Tokens per block."""
    head_dim: Size
    groups: tuple[KVGroup, ...]

    @property
    def num_layers(self) -> int:
        return sum(group.layers for group in self.groups)

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers."""
        return sum(group.layers * group.block_bytes for group in self.groups)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)


class PoolPlace(msgspec.Struct, frozen=True, array_like=True):
    """Where a pool lies in its process: what a peer must know to name its blocks."""

    address: int
    """Of its first byte."""
    num_blocks: int


class Span(msgspec.Struct, frozen=True):
    """Tokens of a sequence that follow each other, as the blocks of a pool hold them."""

    blocks: tuple[BlockId, ...]
    start: int
    """The first of them, counted from the start of the first block."""
    num_tokens: int


def whole_blocks(blocks: tuple[BlockId, ...], block_size: int) -> Span:
    """All the tokens that these blocks have room for."""
    return Span(blocks, 0, len(blocks) * block_size)


def head_bytes(dtype: KVDtype, block_size: int, head_dim: int) -> int:
    """Of one head's keys and values in a block of one layer."""
    numbers = 2 * block_size * head_dim
    return FP8_HEADER_BYTES + numbers if dtype == "fp8" else numbers * DTYPE_BYTES[dtype]


def kv_spec(model: ModelSpec, block_size: int, kv_heads: int | None = None) -> KVSpec:
    """The pool geometry of `model` with blocks of `block_size` tokens, KV in the model's own dtype.

    `kv_heads`: of a rank that holds only so many.
    """
    group = KVGroup(
        layers=model.num_layers,
        kv_heads=kv_heads or model.num_kv_heads,
        head_bytes=head_bytes(model.dtype, block_size, model.head_dim),
        window=model.sliding_window,
    )
    return KVSpec(dtype=model.dtype, block_size=block_size, head_dim=model.head_dim, groups=(group,))


def in_fp8(kv: KVSpec) -> KVSpec:
    """The same blocks as they are in fp8: some half of bfloat16's bytes."""
    in_head = head_bytes("fp8", kv.block_size, kv.head_dim)
    groups = tuple(msgspec.structs.replace(group, head_bytes=in_head) for group in kv.groups)
    return msgspec.structs.replace(kv, dtype="fp8", groups=groups)


def check_pair(source: KVSpec, target: KVSpec) -> None:
    """Raises ConfigError naming the field over which no bytes of `source` can become bytes of `target`."""
    for field in ("head_dim", "num_layers"):
        ours, theirs = getattr(source, field), getattr(target, field)
        if ours != theirs:
            raise ConfigError(f"{field} differs: {ours} and {theirs}")
    ours, theirs = ([(group.layers, group.kv_heads) for group in kv.groups] for kv in (source, target))
    if ours != theirs:
        raise ConfigError(f"kv_heads differ: {_heads(ours)} and {_heads(theirs)}")
    for size in (source.block_size, target.block_size):
        if size > MAX_BLOCK_SIZE:
            raise ConfigError(f"block_size is {size}, and may be {MAX_BLOCK_SIZE} at most")


def _heads(groups: list[tuple[int, int]]) -> str:
    return ", ".join(f"{kv_heads} in {layers} layers" for layers, kv_heads in groups) or "none"
