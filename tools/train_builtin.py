"""Trains `builtin:tiny`, the model that ships inside the package, from Python's standard library.

Three commands, run in this order; none of them needs the network:

    python tools/train_builtin.py corpus --work DIR
    python tools/train_builtin.py train --work DIR --minutes 65
    python tools/train_builtin.py install --work DIR --into disaggd/model/builtin/tiny

`corpus` chooses the source files and trains the tokenizer (`DIR/tokenizer.json`), `train` fits a small Qwen3 decoder on the CPU
(`DIR/checkpoint`, `DIR/record.json`), `install` measures the held-out loss, draws samples and writes the package directory. The recipe is
reproducible; the weights are not bit for bit, because the learning-rate schedule follows the wall clock (the run ends on time on a busy
machine, with fewer steps).

This file is the commands; the recipe is in the modules beside it, each of which imports only those before it: `builtin_corpus`,
`builtin_training`, `builtin_evaluation`, `builtin_package`.

Set `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456` before the start: glibc otherwise gives every large
tensor back to the kernel, and page faults took about half of a step.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
from builtin_corpus import STDLIB, chat_documents, collect_sources, encode, split, train_tokenizer
from builtin_evaluation import draw_samples, held_out_loss
from builtin_package import (
    read_weights,
    staged,
    write_file_list,
    write_json,
    write_licence,
    write_model_card,
    write_tokenizer,
    write_weights,
)
from builtin_training import TrainingRecord, Windows, fit, new_model
from tokenizers import Tokenizer

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
    training, _ = split(sources)
    train_tokenizer([s.text for s in training]).save(str(work / "tokenizer.json"))
    click.echo(f"{len(sources)} files, {sum(len(s.text) for s in sources) / 1e6:.2f} M characters, {len(training)} for training")


@main.command()
@work_option
@click.option("--minutes", type=float, default=65.0, show_default=True)
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def train(work: Path, minutes: float, threads: int, seed: int) -> None:
    """Fits the model with the tokenizer of the work directory."""
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    training, held_out = split(collect_sources(STDLIB))
    files = [encode(tokenizer, s.text) for s in training]
    chats = [encode(tokenizer, chat) for s in training for chat in chat_documents(s)]
    click.echo(f"{len(files)} files of {sum(map(len, files)):,} tokens, {len(chats)} chats of {sum(map(len, chats)):,} tokens")
    model = new_model(seed)

    def checkpoint() -> None:
        model.save_pretrained(work / "checkpoint")
        click.echo(str(held_out_loss(model, tokenizer, held_out)))

    record = fit(model, Windows(files, chats, seed), minutes, threads, checkpoint)
    write_json(work / "record.json", asdict(record))
    click.echo(str(record))


@main.command()
@work_option
@click.option("--into", type=click.Path(path_type=Path, file_okay=False), required=True, help="The model's package directory.")
def install(work: Path, into: Path) -> None:
    """Measures the checkpoint and writes the package directory, each file by an atomic rename."""
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    record = TrainingRecord(**json.loads((work / "record.json").read_text(encoding="utf-8")))
    sources = collect_sources(STDLIB)
    _, held_out = split(sources)
    with staged(into) as staging:
        write_weights(work / "checkpoint", staging)
        write_tokenizer(tokenizer, staging)
        write_file_list(sources, staging)
        write_licence(staging)
        model = read_weights(staging)
        loss = held_out_loss(model, tokenizer, held_out)
        click.echo(str(loss))
        samples = draw_samples(model, tokenizer)
        click.echo("\n-----\n".join(samples))
        write_model_card(model, sources, record, loss, samples, staging)


if __name__ == "__main__":
    main()
