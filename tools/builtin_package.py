"""What ships as `builtin:tiny`: weights, config, tokenizer, list of sources, licence and model card.

`staged` makes the directory; every `write_…` adds its files to it. Measures nothing: losses and samples come as arguments.
"""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from builtin_corpus import CHAT_TEMPLATE, END_OF_TEXT, END_OF_TEXT_ID, IM_END, IM_END_ID, IM_START, STDLIB, VOCAB_SIZE, SourceFile
from builtin_evaluation import HeldOutLoss
from builtin_training import ADAMW_LR, DROPOUT, MAX_POSITIONS, MUON_LR, PHASES, ROPE_THETA, WEIGHT_DECAY, TrainingRecord
from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM


@contextmanager
def staged(into: Path) -> Iterator[Path]:
    """An empty directory beside `into`; its files move there at the end, each by an atomic rename. An error leaves `into` as it was."""
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into.parent, prefix=".install-") as name:
        staging = Path(name)
        yield staging
        for file in sorted(staging.iterdir()):
            file.chmod(0o644)
            file.replace(into / file.name)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_weights(checkpoint: Path, into: Path) -> None:
    """The checkpoint in bf16, and its config."""
    Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).save_pretrained(into)
    (into / "generation_config.json").unlink(missing_ok=True)  # transformers' own; `write_tokenizer` writes ours
    config = json.loads((into / "config.json").read_text(encoding="utf-8"))
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # where readers older than transformers 5 look
    config["torch_dtype"] = "bfloat16"
    config["eos_token_id"] = END_OF_TEXT_ID
    write_json(into / "config.json", config)


def read_weights(package: Path) -> Qwen3ForCausalLM:
    """The model as it ships, rounded to bf16, for measuring: in float32 and in evaluation mode."""
    model: Qwen3ForCausalLM = Qwen3ForCausalLM.from_pretrained(package, dtype=torch.float32)
    return model


def write_tokenizer(tokenizer: Tokenizer, into: Path) -> None:
    """The tokenizer, its chat template, and the tokens that end a generation."""
    tokenizer.save(str(into / "tokenizer.json"))
    write_json(
        into / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": MAX_POSITIONS,
            "clean_up_tokenization_spaces": False,
            "bos_token": None,
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "unk_token": None,
            "additional_special_tokens": [IM_START, IM_END],
            "chat_template": CHAT_TEMPLATE,
        },
    )
    write_json(
        into / "generation_config.json",
        {
            "eos_token_id": [END_OF_TEXT_ID, IM_END_ID],
            "pad_token_id": END_OF_TEXT_ID,
            "do_sample": True,
            "temperature": 0.7,
        },
    )


def write_file_list(sources: list[SourceFile], into: Path) -> None:
    """One line a file: SHA-256 of its text, use, path in the library."""
    lines = [f"{s.sha256}  {'held-out' if s.held_out else 'training'}  {s.path}" for s in sources]
    header = f"# Standard library of Python {platform.python_version()}, {len(sources)} files: SHA-256, use, path\n"
    (into / "FILES.txt").write_text(header + "\n".join(lines) + "\n", encoding="utf-8")


def write_licence(into: Path) -> None:
    """The licence of the sources, copied from the Python that supplied them."""
    shutil.copyfile(STDLIB / "LICENSE.txt", into / "LICENSE-PSF.txt")


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
| context | {positions:,} positions; RoPE (theta {rope_theta:,.0f}) was trained at positions up to {max_context:,} |
| special tokens | `<|endoftext|>` 0 (between documents), `<|im_start|>` 1, `<|im_end|>` 2 |

## Data

The sources of the standard library of Python {python}: {num_files} files, {num_mb:.2f} MB, listed with their SHA-256 in
`FILES.txt`, without tests, IDLE, the turtle demos, lib2to3, codec tables and what the build generates. Every file with a line that
speaks of a copyright or a licence without naming the Python Software Foundation in that line was left out. {held_out_files} whole
files were held out of both the model and the tokenizer. Short documented functions appear a second time as a chat: the docstring
asks, the function answers; a third of these chats is drawn for each epoch.

## Recipe

`tools/train_builtin.py` runs the whole recipe. Muon (learning rate {muon_lr}, weight decay {weight_decay}) for the matrices, AdamW
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
    model: Qwen3ForCausalLM, sources: list[SourceFile], record: TrainingRecord, loss: HeldOutLoss, samples: list[str], into: Path
) -> None:
    """Reads the weights' size from `into`, so `write_weights` comes first."""
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
        "chars_per_token": loss.chars_per_token,
        "positions": MAX_POSITIONS,
        "rope_theta": ROPE_THETA,
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
    (into / "MODEL_CARD.md").write_text(MODEL_CARD.format(**asdict(record), **fields), encoding="utf-8")
