"""Our engine against transformers, prefill and decode, and both against the machine: see --help.

One process, the same weights and environment for both, measured by turns.
"""

import random
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import click
import msgspec
import torch
from contenders import ATTENTIONS, BLOCK_SIZE, Contender, Ours, Transformers, TransformersBy
from costs import decode_bytes, prefill_flops
from machine import Load, LoadMeter, Machine, describe_machine, measure_as_nodes_do
from models import BUILTIN, resolve
from report import Table, section, show, write_json
from roofline import Roofline, better
from roofline import measure as measure_roofline
from samples import interleaved, medians

from disaggd.model.spec import ModelSpec, Weights

_HOPELESS = 1.5
"""A mode of transformers that is so many times slower than its other one, warm, is not measured further."""

_OURS, _CHUNKED, _INT8 = "ours", "chunked", "ours int8"


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure."""

    model: str
    device: str
    threads: int
    prompts: tuple[int, ...]
    chunk: int
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    steps: int
    repeats: int
    against: bool
    against_tokens: int | None
    """transformers decodes up to so many tokens of context at once: its cache takes twice their memory, beside ours."""
    int8: bool
    """Our engine with int8 weights, too."""
    prefill: bool
    decode: bool
    quick: bool


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One row. Seconds are medians, of one prompt or of one decode step."""

    work: str
    batch: int
    num_tokens: int
    """Of the prompt, or of each sequence's context."""
    seconds: float
    tokens_per_s: float
    read_bytes: float | None
    """What a decode step must read at least."""
    flops: float | None
    """What a prefill must multiply at least."""
    peer: str | None
    """transformers' better mode."""
    peer_seconds: float | None
    samples: dict[str, list[float]]

    def share_of(self, limits: Roofline) -> float:
        """Of the read bandwidth for decode, of the bf16 matrix peak for prefill."""
        if self.flops is not None:
            return self.flops / self.seconds / limits.bf16_flops
        assert self.read_bytes is not None
        return self.read_bytes / self.seconds / limits.read_bytes_per_s

    @property
    def ratio(self) -> float | None:
        return None if self.peer_seconds is None else self.peer_seconds / self.seconds


class Report(msgspec.Struct, frozen=True, kw_only=True):
    job: Job
    machine: Machine
    load: Load
    roofline: Roofline
    results: list[Result]


def run(job: Job) -> Report:
    load = LoadMeter()
    limits = measure_roofline(job.device, quick=job.quick)
    path = resolve(job.model)
    peers = _peers(path, job)
    make = partial(Ours, path, job.device, pool_tokens=_pool_tokens(job), max_step_tokens=max(job.prompts), max_sequences=max(job.batches))
    ours = {_OURS: make()} | ({_INT8: make(weights="int8")} if job.int8 else {})
    spec = ours[_OURS].spec
    results: list[Result] = []
    if job.prefill:
        chunked = Ours(path, job.device, pool_tokens=max(job.prompts) + BLOCK_SIZE, max_step_tokens=job.chunk, max_sequences=1)
        for prompt in job.prompts:
            results += measure_prefill(job, {**ours, _CHUNKED: chunked, **peers}, spec, prompt)
        del chunked
    if job.decode:
        for batch, context in product(job.batches, job.contexts):
            results += measure_decode(job, {**ours, **_able(peers, job, batch * context)}, spec, batch, context)
    limits = better(limits, measure_roofline(job.device, quick=job.quick))
    return Report(job=job, machine=describe_machine(), load=load.read(), roofline=limits, results=results)


def _peers(path: str, job: Job) -> dict[str, Contender]:
    if not job.against:
        return {}
    shared = Transformers(path, job.device)
    return {attention: TransformersBy(shared, attention) for attention in ATTENTIONS}


def _pool_tokens(job: Job) -> int:
    prefilling = max(job.prompts) + BLOCK_SIZE
    decoding = max(job.batches) * (max(job.contexts) + job.steps + 2 * BLOCK_SIZE)
    return max(prefilling, decoding) if job.decode else prefilling


def _able(peers: dict[str, Contender], job: Job, num_tokens: int) -> dict[str, Contender]:
    return peers if job.against_tokens is None or num_tokens <= job.against_tokens else {}


def measure_prefill(job: Job, contenders: dict[str, Contender], spec: ModelSpec, num_tokens: int) -> list[Result]:
    """The whole prompt in one step, and in chunks; against transformers' whole prompt."""
    draw = random.Random(0)

    def prefill(contender: Contender) -> float:
        prompt = [draw.randrange(1, spec.vocab_size) for _ in range(num_tokens)]  # each anew: nothing may be cached
        return _timed(partial(contender.prefill, prompt))

    measures: dict[str, Callable[[], float]] = {name: partial(prefill, contender) for name, contender in contenders.items()}
    found = interleaved(_worthwhile(measures), job.repeats)

    def result(work: str, name: str) -> Result:
        seconds, peer = medians(found)[name], _better_peer(found)
        return Result(
            work=work,
            batch=1,
            num_tokens=num_tokens,
            seconds=seconds,
            tokens_per_s=num_tokens / seconds,
            read_bytes=None,
            flops=prefill_flops(spec, num_tokens),
            peer=peer,
            peer_seconds=None if peer is None else medians(found)[peer],
            samples=found,
        )

    works = {_OURS: "prefill, whole", _INT8: "prefill, whole, int8", _CHUNKED: f"prefill, chunks of {job.chunk}"}
    return [result(work, name) for name, work in works.items() if name in found]


def measure_decode(job: Job, contenders: dict[str, Contender], spec: ModelSpec, batch: int, context: int) -> list[Result]:
    """Steps of `batch` sequences, the first of each turn left out."""

    def decode(contender: Contender, steps: int) -> float:
        contender.begin(batch, context, steps + 1)
        contender.step()
        seconds = _timed(partial(_steps, contender, steps))
        contender.end()
        return seconds / steps

    warm = _worthwhile({name: partial(decode, contender, 1) for name, contender in contenders.items()})
    found = interleaved({name: partial(decode, contenders[name], job.steps) for name in warm}, job.repeats)

    def result(work: str, name: str, weights: Weights) -> Result:
        seconds, peer = medians(found)[name], _better_peer(found)
        return Result(
            work=work,
            batch=batch,
            num_tokens=context,
            seconds=seconds,
            tokens_per_s=batch / seconds,
            read_bytes=decode_bytes(spec, weights, batch, context + job.steps / 2),
            flops=None,
            peer=peer,
            peer_seconds=None if peer is None else medians(found)[peer],
            samples=found,
        )

    works: dict[str, tuple[str, Weights]] = {_OURS: ("decode", "auto"), _INT8: ("decode, int8", "int8")}
    return [result(work, name, weights) for name, (work, weights) in works.items() if name in found]


def _worthwhile(measures: dict[str, Callable[[], float]]) -> dict[str, Callable[[], float]]:
    """Leaves out a mode of transformers that, once warm, its other one puts to shame, or that has not the memory."""
    cold = {name: measure for name, measure in measures.items() if _if_it_fits(name, measure) is not None}
    warm = {name: measure() for name, measure in cold.items()}
    best = min((warm[name] for name in ATTENTIONS if name in warm), default=0.0)
    return {name: measures[name] for name, seconds in warm.items() if name not in ATTENTIONS or seconds <= _HOPELESS * best}


def _if_it_fits(name: str, measure: Callable[[], float]) -> float | None:
    """None where transformers' scores of a whole prompt do not fit the device beside the weights."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        if name not in ATTENTIONS:
            raise
    torch.cuda.empty_cache()
    return None


def _better_peer(found: dict[str, list[float]]) -> str | None:
    middle = medians(found)
    return min((name for name in ATTENTIONS if name in middle), key=lambda name: middle[name], default=None)


def _steps(contender: Contender, count: int) -> None:
    for _ in range(count):
        contender.step()


def _timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


# ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────────────


def tables(report: Report) -> list[Table]:
    rows = [
        (
            f"{one.work}, {one.num_tokens:,} tokens" if one.flops else f"{one.work}, batch {one.batch}, context {one.num_tokens:,}",
            f"{one.seconds * 1e3:.2f}",
            f"{one.tokens_per_s:,.0f}",
            f"{one.share_of(report.roofline):.0%}",
            "–" if one.peer_seconds is None else f"{one.peer_seconds * 1e3:.2f} ({one.peer})",
            "–" if one.ratio is None else f"{one.ratio:.2f}×",
        )
        for one in report.results
    ]
    return [Table("Against transformers", ("work", "ours ms", "ours tok/s", "of roofline", "transformers ms", "ratio"), tuple(rows))]


def notes(report: Report) -> list[str]:
    limits = report.roofline
    return [
        f"roofline in this run: {limits.read_bytes_per_s / 1e9:.1f} GB/s read, {limits.bf16_flops / 1e12:.3f} TFLOP/s bf16",
        f"medians of {report.job.repeats}, by turns; decode over {report.job.steps} steps a turn",
        "transformers: the better of eager and sdpa",
    ]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--model", default="S", show_default=True, help="A shape (S, P, M, L), builtin:tiny, or a Hugging Face directory.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="OpenMP threads, of both.")
@click.option(
    "--prompt", "prompts", type=click.IntRange(min=64), multiple=True, help="Tokens to prefill; may be given again.  [default: 2048]"
)
@click.option("--chunk", type=click.IntRange(min=64), default=512, show_default=True, help="The step budget of the chunked prefill.")
@click.option(
    "--context",
    "contexts",
    type=click.IntRange(min=1),
    multiple=True,
    help="Tokens before the decode steps; may be given again.  [default: 1024 for M, else 2048]",
)
@click.option(
    "--batch", "batches", type=click.IntRange(min=1), multiple=True, help="Sequences at once; may be given again.  [default: 1, 8, 32]"
)
@click.option("--steps", type=click.IntRange(min=1), default=8, show_default=True, help="Decode steps in each turn.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Turns; figures are their medians.")
@click.option("--against/--alone", default=True, show_default=True, help="Measure transformers too.")
@click.option("--against-tokens", type=click.IntRange(min=1), help="Leave transformers out where batch × context is more: it wants memory.")
@click.option("--weights", type=click.Choice(["auto", "int8"]), default="auto", show_default=True, help="int8: ours with these, too.")
@click.option("--only", type=click.Choice(["prefill", "decode"]), help="One of the two.")
@click.option("--quick", is_flag=True, help="The built-in model, short: shows that it runs, not how fast.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write figures and samples here.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Append the section to this file.")
def main(
    model: str,
    device: str,
    threads: int,
    prompts: tuple[int, ...],
    chunk: int,
    contexts: tuple[int, ...],
    batches: tuple[int, ...],
    steps: int,
    repeats: int,
    against: bool,
    against_tokens: int | None,
    weights: str,
    only: str | None,
    quick: bool,
    json_path: Path | None,
    markdown: Path | None,
) -> None:
    """Measure our engine against transformers, and against what this machine can do.

    Both have the same weights in bfloat16, process, threads, malloc and OpenMP settings, and take turns; transformers is
    run with eager and with sdpa attention, and its better mode counts. Use --threads 1 and --threads 2 in runs of their own.
    """
    if weights == "int8" and device != "cpu":
        raise click.UsageError("--weights int8 is for --device cpu so far")
    measure_as_nodes_do(threads)
    torch.set_grad_enabled(False)
    job = Job(
        model=model,
        device=device,
        threads=threads,
        prompts=prompts or (2048,),
        chunk=chunk,
        contexts=contexts or (1024 if model == "M" else 2048,),
        batches=batches or (1, 8, 32),
        steps=steps,
        repeats=repeats,
        against=against,
        against_tokens=against_tokens,
        int8=weights == "int8",
        prefill=only != "decode",
        decode=only != "prefill",
        quick=quick,
    )
    if quick:
        job = msgspec.structs.replace(job, model=BUILTIN, prompts=(256,), chunk=64, contexts=(128,), batches=(1, 4), steps=2, repeats=2)
    report = run(job)
    title = f"Engine: {Path(job.model).name}, {job.device}, {job.threads} thread{'s' * (job.threads > 1)}"
    show(section(title, report.machine, report.load, tables(report), notes(report)), markdown)
    write_json(json_path, report)


if __name__ == "__main__":
    main()
