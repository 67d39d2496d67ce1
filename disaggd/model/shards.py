"""The headers of safetensors files: which tensors lie where, and whether all their bytes are there. Torch-free; reads no weights.

A file is the header's length (u64, little-endian), the header (JSON: name → dtype, shape, byte range), and the tensors without a gap.
"""

import math
from pathlib import Path

import msgspec

from disaggd.errors import ModelError
from disaggd.model.families import read_json

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_PREFIX_BYTES = 8
_ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}


class TensorInfo(msgspec.Struct, frozen=True):
    """One tensor of a shard."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]
    """Of its first byte and the one behind its last, counted from the end of the header."""


class Shard(msgspec.Struct, frozen=True, kw_only=True):
    """One safetensors file whose header is sound and whose length is what the header says."""

    path: Path
    header: bytes
    tensors: dict[str, TensorInfo]
    data_bytes: int

    @property
    def data_start(self) -> int:
        """Offset of the first tensor's first byte in the file."""
        return _PREFIX_BYTES + len(self.header)


def open_shards(root: Path) -> tuple[Shard, ...]:
    """The shards of a model directory: `model.safetensors`, or those that `model.safetensors.index.json` names. Raises ModelError."""
    single, index = root / "model.safetensors", root / "model.safetensors.index.json"
    if single.exists():
        return (read_shard(single),)
    if not index.exists():
        raise ModelError(f"{root}: neither model.safetensors nor model.safetensors.index.json is here, and no other format is read")
    weight_map = _weight_map(index)
    shards = tuple(read_shard(root / name, named_by=index) for name in sorted(set(weight_map.values())))
    _check_index(index, weight_map, shards)
    return shards


def read_shard(path: Path, named_by: Path | None = None) -> Shard:
    """Read and check the header of `path`. Raises ModelError when the file is missing, truncated or no safetensors file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(_PREFIX_BYTES), "little")
            if size < _PREFIX_BYTES or header_bytes > MAX_HEADER_BYTES:
                raise ModelError(f"{path}: corrupt: this is no safetensors file")
            header = file.read(header_bytes)
    except OSError as error:
        source = "" if named_by is None else f" (named by {named_by.name})"
        raise ModelError(f"{path}: {error.strerror}{source}") from error
    if len(header) < header_bytes:
        raise ModelError(f"{path}: truncated: {size:,} bytes, its header alone has {header_bytes:,}")
    tensors = _decode_header(path, header)
    data_bytes = _check_ranges(path, tensors)
    expected = _PREFIX_BYTES + header_bytes + data_bytes
    if size != expected:
        raise ModelError(f"{path}: {'truncated' if size < expected else 'corrupt'}: {size:,} bytes, its header promises {expected:,}")
    return Shard(path=path, header=header, tensors=tensors, data_bytes=data_bytes)


def _decode_header(path: Path, header: bytes) -> dict[str, TensorInfo]:
    try:
        entries = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
        return {name: msgspec.json.decode(entry, type=TensorInfo) for name, entry in entries.items()}
    except msgspec.DecodeError as error:
        raise ModelError(f"{path}: corrupt: its header is not a safetensors header: {error}") from error


def _check_ranges(path: Path, tensors: dict[str, TensorInfo]) -> int:
    """Every tensor's range has the size of its shape and follows the one before; returns the bytes of all."""
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        start, end = info.data_offsets
        if info.dtype not in _ITEM_BYTES:
            raise ModelError(f"{path}: {name} has dtype {info.dtype}, which is not served")
        if start != position or end - start != math.prod(info.shape) * _ITEM_BYTES[info.dtype]:
            raise ModelError(f"{path}: corrupt: {name} lies at bytes {start} to {end}, which its shape and its neighbours contradict")
        position = end
    return position


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = msgspec.convert(read_json(index).get("weight_map"), dict[str, str])
    except msgspec.ValidationError as error:
        raise ModelError(f"{index}: weight_map: {error}") from error
    for key, name in weight_map.items():
        if Path(name).name != name:
            raise ModelError(f"{index}: {key} lies in {name!r}: a shard is a file of the same directory")
    return weight_map


def _check_index(index: Path, weight_map: dict[str, str], shards: tuple[Shard, ...]) -> None:
    """The index and the headers name the same tensors in the same files, each once."""
    found = {(key, shard.path.name) for shard in shards for key in shard.tensors}
    if missing := sorted(set(weight_map.items()) - found):
        raise ModelError(f"{index.with_name(missing[0][1])}: {missing[0][0]} is not here, though {index.name} says so")
    if extra := sorted(found - set(weight_map.items())):
        raise ModelError(f"{index.with_name(extra[0][1])}: {extra[0][0]} is here, though {index.name} does not say so")
