"""A model in int8 is the model of its quantized weights, however the tokens are split into steps and batches."""

import copy

import pytest
import torch

from disaggd.kernels import int8
from disaggd.model.directory import open_directory
from disaggd.model.weights import load_weights

TOLERANCE = 1e-4  # float32; the logits' magnitude is about 5
NAMES = ["llama-biases", "mistral-window", "qwen2", "qwen3"]


def prompt(length, seed=0):
    return torch.randint(0, 151, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def load(checkpoint, dtype="float32", weights="int8"):
    directory = open_directory(str(checkpoint.path))
    return load_weights(directory, directory.spec(dtype), torch.device("cpu"), weights=weights)


def quantized(model):
    """transformers' model with the weights that int8 keeps of its projections."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            q, scales = int8.quantize(module.weight.detach())
            module.weight.data = q * scales[:, None]
    return model


def logits(model, tokens):
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_quantized_weights_whole_chunked_and_decoded(name, checkpoint, make_pool):
    made, tokens = checkpoint(name), prompt(75)
    theirs = logits(quantized(made.model), tokens)
    pool = make_pool(load(made))
    whole = pool.step({"whole": tokens}, all_rows=True)
    torch.testing.assert_close(whole, theirs, atol=TOLERANCE, rtol=0)
    chunks = [pool.step({"chunked": tokens[a:b]}, all_rows=True) for a, b in ((0, 32), (32, 48), (48, 49), (49, 70))]
    chunks += [pool.step({"chunked": [token]}) for token in tokens[70:]]
    torch.testing.assert_close(torch.cat(chunks), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_logits_stay_near_those_of_the_weights_as_they_were(name, checkpoint, make_pool):
    made, tokens = checkpoint(name), prompt(75)
    error = make_pool(load(made)).step({"a": tokens}, all_rows=True) - (exact := logits(made.model, tokens))
    # Rounding to a scale of the largest of 64 to 128 normal weights, through two layers; measured 2.4 to 2.8 %.
    assert 1e-3 < error.std() / exact.std() < 0.04


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_does_not_depend_on_the_rest_of_the_batch(dtype, checkpoint, make_pool):
    pool = make_pool(load(checkpoint("qwen3-tied"), dtype), num_blocks=120)
    texts = {name: prompt(length, seed=length) for name, length in (("a", 7), ("b", 65), ("c", 300), ("d", 16), ("e", 121))}
    for part in ("alone", "together"):
        for name, tokens in texts.items():
            pool.step({f"{name} {part}": tokens[:-1]})
    together = pool.step({f"{name} together": tokens[-1:] for name, tokens in texts.items()})
    alone = torch.cat([pool.step({f"{name} alone": tokens[-1:]}) for name, tokens in texts.items()])
    # To the bit where the native kernels serve; PyTorch's own may round apart.
    torch.testing.assert_close(together, alone, atol={"float32": 1e-5, "bfloat16": 0.1}[dtype], rtol=0)


def test_only_the_projections_are_quantized(checkpoint):
    model = load(checkpoint("qwen3-tied"), "bfloat16")
    projections = [model.head, *(part for layer in model.layers for part in (layer.attention.qkv, layer.attention.out))]
    projections += [part for layer in model.layers for part in (layer.mlp.gate_up, layer.mlp.down)]
    assert {linear.weight.dtype for linear in projections} == {torch.int8}
    assert model.embedding.dtype == model.norm.weight.dtype == torch.bfloat16
    assert model.head.weight.shape[0] == model.embedding.shape[0] == 151
