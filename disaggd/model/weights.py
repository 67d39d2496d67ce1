"""Weights from safetensors into a Transformer's fused tensors, one tensor at a time: never a second copy of the model in memory.

Every key of the files is accounted for before the first weight is read.
"""

import ctypes
from collections.abc import Callable, Iterator

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, device

from disaggd import kernels
from disaggd.errors import ModelError
from disaggd.model.directory import ModelDirectory
from disaggd.model.layers import Layer, Linear
from disaggd.model.shards import Shard
from disaggd.model.spec import ModelSpec, Weights
from disaggd.model.transformer import Transformer

Progress = Callable[[int, int], None]
"""Called with the bytes loaded so far and the bytes in all."""

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FLOATS = ("F32", "F16", "BF16")
_BUFFERS = (".rotary_emb.inv_freq",)  # old checkpoints store what config.json determines


def load_weights(
    directory: ModelDirectory, spec: ModelSpec, where: device, progress: Progress | None = None, weights: Weights = "auto"
) -> Transformer:
    """The model of `directory`, its weights cast to `spec.dtype` and from there, if `weights` says so, to int8, on `where`.

    Raises ModelError naming the weight that is unknown, missing or of another shape or dtype than config.json says, or the file that
    cannot be read.
    """
    transformer = Transformer(spec, where, kernels.select(where, weights))
    targets = weight_targets(transformer)
    _check_keys(directory, targets, tied=spec.tie_word_embeddings)
    total_bytes = sum(shard.data_bytes for shard in directory.shards)
    done_bytes = 0
    for shard in directory.shards:
        for key, tensor in _tensors(shard):
            if key in targets:
                targets[key].copy_(tensor)
            done_bytes += tensor.nbytes
            if progress is not None:
                progress(done_bytes, total_bytes)
    if spec.tie_word_embeddings:
        _check_tied_head(directory, transformer.embedding)
    transformer.pack()
    _give_back_memory()
    return transformer


def _give_back_memory() -> None:
    """What loading used for a while goes back to the system; with the nodes' malloc settings 0.9 GB of a 596 M model's would stay."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; musl keeps little
    if malloc_trim is not None:
        malloc_trim(0)


def weight_targets(transformer: Transformer) -> dict[str, Tensor]:
    """Where each key of a Hugging Face checkpoint goes: views into the fused tensors."""
    targets = {_EMBEDDING: transformer.embedding, "model.norm.weight": transformer.norm.weight}
    if not transformer.spec.tie_word_embeddings:
        targets[_HEAD] = transformer.head.weight
    for index, layer in enumerate(transformer.layers):
        for name, target in _layer_targets(layer, transformer.spec).items():
            targets[f"model.layers.{index}.{name}"] = target
    return targets


def _layer_targets(layer: Layer, spec: ModelSpec) -> dict[str, Tensor]:
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    targets = {
        "input_layernorm.weight": layer.attention_norm.weight,
        "post_attention_layernorm.weight": layer.mlp_norm.weight,
        **_linear_targets(layer.attention.qkv, {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys}),
        **_linear_targets(layer.attention.out, {"self_attn.o_proj": spec.hidden_size}),
        **_linear_targets(layer.mlp.gate_up, {"mlp.gate_proj": spec.intermediate_size, "mlp.up_proj": spec.intermediate_size}),
        **_linear_targets(layer.mlp.down, {"mlp.down_proj": spec.hidden_size}),
    }
    if layer.attention.head_norm is not None:
        # One vector in the file for all query heads, one for all key heads; copying repeats it for each.
        weight = layer.attention.head_norm.weight
        targets["self_attn.q_norm.weight"], targets["self_attn.k_norm.weight"] = weight[: spec.num_heads], weight[spec.num_heads :]
    return targets


def _linear_targets(linear: Linear, outputs: dict[str, int]) -> dict[str, Tensor]:
    """The parts of a fused projection, in the order of `outputs`: name → number of its rows."""
    sizes = list(outputs.values())
    targets = {f"{name}.weight": part for name, part in zip(outputs, torch.split(linear.weight, sizes), strict=True)}
    if linear.bias is not None:
        targets |= {f"{name}.bias": part for name, part in zip(outputs, torch.split(linear.bias, sizes), strict=True)}
    return targets


def _check_keys(directory: ModelDirectory, targets: dict[str, Tensor], *, tied: bool) -> None:
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


def _check_tensor(shard: Shard, key: str, target: Tensor) -> None:
    info = shard.tensors[key]
    shape = tuple(target.shape[-1:] if key.endswith("norm.weight") else target.shape)
    if info.shape != shape:
        raise ModelError(f"{shard.path}: {key} has shape {list(info.shape)}, config.json makes it {list(shape)}")
    if info.dtype not in _FLOATS:
        raise ModelError(f"{shard.path}: {key} has dtype {info.dtype}; disaggd serves {', '.join(_FLOATS)}")


def _check_tied_head(directory: ModelDirectory, embedding: Tensor) -> None:
    """A file may repeat the embedding as the tied head; should the two differ, no one knows which is meant."""
    for shard in directory.shards:
        if _HEAD not in shard.tensors:
            continue
        head = next(tensor for _, tensor in _tensors(shard, (_HEAD,)))
        if not torch.equal(head.to(embedding), embedding):
            raise ModelError(f"{shard.path}: {_HEAD} differs from {_EMBEDDING}, though tie_word_embeddings is true")


def _tensors(shard: Shard, keys: tuple[str, ...] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The shard's tensors, or those named, in the order of the file, mapped from it rather than read."""
    try:
        with safe_open(shard.path, framework="pt") as file:
            for key in keys or sorted(shard.tensors, key=lambda name: shard.tensors[name].data_offsets):
                yield key, file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{shard.path}: {error}") from error
