"""Tiny random checkpoints, written by transformers, and a pool to run ours on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from disaggd.model.batch import Batch
from disaggd.model.kv import allocate_kv
from disaggd.model.transformer import LayersDone, Transformer
from disaggd.transfer.layout import kv_spec

CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "mha": {"num_key_value_heads": 4},
    "rope": {"rope_parameters": LLAMA3_ROPE},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "attentionbias": {"attention_bias": True},
    "narrow": {"intermediate_size": 96},  # decode has no kernel for all layers of such a shape
    "window": {"sliding_window": 21},
    "qwenwindow": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
}


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    model: transformers.PreTrainedModel


def _build(name: str) -> transformers.PreTrainedModel:
    """`family-variant-variant…`, 4 heads of 16 over 2 KV heads; an odd vocabulary, as real ones have."""
    family, *variants = name.split("-")
    config_class, model_class = CLASSES[family]
    settings = {
        "vocab_size": 151,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family == "qwen3":
        settings["head_dim"] = 32
    for variant in variants:
        settings |= VARIANTS[variant]
    torch.manual_seed(0)
    model = model_class(config_class(**settings)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # livelier than before training: a wrong bias or norm must show
            parameter.normal_(1.0, 0.2) if key.endswith("norm.weight") else parameter.normal_(0.0, 0.15)
    return model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """Builds and saves the model of a name, once per session."""
    made: dict[str, Checkpoint] = {}

    def make(name: str) -> Checkpoint:
        if name not in made:
            path, model = tmp_path_factory.mktemp(name), _build(name)
            model.save_pretrained(path)
            made[name] = Checkpoint(path, model)
        return made[name]

    return make


class Pool:
    """A KV pool whose sequences own scattered blocks; runs steps of several of them."""

    def __init__(self, transformer: Transformer, block_size: int = 16, num_blocks: int = 40) -> None:
        self.transformer = transformer
        self.block_size = block_size
        self.kv = allocate_kv(kv_spec(transformer.spec, block_size), num_blocks, torch.device("cpu"))
        self.kv = self.kv[:, :, : len(transformer.part.kv_heads)].contiguous()
        self._free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(3)).tolist()
        self._computed: dict[str, int] = {}
        self._tables: dict[str, list[int]] = {}

    def step(self, new: dict[str, Sequence[int]], layers_done: LayersDone | None = None, *, all_rows: bool = False) -> Tensor:
        """Compute each sequence's new tokens; the logits of the last of each, or of all."""
        with torch.inference_mode():
            return self.transformer.forward(self.batch(new, all_rows=all_rows), self.kv, layers_done)

    def batch(self, new: dict[str, Sequence[int]], *, all_rows: bool = False) -> Batch:
        positions, slots, starts = [], [], [0]
        for name, tokens in new.items():
            start = self._computed.get(name, 0)
            self._computed[name] = start + len(tokens)
            table = self._tables.setdefault(name, [])
            while len(table) * self.block_size < start + len(tokens):
                table.append(self._free.pop())
            positions += range(start, start + len(tokens))
            slots += [table[p // self.block_size] * self.block_size + p % self.block_size for p in range(start, start + len(tokens))]
            starts.append(starts[-1] + len(tokens))
        tables = [self._tables[name] for name in new]
        width = max(map(len, tables))
        return Batch(
            tokens=torch.tensor([token for tokens in new.values() for token in tokens]),
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            query_start=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor([self._computed[name] for name in new], dtype=torch.int32),
            block_tables=torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32),
            logit_rows=torch.arange(starts[-1]) if all_rows else torch.tensor(starts[1:]) - 1,
        )


@pytest.fixture
def make_pool() -> type[Pool]:
    return Pool
