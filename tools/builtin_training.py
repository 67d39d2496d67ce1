"""How `builtin:tiny` learns: the model, the batches, the optimizers, the schedule, and the loop over them.

Knows nothing of files: documents come as arrays of tokens, and whoever calls `fit` says what a checkpoint is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from builtin_corpus import END_OF_TEXT_ID, VOCAB_SIZE, Tokens
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM


@dataclass(frozen=True, slots=True)
class Phase:
    """A context length, and the fraction of the run's wall clock at which it begins."""

    begins: float
    context: int
    batch: int


# The long phase is what trains RoPE at positions beyond the short one.
PHASES = (Phase(0.0, 512, 8), Phase(0.72, 1280, 3))
MAX_POSITIONS = 4096
ROPE_THETA = 10000.0
MUON_LR = 0.02
ADAMW_LR = 0.003
WEIGHT_DECAY = 0.2
DROPOUT = 0.1  # on what each block adds to the residual stream: the run sees every file several times
CHATS_PER_EPOCH = 1 / 3  # the fraction drawn anew each epoch; all of them would be a quarter of the tokens
WARMUP_STEPS = 40
DECAY_BEGINS = 0.3  # fraction of the wall clock; linear to zero from here
CHECKPOINT_EVERY_S = 600
REPORT_EVERY_STEPS = 50


def model_config() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=704,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
    )


def new_model(seed: int) -> Qwen3ForCausalLM:
    """In training mode. Each block begins as the identity: its two output projections are zero."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(model_config())
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(parameter)
    add_dropout(model)
    model.train()
    return model


def add_dropout(model: Qwen3ForCausalLM) -> None:
    """Qwen3 has none on its residual branches; it works in training mode only and leaves no trace in a checkpoint."""

    def drop(module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, DROPOUT, training=module.training)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


class Windows:
    """Endless batches: each epoch lays the documents out in a new order and cuts the stream at a new offset."""

    def __init__(self, files: list[Tokens], chats: list[Tokens], seed: int) -> None:
        self._files = files
        self._chats = chats
        self._rng = np.random.default_rng(seed)

    @property
    def epoch_tokens(self) -> int:
        """On average: which chats an epoch draws varies."""
        return sum(map(len, self._files)) + int(sum(map(len, self._chats)) * CHATS_PER_EPOCH)

    def batches(self, context: int, batch: int) -> Iterator[torch.Tensor]:
        """Yields [batch, context + 1]: the inputs and, one to the right, the targets."""
        while True:
            stream = self._epoch()[self._rng.integers(context) :]
            starts = self._rng.permutation(np.arange(0, len(stream) - context, context))
            for i in range(0, len(starts) - batch + 1, batch):
                yield torch.from_numpy(np.stack([stream[s : s + context + 1] for s in starts[i : i + batch]]))

    def _epoch(self) -> Tokens:
        chosen = self._rng.permutation(len(self._chats))[: int(len(self._chats) * CHATS_PER_EPOCH)]
        documents = self._files + [self._chats[i] for i in chosen]
        return np.concatenate([documents[i] for i in self._rng.permutation(len(documents))])


def loss_of(model: Any, window: torch.Tensor, *, reduction: str = "mean") -> torch.Tensor:
    """Cross entropy in nats of a window [batch, context + 1]: a scalar, or [batch * context] with `reduction="none"`."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=window[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten(), reduction=reduction)


def new_optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the (tied) embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=MUON_LR, momentum=0.95, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def learning_rate_scale(step: int, elapsed: float) -> float:
    """What the peak rates are multiplied by, 0 to 1. `elapsed` is the fraction of the wall clock that is gone."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return warmup * min(1.0, max(0.0, 1.0 - elapsed) / (1.0 - DECAY_BEGINS))


class ThreadTuner:
    """Every hundred steps, tries four steps on one thread and four on all, and stays with the faster.

    On a quiet machine two threads take half the time of one; on a busy one, OpenMP's barriers wait for whichever thread is not running,
    and one thread can win.
    """

    PERIOD, TRIAL = 100, 4

    def __init__(self, most: int) -> None:
        self._choices = (1, most)
        self._seconds: dict[int, list[float]] = {}

    def before_step(self, step: int) -> None:
        trial, offset = divmod(step % self.PERIOD, self.TRIAL)
        if offset == 0 and trial < len(self._choices):
            self._seconds[self._choices[trial]] = []
            torch.set_num_threads(self._choices[trial])
        elif offset == 0 and trial == len(self._choices):
            torch.set_num_threads(min(self._choices, key=lambda choice: float(np.mean(self._seconds[choice]))))

    def after_step(self, step: int, seconds: float) -> None:
        if step % self.PERIOD < len(self._choices) * self.TRIAL:
            self._seconds[torch.get_num_threads()].append(seconds)


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    minutes: float
    steps: int
    tokens: int
    epochs: float
    train_loss: float  # nats/token, mean of the last 100 steps


def scheduled_batches(windows: Windows, start: float, seconds: float) -> Iterator[tuple[torch.Tensor, float]]:
    """The batches of one phase after the other, each with the fraction of the wall clock that is gone, until none is left."""
    for phase, ends in zip(PHASES, [*(p.begins for p in PHASES[1:]), 1.0], strict=True):
        for window in windows.batches(phase.context, phase.batch):
            elapsed = (time.monotonic() - start) / seconds
            if elapsed >= ends:
                break
            yield window, elapsed


def train_step(model: Qwen3ForCausalLM, optimizers: list[torch.optim.Optimizer], window: torch.Tensor) -> float:
    """Returns the loss before the step, in nats/token."""
    loss = loss_of(model, window)
    torch.autograd.backward([loss])
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def fit(model: Qwen3ForCausalLM, windows: Windows, minutes: float, threads: int, checkpoint: Callable[[], None]) -> TrainingRecord:
    """Trains until the wall clock runs out. Calls `checkpoint` about every ten minutes and at the end."""
    optimizers = new_optimizers(model)
    peak_rates = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    tuner = ThreadTuner(threads)
    losses: list[float] = []
    tokens = 0
    start = saved = time.monotonic()
    for step, (window, elapsed) in enumerate(scheduled_batches(windows, start, 60 * minutes)):
        for group, peak in peak_rates:
            group["lr"] = peak * learning_rate_scale(step, elapsed)
        tuner.before_step(step)
        began = time.monotonic()
        losses.append(train_step(model, optimizers, window))
        now = time.monotonic()
        tuner.after_step(step, now - began)
        tokens += window[:, 1:].numel()
        if len(losses) % REPORT_EVERY_STEPS == 0:
            report(losses, tokens, tokens / windows.epoch_tokens, now - start)
        if now - saved > CHECKPOINT_EVERY_S:
            checkpoint()
            saved = now
    checkpoint()
    return TrainingRecord(minutes, len(losses), tokens, tokens / windows.epoch_tokens, float(np.mean(losses[-100:])))


def report(losses: list[float], tokens: int, epochs: float, seconds: float) -> None:
    progress = f"{seconds:6.0f} s  step {len(losses)}  {epochs:.2f} epochs  {tokens / seconds:.0f} tok/s"
    click.echo(f"{progress}  {torch.get_num_threads()} threads  loss {np.mean(losses[-REPORT_EVERY_STEPS:]):.3f}")
