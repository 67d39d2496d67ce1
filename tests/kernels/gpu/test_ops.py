"""A whole model on the Triton kernels equals the same model on the reference: prefill, chunks and decode in one batch."""

import pytest
import torch
from torch import Tensor

from disaggd.kernels import REFERENCE, Ops, gpu_ops
from disaggd.model.batch import Batch
from disaggd.model.kv import allocate_kv
from disaggd.model.spec import ModelSpec
from disaggd.model.transformer import Transformer
from disaggd.model.weights import weight_targets
from disaggd.transfer.layout import kv_spec

BLOCK, NUM_BLOCKS = 16, 12
TABLES = torch.tensor([[3, 7, 0], [5, 1, 8]], dtype=torch.int32)


def spec(*, qk_norm: bool, window: int | None) -> ModelSpec:
    return ModelSpec(
        family="qwen3",
        vocab_size=96,
        hidden_size=64,
        intermediate_size=80,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        qkv_bias=not qk_norm,
        qk_norm=qk_norm,
        sliding_window=window,
        dtype="float32",
    )


def step(starts: list[int], ends: list[int], where: torch.device) -> Batch:
    """Sequence i computes positions [starts[i], ends[i])."""
    positions = torch.cat([torch.arange(a, b) for a, b in zip(starts, ends, strict=True)])
    rows = torch.cat([torch.full((b - a,), i) for i, (a, b) in enumerate(zip(starts, ends, strict=True))])
    lengths = torch.tensor([b - a for a, b in zip(starts, ends, strict=True)])
    query_start = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    slots = TABLES[rows, positions // BLOCK].long() * BLOCK + positions % BLOCK
    made = (
        (positions * 7 + rows * 13) % 96,
        positions,
        slots,
        query_start.int(),
        torch.tensor(ends, dtype=torch.int32),
        TABLES,
        query_start[1:] - 1,
    )
    return Batch(*(tensor.to(where) for tensor in made))


def logits(ops: Ops, model: ModelSpec, where: torch.device) -> list[Tensor]:
    transformer = Transformer(model, where, ops)
    generator = torch.Generator().manual_seed(5)
    for key, target in sorted(weight_targets(transformer).items()):
        mean, deviation = (1.0, 0.1) if "norm" in key else (0.0, 0.2)
        target.tensor.copy_(torch.randn(target.tensor.shape, generator=generator) * deviation + mean)
    transformer.pack()
    kv = allocate_kv(kv_spec(model, BLOCK), NUM_BLOCKS, where)
    steps = [([0, 0], [3, 17]), ([3, 17], [19, 18]), ([19, 18], [20, 19])]  # prefill; a chunk beside a decode; decodes
    with torch.inference_mode():
        return [transformer.forward(step(*each, where), kv) for each in steps]


@pytest.mark.parametrize(("qk_norm", "window"), [(True, None), (False, 11)])
def test_a_model_on_these_kernels_equals_the_reference(qk_norm: bool, window: int | None, where: torch.device) -> None:
    model = spec(qk_norm=qk_norm, window=window)
    for ours, expected in zip(logits(gpu_ops(4), model, where), logits(REFERENCE, model, where), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
