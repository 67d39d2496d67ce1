"""Weights from safetensors into a Transformer's fused tensors, one tensor at a time: never a second copy of the model in memory.

Every key of the files is accounted for before the first weight is read.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, device

from disaggd import kernels
from disaggd.errors import ModelError
from disaggd.model.directory import ModelDirectory
from disaggd.model.layers import Layer, Linear
from disaggd.model.parallel import Part, Ranks
from disaggd.model.shards import Shard
from disaggd.model.spec import ModelSpec, Weights
from disaggd.model.transformer import Transformer

Progress = Callable[[int, int], None]
"""Called with the bytes loaded so far and the bytes in all."""

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FLOATS = ("F32", "F16", "BF16")
_BUFFERS = (".rotary_emb.inv_freq",)  # old checkpoints store what config.json determines


@dataclass(frozen=True, slots=True)
class Target:
    """Where a tensor of a checkpoint goes: a view into a fused one."""

    tensor: Tensor | None
    """None: another rank's."""
    shape: tuple[int, ...]
    """Of the whole, in the file."""
    rows: range | None = None
    """Those that go there, if not all do."""
    columns: range | None = None

    def fill(self, file: Any, key: str) -> None:
        """Reads no more of the file than that. A vector fills every row."""
        if self.tensor is None:
            return
        if self.rows is not None:
            self.tensor.copy_(file.get_slice(key)[self.rows.start : self.rows.stop])
        elif self.columns is not None:
            self.tensor.copy_(file.get_slice(key)[:, self.columns.start : self.columns.stop])
        else:
            self.tensor.copy_(file.get_tensor(key))


def load_weights(
    directory: ModelDirectory,
    spec: ModelSpec,
    where: device,
    progress: Progress | None = None,
    weights: Weights = "auto",
    part: Part | None = None,
    ranks: Ranks | None = None,
) -> Transformer:
    """The model of `directory`, or one rank's `part` of it, its weights cast to `spec.dtype` and from there, if `weights` says so, to
    int8, on `where`.

    Raises ModelError naming the weight that is unknown, missing or of another shape or dtype than config.json says, or the file that
    cannot be read.
    """
    transformer = Transformer(spec, where, kernels.select(where, weights), part=part, ranks=ranks)
    targets = weight_targets(transformer)
    _check_keys(directory, targets, tied=spec.tie_word_embeddings)
    total_bytes = sum(shard.data_bytes for shard in directory.shards)
    done_bytes = 0
    for shard in directory.shards:
        with _opened(shard) as file:
            for key, num_bytes in _in_order(shard):
                if key in targets:
                    targets[key].fill(file, key)
                done_bytes += num_bytes
                if progress is not None:
                    progress(done_bytes, total_bytes)
    if spec.tie_word_embeddings:
        _check_tied_head(directory, transformer)
    transformer.pack()
    _give_back_memory()
    return transformer


def _give_back_memory() -> None:
    """What loading used for a while goes back to the system; with the nodes' malloc settings 0.9 GB of a 596 M model's would stay."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; musl keeps little
    if malloc_trim is not None:
        malloc_trim(0)


def weight_targets(transformer: Transformer) -> dict[str, Target]:
    """Where each key of a Hugging Face checkpoint goes."""
    spec, words = transformer.spec, transformer.part.vocabulary
    table = (spec.vocab_size, spec.hidden_size)
    targets = {
        _EMBEDDING: Target(transformer.embedding, table, words),
        "model.norm.weight": Target(transformer.norm.weight, (spec.hidden_size,)),
    }
    if not spec.tie_word_embeddings:
        targets[_HEAD] = Target(transformer.head.weight, table, words)
    for index, layer in enumerate(transformer.layers):
        for name, target in _layer_targets(layer, spec, transformer.part).items():
            targets[f"model.layers.{index}.{name}"] = target
    return targets


def _layer_targets(layer: Layer, spec: ModelSpec, part: Part) -> dict[str, Target]:
    hidden, size, wide = spec.hidden_size, spec.head_dim, spec.intermediate_size
    queries, keys = _scaled(part.heads, size), _scaled(part.kv_heads, size)
    attention, mlp = layer.attention, layer.mlp
    qkv = {
        "self_attn.q_proj": (spec.num_heads * size, queries),
        "self_attn.k_proj": (spec.num_kv_heads * size, keys),
        "self_attn.v_proj": (spec.num_kv_heads * size, keys),
    }
    gate_up = {"mlp.gate_proj": (wide, part.neurons), "mlp.up_proj": (wide, part.neurons)}
    targets = {
        "input_layernorm.weight": Target(layer.attention_norm.weight, (hidden,)),
        "post_attention_layernorm.weight": Target(layer.mlp_norm.weight, (hidden,)),
        **_by_rows(attention.qkv, qkv, hidden, has_bias=spec.qkv_bias),
        **_by_columns(attention.out, "self_attn.o_proj", (hidden, spec.num_heads * size), queries, has_bias=spec.output_bias),
        **_by_rows(mlp.gate_up, gate_up, hidden, has_bias=spec.mlp_bias),
        **_by_columns(mlp.down, "mlp.down_proj", (hidden, wide), part.neurons, has_bias=spec.mlp_bias),
    }
    if attention.head_norm is not None:
        # One vector in the file for all query heads, one for all key heads; copying repeats it for each.
        weight, num_heads = attention.head_norm.weight, len(part.heads)
        targets["self_attn.q_norm.weight"] = Target(weight[:num_heads], (size,))
        targets["self_attn.k_norm.weight"] = Target(weight[num_heads:], (size,))
    return targets


def _by_rows(linear: Linear, parts: dict[str, tuple[int, range]], inputs: int, *, has_bias: bool) -> dict[str, Target]:
    """The parts of a fused projection, in their order: name → rows in the file, and which of them are this rank's."""
    targets, start = {}, 0
    for name, (outputs, rows) in parts.items():
        here = slice(start, start + len(rows))
        targets[f"{name}.weight"] = Target(linear.weight[here], (outputs, inputs), rows)
        if has_bias:
            assert linear.bias is not None
            targets[f"{name}.bias"] = Target(linear.bias[here], (outputs,), rows)
        start = here.stop
    return targets


def _by_columns(linear: Linear, name: str, shape: tuple[int, int], columns: range, *, has_bias: bool) -> dict[str, Target]:
    targets = {f"{name}.weight": Target(linear.weight, shape, columns=columns)}
    if has_bias:
        targets[f"{name}.bias"] = Target(linear.bias, shape[:1])
    return targets


def _scaled(heads: range, size: int) -> range:
    return range(heads.start * size, heads.stop * size)


def _check_keys(directory: ModelDirectory, targets: dict[str, Target], *, tied: bool) -> None:
    found = {key: shard for shard in directory.shards for key in shard.tensors}
    if missing := [key for key in targets if key not in found]:
        raise ModelError(f"{directory.root}: no weight {missing[0]} in any shard{_and_more(missing)}")
    ignored = {_HEAD} if tied else set()
    unknown = [key for key in found if key not in targets and key not in ignored and not key.endswith(_BUFFERS)]
    if unknown:
        raise ModelError(f"{found[unknown[0]].path}: {unknown[0]} is no weight of this model{_and_more(unknown)}")
    for key, target in targets.items():
        _check_tensor(found[key], key, target)


def _and_more(keys: list[str]) -> str:
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""


def _check_tensor(shard: Shard, key: str, target: Target) -> None:
    info = shard.tensors[key]
    if info.shape != target.shape:
        raise ModelError(f"{shard.path}: {key} has shape {list(info.shape)}, config.json makes it {list(target.shape)}")
    if info.dtype not in _FLOATS:
        raise ModelError(f"{shard.path}: {key} has dtype {info.dtype}; disaggd serves {', '.join(_FLOATS)}")


def _check_tied_head(directory: ModelDirectory, transformer: Transformer) -> None:
    """A file may repeat the embedding as the tied head; should the two differ, no one knows which is meant."""
    embedding, words = transformer.embedding, transformer.part.vocabulary
    for shard in directory.shards:
        if _HEAD not in shard.tensors:
            continue
        with _opened(shard) as file:
            head = file.get_slice(_HEAD)[words.start : words.stop]
        if not torch.equal(head.to(embedding), embedding):
            raise ModelError(f"{shard.path}: {_HEAD} differs from {_EMBEDDING}, though tie_word_embeddings is true")


def _in_order(shard: Shard) -> Iterator[tuple[str, int]]:
    """Keys and bytes of the shard's tensors, in the order of the file."""
    for key, info in sorted(shard.tensors.items(), key=lambda item: item[1].data_offsets):
        start, end = info.data_offsets
        yield key, end - start


@contextmanager
def _opened(shard: Shard) -> Iterator[Any]:
    """The file, mapped rather than read."""
    try:
        with safe_open(shard.path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{shard.path}: {error}") from error
