"""How good `builtin:tiny` is: its loss on the files it never saw, and what it writes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from builtin_corpus import END_OF_TEXT_ID, IM_END_ID, SourceFile, chat_prompt, encode
from builtin_training import loss_of
from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM

WINDOW = 1024
SAMPLE_PROMPTS = (
    "def read_file(path):",
    "class Server:\n    def __init__(self, host, port",
    "import os",
    chat_prompt("Return the absolute version of a path."),
)


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    files: int
    tokens: int
    chars_per_token: float
    nats_per_token: float
    bits_per_char: float
    nats_per_token_512_to_1024: float  # positions 512 up to 1,024 of each window


@torch.inference_mode()
def held_out_loss(model: Qwen3ForCausalLM, tokenizer: Tokenizer, files: list[SourceFile]) -> HeldOutLoss:
    """Windows of 1,024 tokens over the held-out files laid end to end, each file followed by the separator."""
    was_training = model.training
    model.train(False)
    stream = np.concatenate([encode(tokenizer, f.text) for f in files])
    losses = []
    for start in range(0, len(stream) - WINDOW, WINDOW):
        window = torch.from_numpy(stream[start : start + WINDOW + 1])[None]
        losses.append(loss_of(model, window, reduction="none"))
    model.train(was_training)
    by_position = torch.stack(losses)  # [num_windows, WINDOW]
    nats_per_token = by_position.mean().item()
    chars_per_token = sum(len(f.text) for f in files) / len(stream)
    return HeldOutLoss(
        files=len(files),
        tokens=by_position.numel(),
        chars_per_token=chars_per_token,
        nats_per_token=nats_per_token,
        bits_per_char=nats_per_token / math.log(2) / chars_per_token,
        nats_per_token_512_to_1024=by_position[:, 512:].mean().item(),
    )


@torch.inference_mode()
def draw_samples(model: Qwen3ForCausalLM, tokenizer: Tokenizer, num_tokens: int = 160) -> list[str]:
    """One text for each prompt, prompt included; the prompt's index is its seed."""
    generator: Any = model  # `generate` is annotated for a protocol that mypy does not see in the model
    samples = []
    for seed, prompt in enumerate(SAMPLE_PROMPTS):
        torch.manual_seed(seed)
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        out = generator.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=True,
            temperature=0.7,
            top_k=0,
            eos_token_id=[END_OF_TEXT_ID, IM_END_ID],
            pad_token_id=END_OF_TEXT_ID,
        )
        samples.append(tokenizer.decode(out[0].tolist(), skip_special_tokens=False))
    return samples
