"""Models of random weights, written as Hugging Face directories: the shapes that are measured, a tokenizer, the files.

Speed does not depend on what the weights are, so they are one stretch of noise, repeated: writing them costs little more
than the disk does, and memory for one tensor at a time.
"""

import itertools
import json
import math
import os
import shutil
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from disaggd.model.directory import open_directory

DEFAULT_ROOT = Path(os.environ.get("TMPDIR", "/tmp")) / "disaggd-bench-models"
BUILTIN = "builtin:tiny"

_EOS = "<|endoftext|>"
_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
_WEIGHT_STD = 0.02
_NUM_NOISE = 16_777_259  # a prime, so that no two rows or tensors begin at the same value
_MAX_SHARD_BYTES = 4 * 2**30


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """A dense decoder of Qwen3's type."""

    about: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = True
    max_positions: int = 40_960


_S = Shape(about="88 M", layers=12, hidden=768, heads=12, kv_heads=4, head_dim=64, intermediate=2048, vocab=16_384)

SHAPES = {
    "S": _S,
    "P": msgspec.structs.replace(_S, about="113 M, what peers were measured with", layers=16),
    "M": Shape(about="Qwen3-0.6B", layers=28, hidden=1024, heads=16, kv_heads=8, head_dim=128, intermediate=3072, vocab=151_936),
    "L": Shape(
        about="Qwen3-8B", layers=36, hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=12_288, vocab=151_936, tied=False
    ),
}

Progress = Callable[[int, int], None]
"""Called with the bytes written and the bytes in all."""


def resolve(name: str, root: Path = DEFAULT_ROOT) -> str:
    """The directory of a model that is named by its shape, written first if need be, or as disaggd's config names it."""
    return str(make_model(name, root) if name in SHAPES else open_directory(name).root)


def make_model(name: str, root: Path = DEFAULT_ROOT, progress: Progress | None = None) -> Path:
    """The directory of the shape called `name` under `root`; what is there already, in the same shape, is kept."""
    shape, directory = SHAPES[name], root / name
    stamp = msgspec.json.encode(shape)
    if (directory / "shape.json").exists() and (directory / "shape.json").read_bytes() == stamp:
        return directory
    half_made = root / f".{name}.{os.getpid()}"
    half_made.mkdir(parents=True)
    try:
        _write_json(half_made / "config.json", config(shape))
        _write_json(half_made / "generation_config.json", {"eos_token_id": 0, "do_sample": False})
        write_tokenizer(half_made, shape.vocab)
        write_weights(half_made, shape, progress)
        (half_made / "shape.json").write_bytes(stamp)
        shutil.rmtree(directory, ignore_errors=True)
        half_made.rename(directory)
    except BaseException:
        shutil.rmtree(half_made, ignore_errors=True)
        raise
    return directory


def config(shape: Shape) -> dict[str, object]:
    """`config.json`."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": shape.max_positions,
        "tie_word_embeddings": shape.tied,
        "attention_bias": False,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }


# ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def weight_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the checkpoint, in the order of the file."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab, shape.hidden)
    for index in range(shape.layers):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (shape.hidden,)
        yield f"{layer}.self_attn.q_proj.weight", (queries, shape.hidden)
        yield f"{layer}.self_attn.k_proj.weight", (keys, shape.hidden)
        yield f"{layer}.self_attn.v_proj.weight", (keys, shape.hidden)
        yield f"{layer}.self_attn.o_proj.weight", (shape.hidden, queries)
        yield f"{layer}.self_attn.q_norm.weight", (shape.head_dim,)
        yield f"{layer}.self_attn.k_norm.weight", (shape.head_dim,)
        yield f"{layer}.post_attention_layernorm.weight", (shape.hidden,)
        yield f"{layer}.mlp.gate_proj.weight", (shape.intermediate, shape.hidden)
        yield f"{layer}.mlp.up_proj.weight", (shape.intermediate, shape.hidden)
        yield f"{layer}.mlp.down_proj.weight", (shape.hidden, shape.intermediate)
    yield "model.norm.weight", (shape.hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab, shape.hidden)


def write_weights(directory: Path, shape: Shape, progress: Progress | None = None) -> None:
    """safetensors in bfloat16; several files with an index where one would be over 4 GiB."""
    shards = list(_split(dict(weight_shapes(shape))))
    noise = _Noise()
    total_bytes = sum(_num_bytes(size) for shard in shards for size in shard.values())
    names = [_shard_name(index, len(shards)) for index in range(len(shards))]
    done_bytes = 0
    for name, shard in zip(names, shards, strict=True):
        with (directory / name).open("wb") as file:
            file.write(_header(shard))
            for key, size in shard.items():
                if key.endswith("norm.weight"):
                    file.write(_bfloat16(np.ones(size, np.float32)).data)
                else:
                    noise.write(file, math.prod(size))
                done_bytes += _num_bytes(size)
                if progress is not None:
                    progress(done_bytes, total_bytes)
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        _write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


class _Noise:
    """Normal bfloat16 values: `_NUM_NOISE` of them, over and over."""

    def __init__(self) -> None:
        values = np.random.default_rng(0).standard_normal(_NUM_NOISE, dtype=np.float32) * np.float32(_WEIGHT_STD)
        self._values = _bfloat16(values)
        self._next = 0

    def write(self, file: BinaryIO, count: int) -> None:
        while count:
            piece = self._values[self._next : self._next + count]
            file.write(piece.data)
            self._next = (self._next + len(piece)) % _NUM_NOISE
            count -= len(piece)


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper half of each float32: truncated rather than rounded, which noise does not mind."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _num_bytes(size: tuple[int, ...]) -> int:
    return 2 * math.prod(size)


def _split(sizes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    shard_bytes = 0
    for key, size in sizes.items():
        if shard and shard_bytes + _num_bytes(size) > _MAX_SHARD_BYTES:
            yield shard
            shard, shard_bytes = {}, 0
        shard[key] = size
        shard_bytes += _num_bytes(size)
    yield shard


def _shard_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05}-of-{count:05}.safetensors"


def _header(sizes: dict[str, tuple[int, ...]]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key, size in sizes.items():
        entries[key] = {"dtype": "BF16", "shape": size, "data_offsets": (start, start + _num_bytes(size))}
        start += _num_bytes(size)
    raw = msgspec.json.encode(entries)
    raw += b" " * (-len(raw) % 8)  # tensors begin on a multiple of 8
    return len(raw).to_bytes(8, "little") + raw


# ── tokenizer ────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """A byte-level BPE of exactly `vocab_size` tokens: the end of text, all bytes, then short words, each one merge.

    Not trained: what it splits a text into hardly matters, as long as it splits any text and every id is text.
    """
    vocabulary = {_EOS: 0} | {piece: index for index, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=1)}
    merges: list[tuple[str, str]] = []
    for word in _words():
        if len(vocabulary) == vocab_size:
            break
        vocabulary[word] = len(vocabulary)
        merges.append((word[:-1], word[-1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(_EOS, special=True)])
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _EOS, "pad_token": _EOS, "chat_template": _TEMPLATE}
    _write_json(directory / "tokenizer_config.json", settings)


def _words() -> Iterator[str]:
    """Of two letters and more, some after a space; each is one of those before and one letter."""
    letters = string.ascii_lowercase
    starts = [*letters, "Ġ"]  # how byte-level BPE spells a space
    for length in itertools.count(1):
        for word in itertools.product(starts, *[letters] * length):
            yield "".join(word)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
