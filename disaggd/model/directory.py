"""Where a model lies: `builtin:NAME`, or a directory in Hugging Face's form. Torch-free: the router opens it too, for the tokenizer.

A directory holds config.json, the weights in safetensors, tokenizer.json and, if it likes, generation_config.json.
"""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Literal

from disaggd.errors import ModelError
from disaggd.model.families import read_spec
from disaggd.model.shards import Shard, open_shards
from disaggd.model.spec import Dtype, ModelSpec, Weights

BUILTIN = Path(__file__).parent / "builtin"
_BUILTIN_PREFIX = "builtin:"

_SAMPLES_PER_SHARD = 64
_SAMPLE_BYTES = 4096


class ModelDirectory:
    """A model's files, opened by `open_directory`: every shard is there at its full length."""

    def __init__(self, root: Path, shards: tuple[Shard, ...]) -> None:
        self.root = root
        self.shards = shards

    def spec(self, dtype: Dtype | Literal["auto"] = "auto") -> ModelSpec:
        """What config.json describes, served in `dtype`; `auto`: in the config's own. Raises ModelError for what we lack."""
        return read_spec(self.root, None if dtype == "auto" else dtype)

    @cached_property
    def model_id(self) -> str:
        """32 hex digits that two nodes share only if they serve the same model: same config, tokenizer and weights, wherever they lie.

        Of the weights it takes all headers and lengths, and 64 samples of 4 KiB per shard: a minute's reading saved on 16 GB, and a
        fine-tune, which changes every tensor, still differs.
        """
        digest = hashlib.blake2b(digest_size=16)
        for name in ("config.json", "tokenizer.json"):
            path = self.root / name
            _add(digest, name.encode(), path.read_bytes() if path.exists() else b"")
        for shard in self.shards:
            _add(digest, shard.path.name.encode(), shard.header, shard.data_bytes.to_bytes(8, "little"), *_samples(shard))
        return digest.hexdigest()

    def served_id(self, weights: Weights) -> str:
        """`model_id`, and what else two nodes must share for their outputs to be the same: int8 weights give other ones."""
        return self.model_id if weights == "auto" else f"{self.model_id}-{weights}"


def open_directory(path: str) -> ModelDirectory:
    """Open `builtin:NAME` or a directory. Raises ModelError naming the file that is missing, truncated or corrupt."""
    root = _resolve(path)
    if not (root / "config.json").is_file():
        raise ModelError(f"{root / 'config.json'}: no such file; a model is {_BUILTIN_PREFIX}NAME or a directory in Hugging Face's form")
    return ModelDirectory(root, open_shards(root))


def _resolve(path: str) -> Path:
    if not path.startswith(_BUILTIN_PREFIX):
        return Path(path).expanduser()
    name = path.removeprefix(_BUILTIN_PREFIX)
    names = sorted(entry.name for entry in BUILTIN.iterdir() if entry.is_dir())
    if name not in names:
        raise ModelError(f"{path}: no such built-in model; there is {', '.join(_BUILTIN_PREFIX + known for known in names)}")
    return BUILTIN / name


def _add(digest: "hashlib.blake2b", *parts: bytes) -> None:
    for part in parts:  # with lengths, so that no two lists of parts run together to the same bytes
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)


def _samples(shard: Shard) -> list[bytes]:
    """The whole of a small shard's data, else samples spread evenly from its first byte to its last."""
    with shard.path.open("rb") as file:
        file.seek(shard.data_start)
        if shard.data_bytes <= _SAMPLES_PER_SHARD * _SAMPLE_BYTES:
            return [file.read(shard.data_bytes)]
        step = (shard.data_bytes - _SAMPLE_BYTES) / (_SAMPLES_PER_SHARD - 1)
        samples = []
        for index in range(_SAMPLES_PER_SHARD):
            file.seek(shard.data_start + round(index * step))
            samples.append(file.read(_SAMPLE_BYTES))
        return samples
