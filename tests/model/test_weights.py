"""Every weight key is accounted for, lands in its place, and is cast."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from disaggd.errors import ModelError
from disaggd.model.directory import open_directory
from disaggd.model.weights import load_weights

CPU = torch.device("cpu")


def load(path, dtype="auto", progress=None):
    directory = open_directory(str(path))
    return load_weights(directory, directory.spec(dtype), CPU, progress)


@pytest.fixture
def rewrite(checkpoint, tmp_path):
    """Copies a checkpoint with its weights changed by a function of the dict of tensors."""

    def write(name, change):
        path = shutil.copytree(checkpoint(name).path, tmp_path / name)
        weights = load_file(path / "model.safetensors")
        change(weights)
        save_file(weights, path / "model.safetensors")
        return path

    return write


def refusal(path):
    with pytest.raises(ModelError) as refused:
        load(path)
    return str(refused.value)


def test_sharded_and_single_files_load_alike(checkpoint, make_pool, tmp_path):
    made = checkpoint("qwen3")
    made.model.save_pretrained(tmp_path, max_shard_size="60KB")
    one, many = (make_pool(load(path)).step({"a": [1, 2, 3]}) for path in (made.path, tmp_path))
    assert torch.equal(one, many)


def test_progress_counts_every_byte(checkpoint):
    made = checkpoint("qwen2")
    reports = []
    load(made.path, "bfloat16", lambda done, total: reports.append((done, total)))
    total = sum(parameter.numel() * 4 for parameter in made.model.parameters())
    assert reports[-1] == (total, total)
    assert [done for done, _ in reports] == sorted({done for done, _ in reports})
    assert len(reports) == len(list(made.model.parameters()))


def test_weights_are_cast(checkpoint):
    transformer = load(checkpoint("qwen3-tied").path, "float16")
    assert transformer.embedding.dtype == transformer.norm.weight.dtype == torch.float16


@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
def test_missing_weight_is_named(rewrite, name):
    message = refusal(rewrite(name, lambda weights: weights.pop("model.layers.1.self_attn.k_proj.weight")))
    assert "model.layers.1.self_attn.k_proj.weight" in message


def test_missing_head_of_an_untied_model_is_named(rewrite):
    assert "lm_head.weight" in refusal(rewrite("llama", lambda weights: weights.pop("lm_head.weight")))


def test_unknown_weight_is_named_with_its_file(rewrite):
    message = refusal(rewrite("llama", lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})))
    assert "model.layers.0.self_attn.q_proj.bias" in message
    assert "model.safetensors" in message


def test_weight_of_another_shape_is_named(rewrite):
    message = refusal(rewrite("llama", lambda weights: weights.update({"model.norm.weight": torch.ones(65)})))
    assert "model.norm.weight has shape [65], config.json makes it [64]" in message


def test_quantized_weight_is_named(rewrite):
    message = refusal(rewrite("llama", lambda weights: weights.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)})))
    assert "model.norm.weight has dtype I8" in message


def test_stored_rotary_frequencies_are_ignored(rewrite):
    load(rewrite("llama", lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})))


def test_tied_head_may_be_stored_but_not_differ(rewrite, tmp_path):
    same = rewrite("qwen3-tied", lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}))
    load(same)
    shutil.rmtree(same)
    other = rewrite("qwen3-tied", lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"] + 1}))
    assert "lm_head.weight differs" in refusal(other)


def test_file_that_vanishes_after_opening_is_named(rewrite):
    path = rewrite("llama", lambda weights: None)
    directory = open_directory(str(path))
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_weights(directory, directory.spec(), CPU)
