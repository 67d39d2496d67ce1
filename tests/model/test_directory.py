"""A directory is opened only if every shard is whole, and its id follows its content."""

import json
import shutil
import struct
import subprocess
import sys

import pytest

from disaggd.errors import ModelError
from disaggd.model.directory import open_directory


@pytest.fixture
def single(checkpoint, tmp_path):
    """A writable copy of a model in one file."""
    return shutil.copytree(checkpoint("llama").path, tmp_path / "single")


@pytest.fixture
def sharded(checkpoint, tmp_path):
    """A model in several shards and an index."""
    checkpoint("llama").model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    return tmp_path / "sharded"


def refusal(path):
    with pytest.raises(ModelError) as refused:
        open_directory(str(path))
    return str(refused.value)


def with_header(header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def test_builtin_model_opens():
    directory = open_directory("builtin:tiny")
    assert directory.spec().family == "qwen3"
    assert (directory.root / "tokenizer.json").exists()


def test_unknown_builtin_model_names_those_that_are():
    assert "builtin:tiny" in refusal("builtin:huge")


def test_no_such_directory(tmp_path):
    assert str(tmp_path / "nowhere") in refusal(tmp_path / "nowhere")


def test_a_directory_without_safetensors(single):
    (single / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(single)


def test_all_shards_are_found(sharded):
    shards = open_directory(str(sharded)).shards
    assert len(shards) > 2
    assert len({key for shard in shards for key in shard.tensors}) == 21


def test_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert str(shard) in refusal(sharded)


@pytest.mark.parametrize("lost", [1, 1000])
def test_truncated_shard_is_named(sharded, lost):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-lost])
    assert f"{shard}: truncated" in refusal(sharded)


@pytest.mark.parametrize("kept", [0, 5, 8, 60])
def test_shard_truncated_within_its_header(single, kept):
    shard = single / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:kept])
    assert str(shard) in refusal(single)


@pytest.mark.parametrize(
    "content",
    [
        b"<html>not found</html>",
        with_header(b"{]"),
        with_header(b"[]"),
        with_header({"a": {"dtype": "F32", "shape": [2]}}),
        with_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
        with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)),
        with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(9)),
        with_header({"a": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        with_header({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"}, bytes(4)),
        with_header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}),
    ],
)
def test_corrupt_shard_is_named(single, content):
    (single / "model.safetensors").write_bytes(content)
    assert str(single / "model.safetensors") in refusal(single)


@pytest.mark.parametrize(
    ("key", "shard", "named"),
    [
        ("model.norm.weight", "../model.safetensors", "model.norm.weight lies in '../model.safetensors'"),
        ("model.surprise.weight", None, "model.surprise.weight is not here"),
        ("model.norm.weight", 3, "weight_map"),
    ],
)
def test_index_that_disagrees_with_the_shards(sharded, key, shard, named):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][key] = shard or content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    assert named in refusal(sharded)


def test_shard_with_a_weight_the_index_does_not_name(sharded):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    assert "model.norm.weight" in refusal(sharded)


def test_model_id_follows_content_not_place(single, tmp_path):
    before = open_directory(str(single)).model_id
    moved = shutil.copytree(single, tmp_path / "elsewhere")
    assert open_directory(str(moved)).model_id == before
    assert len(before) == 32

    weights = bytearray((moved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (moved / "model.safetensors").write_bytes(weights)
    assert open_directory(str(moved)).model_id != before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_model_id_follows_config_and_tokenizer(single, name):
    before = open_directory(str(single)).model_id
    path = single / name
    path.write_text((path.read_text() if path.exists() else "") + " ")
    assert open_directory(str(single)).model_id != before


def test_served_id_says_how_weights_are_held_where_that_changes_the_output(single):
    directory = open_directory(str(single))
    assert directory.served_id("auto") == directory.model_id
    assert directory.served_id("int8") == f"{directory.model_id}-int8"  # what a refused hello shows


def test_large_shards_are_sampled_at_both_ends(single, monkeypatch):
    monkeypatch.setattr("disaggd.model.directory._SAMPLE_BYTES", 16)
    before = open_directory(str(single)).model_id
    shard = single / "model.safetensors"
    original = shard.read_bytes()
    start = open_directory(str(single)).shards[0].data_start
    for position in (start, len(original) - 1):
        changed = bytearray(original)
        changed[position] ^= 1
        shard.write_bytes(changed)
        assert open_directory(str(single)).model_id != before


def test_opening_a_model_imports_no_torch():
    opening = "from disaggd.model.directory import open_directory; open_directory('builtin:tiny').spec()"
    code = f"import sys; {opening}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
