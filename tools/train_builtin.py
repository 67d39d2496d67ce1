"""Trains `builtin:tiny`, the model that ships inside the package, from Python's standard library.

Three commands, run in this order; none of them needs the network:

    python tools/train_builtin.py corpus --work DIR
    python tools/train_builtin.py train --work DIR --minutes 65
    python tools/train_builtin.py install --work DIR --into disaggd/model/builtin/tiny

`corpus` chooses the source files and trains the tokenizer, `train` fits a small Qwen3 decoder on the CPU, `install` measures the
held-out loss, draws samples and writes the package directory. The recipe is reproducible; the weights are not bit for bit, because the
learning-rate schedule follows the wall clock (the run ends on time on a busy machine, with fewer steps).

Set `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456` before the start: glibc otherwise gives every large
tensor back to the kernel, and page faults took about half of a step.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import platform
import re
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

Tokens = npt.NDArray[np.int64]

STDLIB = Path(sysconfig.get_paths()["stdlib"])

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, IM_START, IM_END]  # ids 0, 1, 2
VOCAB_SIZE = 4096

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Tests, data tables, text that is not code, and files that the build writes with paths of the machine in them.
SKIPPED_DIRS = {"test", "tests", "idlelib", "turtledemo", "lib2to3", "pydoc_data", "encodings", "site-packages", "__pycache__"}
SKIPPED_BUILD_DIR = re.compile(r"config-.*")
SKIPPED_NAMES = re.compile(r"_sysconfigdata.*|__phello__.*|turtle\.py|_pyrepl.*")

# A file with any such line is left out unless that same line names the PSF: rather lose a file than ship a foreign notice.
NOTICE = re.compile(
    r"copyright|licen[sc]e|permission (is|to use|notice)|(with|by) permission|permission from|redistribut|public domain|spdx"
    r"|\(c\)\s*(19|20)\d\d|©|\bGPL|without warranty|no warranty",
    re.IGNORECASE,
)
PSF = re.compile(r"Python Software Foundation|\bPSFL?\b")
HELD_OUT_ONE_IN = 25  # files, chosen by a hash of their path


# ---------------------------------------------------------------------------------------------------------------- corpus


@dataclass(frozen=True, slots=True)
class SourceFile:
    path: str  # relative to the standard library, with forward slashes
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def held_out(self) -> bool:
        """Whether the file is kept for validation: neither model nor tokenizer trains on it."""
        return int(hashlib.sha256(self.path.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def carries_foreign_notice(text: str) -> bool:
    return any(NOTICE.search(line) and not PSF.search(line) for line in text.splitlines())


def collect_sources(root: Path) -> list[SourceFile]:
    """The library's own modules, sorted by path, without those that carry another licence than the PSF's."""
    sources = []
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if SKIPPED_DIRS & set(path.parts[:-1]) or SKIPPED_BUILD_DIR.match(path.parts[0]) or SKIPPED_NAMES.fullmatch(path.name):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip() and not carries_foreign_notice(text):
            sources.append(SourceFile(path.as_posix(), text))
    return sources


def chat_documents(source: SourceFile) -> Iterator[str]:
    """A question and an answer for each short documented function, so that the chat markers mean something to the model."""
    for node in ast.walk(ast.parse(source.text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring, code = ast.get_docstring(node), ast.get_source_segment(source.text, node)
        if not docstring or not code or len(code) > 1500:
            continue
        indent = " " * node.col_offset
        code = "\n".join(line.removeprefix(indent) for line in code.splitlines())
        summary = " ".join(docstring.split("\n\n")[0].split())
        question = f"Write a Python function `{node.name}`." if len(summary) % 4 == 0 else summary
        yield f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n{code}{IM_END}\n"


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE: any bytes round-trip, and a newline with its indentation is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, document: str) -> Tokens:
    """The document's tokens and the separator. [num_tokens + 1]"""
    return np.array([*tokenizer.encode(document).ids, SPECIAL_TOKENS.index(END_OF_TEXT)], dtype=np.int64)


# -------------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True, slots=True)
class Phase:
    """A context length, and the fraction of the run's wall clock at which it begins."""

    begins: float
    context: int
    batch: int


# The long phase is what trains RoPE at positions beyond the short one.
PHASES = (Phase(0.0, 512, 8), Phase(0.72, 1280, 3))
MUON_LR = 0.02
ADAMW_LR = 0.003
WEIGHT_DECAY = 0.2
DROPOUT = 0.1  # on what each block adds to the residual stream: the run sees every file several times
CHATS_PER_EPOCH = 1 / 3  # the fraction drawn anew each epoch; all of them would be a quarter of the tokens
WARMUP_STEPS = 40
DECAY_BEGINS = 0.3  # fraction of the wall clock; linear to zero from here


def model_config() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=704,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=SPECIAL_TOKENS.index(END_OF_TEXT),
        pad_token_id=SPECIAL_TOKENS.index(END_OF_TEXT),
    )


def new_model(seed: int) -> Qwen3ForCausalLM:
    """Each block begins as the identity: its two output projections are zero."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(model_config())
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(parameter)
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
        return sum(map(len, self._files)) + int(sum(map(len, self._chats)) * CHATS_PER_EPOCH)

    def _epoch(self) -> Tokens:
        chosen = self._rng.permutation(len(self._chats))[: int(len(self._chats) * CHATS_PER_EPOCH)]
        documents = self._files + [self._chats[i] for i in chosen]
        return np.concatenate([documents[i] for i in self._rng.permutation(len(documents))])

    def batches(self, context: int, batch: int) -> Iterator[torch.Tensor]:
        """Yields [batch, context + 1]: the inputs and, one to the right, the targets."""
        while True:
            stream = self._epoch()[self._rng.integers(context) :]
            starts = self._rng.permutation(np.arange(0, len(stream) - context, context))
            for i in range(0, len(starts) - batch + 1, batch):
                yield torch.from_numpy(np.stack([stream[s : s + context + 1] for s in starts[i : i + batch]]))


def loss_of(model: Any, window: torch.Tensor, *, reduction: str = "mean") -> torch.Tensor:
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
    """Of 1. `elapsed` is the fraction of the wall clock that is gone."""
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


def fit(
    model: Qwen3ForCausalLM, windows: Windows, minutes: float, threads: int, checkpoint: Callable[[Qwen3ForCausalLM], None]
) -> TrainingRecord:
    """Trains until the wall clock runs out. Calls `checkpoint` about every ten minutes and at the end."""
    optimizers = new_optimizers(model)
    rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
    tuner = ThreadTuner(threads)
    start = saved = time.monotonic()
    step = tokens = 0
    losses: list[float] = []
    for i, phase in enumerate(PHASES):
        ends = PHASES[i + 1].begins if i + 1 < len(PHASES) else 1.0
        for window in windows.batches(phase.context, phase.batch):
            began = time.monotonic()
            elapsed = (began - start) / (60 * minutes)
            if elapsed >= ends:
                break
            for optimizer, base in zip(optimizers, rates, strict=True):
                for group, rate in zip(optimizer.param_groups, base, strict=True):
                    group["lr"] = rate * learning_rate_scale(step, elapsed)
            tuner.before_step(step)
            loss = loss_of(model, window)
            torch.autograd.backward([loss])
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            now = time.monotonic()
            tuner.after_step(step, now - began)
            step, tokens = step + 1, tokens + phase.batch * phase.context
            if step % 50 == 0:
                epochs, rate_tok_s, mean = tokens / windows.epoch_tokens, tokens / (now - start), float(np.mean(losses[-50:]))
                progress = f"{now - start:6.0f} s  step {step}  {epochs:.2f} epochs  {rate_tok_s:.0f} tok/s"
                click.echo(f"{progress}  {torch.get_num_threads()} threads  loss {mean:.3f}")
            if now - saved > 600:
                checkpoint(model)
                saved = time.monotonic()
    checkpoint(model)
    return TrainingRecord(minutes, step, tokens, tokens / windows.epoch_tokens, float(np.mean(losses[-100:])))


# ------------------------------------------------------------------------------------------------- evaluation and files


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    files: int
    tokens: int
    nats_per_token: float
    bits_per_char: float
    nats_per_token_512_to_1024: float  # positions 512 up to 1,024 of each window


@torch.inference_mode()
def held_out_loss(model: Qwen3ForCausalLM, tokenizer: Tokenizer, files: list[SourceFile]) -> HeldOutLoss:
    """Windows of 1,024 tokens over the held-out files laid end to end, each file followed by the separator."""
    context = 1024
    was_training = model.training
    model.train(False)
    stream = np.concatenate([encode(tokenizer, f.text) for f in files])
    losses = []
    for start in range(0, len(stream) - context, context):
        window = torch.from_numpy(stream[start : start + context + 1])[None]
        losses.append(loss_of(model, window, reduction="none"))
    model.train(was_training)
    by_position = torch.stack(losses)  # [num_windows, context]
    mean = by_position.mean().item()
    chars_per_token = sum(len(f.text) for f in files) / len(stream)
    return HeldOutLoss(len(files), by_position.numel(), mean, mean / math.log(2) / chars_per_token, by_position[:, 512:].mean().item())


SAMPLE_PROMPTS = ("def read_file(path):", "class Server:\n    def __init__(self, host, port", "import os")


@torch.inference_mode()
def draw_samples(model: Qwen3ForCausalLM, tokenizer: Tokenizer, num_tokens: int = 160) -> list[str]:
    chat = f"{IM_START}user\nReturn the absolute version of a path.{IM_END}\n{IM_START}assistant\n"
    generator: Any = model  # `generate` is annotated for a protocol that mypy does not see in the model
    samples = []
    for seed, prompt in enumerate((*SAMPLE_PROMPTS, chat)):
        torch.manual_seed(seed)
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        out = generator.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=True,
            temperature=0.7,
            top_k=0,
            eos_token_id=[0, 2],
            pad_token_id=0,
        )
        samples.append(tokenizer.decode(out[0].tolist(), skip_special_tokens=False))
    return samples


def dump(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_tokenizer(tokenizer: Tokenizer, into: Path) -> None:
    tokenizer.save(str(into / "tokenizer.json"))
    dump(
        into / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 4096,
            "clean_up_tokenization_spaces": False,
            "bos_token": None,
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "unk_token": None,
            "additional_special_tokens": [IM_START, IM_END],
            "chat_template": CHAT_TEMPLATE,
        },
    )
    dump(
        into / "generation_config.json",
        {
            "eos_token_id": [SPECIAL_TOKENS.index(END_OF_TEXT), SPECIAL_TOKENS.index(IM_END)],
            "pad_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
            "do_sample": True,
            "temperature": 0.7,
        },
    )


def write_weights(checkpoint: Path, into: Path) -> Qwen3ForCausalLM:
    """Writes bf16 weights and the config; returns the bf16 weights loaded as float32, the model that is measured."""
    model = Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    model.save_pretrained(into)
    (into / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((into / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # where readers older than transformers 5 look
    config["torch_dtype"] = "bfloat16"
    config["eos_token_id"] = SPECIAL_TOKENS.index(END_OF_TEXT)
    dump(into / "config.json", config)
    measured: Qwen3ForCausalLM = Qwen3ForCausalLM.from_pretrained(into, dtype=torch.float32)  # in evaluation mode
    return measured


MODEL_CARD = """\
# builtin:tiny

A decoder of {millions:.1f} million parameters that ships with the package, so that a server, its tests and its examples run without a
download. It writes text that looks like Python. It knows no facts, follows no instructions, and is of no use beyond that.

| | |
| --- | --- |
| architecture | `Qwen3ForCausalLM`, {layers} layers, tied embeddings |
| widths | hidden {hidden}, intermediate {intermediate}, {heads} query and {kv_heads} KV heads of {head_dim} |
| parameters | {parameters:,} |
| weights | bf16, {weights_mb:.1f} MB |
| tokenizer | byte-level BPE, {vocab} entries, {chars_per_token:.2f} characters per token on the held-out files |
| context | 4,096 positions; RoPE (theta 10,000) was trained at positions up to {max_context:,} |
| special tokens | `<|endoftext|>` 0 (between documents), `<|im_start|>` 1, `<|im_end|>` 2 |

## Data

The sources of the standard library of Python {python}: {num_files} files, {num_mb:.2f} MB, listed with their SHA-256 in
`FILES.txt`, without tests, IDLE, the turtle demos, lib2to3, codec tables and what the build generates. Every file with a line that
speaks of a copyright or a licence without naming the Python Software Foundation in that line was left out. {held_out_files} whole
files were held out of both the model and the tokenizer. Short documented functions appear a second time as a chat: the docstring
asks, the function answers; a third of these chats is drawn for each epoch.

The tokenizer saw one file more than the list has, the build's 2 kB `python-config.py`.

## Recipe

`tools/train_builtin.py` is the whole recipe. Muon (learning rate {muon_lr}, weight decay {weight_decay}) for the matrices, AdamW
({adamw_lr}) for the embedding and the norms, dropout {dropout}, bf16 autocast, batches of {phases} tokens, learning rate linear to
zero by the wall clock.

| | |
| --- | --- |
| training | {minutes:.0f} minutes on two shared CPU cores, {steps:,} steps, {tokens_m:.1f} million tokens, {epochs:.1f} epochs |
| training loss | {train_loss:.3f} nats/token (mean of the last 100 steps, chats included) |
| held-out loss | {nats:.3f} nats/token, {bits:.3f} bits/char ({held_out_files} files, {held_out_tokens:,} tokens, windows of 1,024) |
| at positions 512 to 1,024 | {nats_long:.3f} nats/token |

## Samples

Temperature 0.7, prompt included, not chosen (the first two prompts of the script, seeds 0 and 1).

```
{sample_0}
```

```
{sample_1}
```

## Licence

The training text is covered by the PSF licence (`LICENSE-PSF.txt`, copied from the Python that supplied the sources): Copyright © 2001
Python Software Foundation; All Rights Reserved. Whether weights are a derivative work of the training text is not settled, and a small
model can repeat passages of it, so the licence, the list of files and the recipe are shipped with the weights.
"""


def write_model_card(
    into: Path, model: Qwen3ForCausalLM, sources: list[SourceFile], record: TrainingRecord, loss: HeldOutLoss, samples: list[str]
) -> None:
    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    fields = {
        "millions": parameters / 1e6,
        "parameters": parameters,
        "hidden": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate": config.intermediate_size,
        "vocab": VOCAB_SIZE,
        "weights_mb": (into / "model.safetensors").stat().st_size / 1e6,
        "chars_per_token": loss.nats_per_token / math.log(2) / loss.bits_per_char,
        "max_context": max(p.context for p in PHASES),
        "phases": " and then ".join(f"{p.batch} x {p.context:,}" for p in PHASES),
        "python": platform.python_version(),
        "num_files": len(sources),
        "num_mb": sum(len(s.text.encode()) for s in sources) / 1e6,
        "muon_lr": MUON_LR,
        "adamw_lr": ADAMW_LR,
        "weight_decay": WEIGHT_DECAY,
        "dropout": DROPOUT,
        "tokens_m": record.tokens / 1e6,
        "held_out_files": loss.files,
        "held_out_tokens": loss.tokens,
        "nats": loss.nats_per_token,
        "bits": loss.bits_per_char,
        "nats_long": loss.nats_per_token_512_to_1024,
        "sample_0": samples[0],
        "sample_1": samples[1],
    }
    (into / "MODEL_CARD.md").write_text(MODEL_CARD.format(**asdict(record), **fields))


def write_file_list(into: Path, sources: list[SourceFile]) -> None:
    """One line a file: SHA-256 of its text, use, path in the library."""
    lines = [f"{s.sha256}  {'held-out' if s.held_out else 'training'}  {s.path}" for s in sources]
    header = f"# Standard library of Python {platform.python_version()}, {len(sources)} files: SHA-256, use, path\n"
    (into / "FILES.txt").write_text(header + "\n".join(lines) + "\n")


# -------------------------------------------------------------------------------------------------------------- commands


work_option = click.option("--work", type=click.Path(path_type=Path, file_okay=False), required=True, help="Scratch directory.")


@click.group()
def main() -> None:
    """Trains the built-in model."""


@main.command()
@work_option
def corpus(work: Path) -> None:
    """Chooses the sources and trains the tokenizer."""
    work.mkdir(parents=True, exist_ok=True)
    sources = collect_sources(STDLIB)
    training = [s.text for s in sources if not s.held_out]
    train_tokenizer(training).save(str(work / "tokenizer.json"))
    click.echo(f"{len(sources)} files, {sum(len(s.text) for s in sources) / 1e6:.2f} M characters, {len(training)} for training")


@main.command()
@work_option
@click.option("--minutes", type=float, default=65.0, show_default=True)
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def train(work: Path, minutes: float, threads: int, seed: int) -> None:
    """Fits the model with the tokenizer of the work directory."""
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    sources = collect_sources(STDLIB)
    training, held_out = [s for s in sources if not s.held_out], [s for s in sources if s.held_out]
    files = [encode(tokenizer, s.text) for s in training]
    chats = [encode(tokenizer, chat) for s in training for chat in chat_documents(s)]
    click.echo(f"{len(files)} files of {sum(map(len, files)):,} tokens, {len(chats)} chats of {sum(map(len, chats)):,} tokens")
    model = new_model(seed)
    add_dropout(model)

    def checkpoint(model: Qwen3ForCausalLM) -> None:
        model.save_pretrained(work / "checkpoint")
        click.echo(str(held_out_loss(model, tokenizer, held_out)))

    record = fit(model, Windows(files, chats, seed), minutes, threads, checkpoint)
    dump(work / "record.json", asdict(record))
    click.echo(str(record))


@main.command()
@work_option
@click.option("--into", type=click.Path(path_type=Path, file_okay=False), required=True, help="The model's package directory.")
def install(work: Path, into: Path) -> None:
    """Measures the checkpoint and writes the package directory, each file by an atomic rename."""
    sources = collect_sources(STDLIB)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into.parent, prefix=".install-") as name:
        staging = Path(name)
        model = write_weights(work / "checkpoint", staging)
        write_tokenizer(tokenizer, staging)
        write_file_list(staging, sources)
        shutil.copyfile(STDLIB / "LICENSE.txt", staging / "LICENSE-PSF.txt")
        loss = held_out_loss(model, tokenizer, [s for s in sources if s.held_out])
        click.echo(str(loss))
        samples = draw_samples(model, tokenizer)
        click.echo("\n-----\n".join(samples))
        record = TrainingRecord(**json.loads((work / "record.json").read_text()))
        write_model_card(staging, model, sources, record, loss, samples)
        for file in sorted(staging.iterdir()):
            file.chmod(0o644)
            file.replace(into / file.name)


if __name__ == "__main__":
    main()
