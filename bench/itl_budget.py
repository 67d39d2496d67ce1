"""Inter-token latency of streams while prompts are prefilled beside them on the same engine, under `itl_target_ms`: see --help."""

import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click
import msgspec
import torch
from machine import Load, LoadMeter, Machine, describe_machine, measure_as_nodes_do
from models import BUILTIN, resolve
from report import Table, section, show, write_json
from samples import percentile

from disaggd.engine.build import build_engine
from disaggd.engine.engine import Engine
from disaggd.engine.scheduler import StepPlan
from disaggd.engine.self_measurement import measure_steps
from disaggd.engine.sequence import Sequence
from disaggd.engine.step_cost import load_of
from disaggd.ids import SeqId
from disaggd.model.directory import open_directory
from disaggd.model.spec import Dtype
from disaggd.sampling import SamplingParams
from disaggd.transfer.layout import kv_spec

BLOCK_SIZE = 64
LIMIT = 1.3
"""The 99th percentile may be so many times the target."""
STRETCH = 256
"""Steps are told apart by how far the prompt has come, in stretches of so many tokens."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure."""

    model: str
    dtype: Dtype
    device: str
    threads: int
    streams: int
    context: int
    prompt: int
    prompts: int
    times_bare: float
    """The target, in bare steps."""
    processor_time: bool
    """Seconds are the process's processor time over its threads, here and in the engine."""

    @property
    def clock(self) -> Callable[[], float]:
        return (lambda: time.process_time() / self.threads) if self.processor_time else time.perf_counter


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One step beside the streams, as long as a prompt is prefilled."""

    start: int
    """Tokens of the prompt that were computed before."""
    tokens: int
    """Of the prompt, in this step."""
    predicted_s: float
    seconds: float


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One setting. Seconds."""

    setting: str
    target_s: float
    steps: list[Step]
    """All while prompts were prefilled: between two deliveries to each stream lies one."""
    ttft_s: list[float]

    def itl_s(self, share: float) -> float:
        """A percentile."""
        return percentile(sorted(step.seconds for step in self.steps), share)


class Report(msgspec.Struct, frozen=True, kw_only=True):
    job: Job
    machine: Machine
    load: Load
    bare_s: float
    results: list[Result]


class Streams:
    """An engine with streams that decode for as long as they are needed."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._names = itertools.count()
        self._draw = random.Random(0)
        path = resolve(job.model)
        self._vocab_size = open_directory(path).spec(job.dtype).vocab_size
        self.engine = _engine(path, job)
        measure_steps(self.engine, time.perf_counter)
        self._clock = job.clock
        self._launched: tuple[StepPlan, float] | None = None
        """The plan of the last step, and the seconds that were predicted for it."""
        self._room = self.engine.context_limit - job.context - 1

    def begin(self) -> None:
        for _ in range(self._job.streams):
            self._add(self._job.context, self._room)
        while self.engine.load().prefills:
            self.engine.step()

    def end(self) -> None:
        for sequence in list(self.engine.sequences.values()):
            self.engine.abort(sequence)
        self.engine.pool.clear()

    def bare_step_s(self, count: int) -> float:
        """The median of `count` steps of decodes only."""
        return median(self._step_s() for _ in range(count))

    def prefill_beside(self) -> list[Step]:
        """One prompt: the steps until its first token."""
        prompt = self._add(self._job.prompt, 1)
        steps: list[Step] = []
        while not prompt.is_finished:
            start, seconds = prompt.num_computed, self._step_s()
            assert self._launched is not None, "the streams decode in every step"
            plan, predicted_s = self._launched
            steps.append(Step(start=start, tokens=load_of(plan).prefill_tokens, predicted_s=predicted_s, seconds=seconds))
        return steps

    def _step_s(self) -> float:
        began = self._clock()
        self.engine.step(self._layers_done)
        return self._clock() - began

    def _layers_done(self, plan: StepPlan, layers: range) -> None:
        if not layers.start:
            self._launched = plan, self.engine.pace.predict(plan) or 0.0

    def _add(self, num_tokens: int, max_tokens: int) -> Sequence:
        tokens = [self._draw.randrange(1, self._vocab_size) for _ in range(num_tokens)]  # each anew: nothing may be cached
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        sequence = Sequence(SeqId(str(next(self._names))), tokens, sampling, num_prompt_tokens=num_tokens)
        self.engine.add(sequence)
        return sequence


def _engine(path: str, job: Job) -> Engine:
    layout = kv_spec(open_directory(path).spec(job.dtype), BLOCK_SIZE)
    longest = 2 * (job.context + job.prompt) + 4096
    num_blocks = job.streams * layout.blocks_for(longest) + 2 * layout.blocks_for(job.prompt)
    return build_engine(
        path,
        dtype=job.dtype,
        device=job.device,
        kv_cache_bytes=num_blocks * layout.bytes_per_block,
        block_size=BLOCK_SIZE,
        max_step_tokens=512,
        max_sequences=job.streams + 8,
        max_model_len=min(longest, open_directory(path).spec(job.dtype).max_position_embeddings),
        clock=job.clock,
    ).engine


def run(job: Job) -> Report:
    load = LoadMeter()
    streams = Streams(job)
    streams.begin()
    bare_s = streams.bare_step_s(40)
    streams.end()
    results = [_measure(streams, job, setting, bare_s, target) for setting, target in (("no target", None), ("target", job.times_bare))]
    return Report(job=job, machine=describe_machine(), load=load.read(), bare_s=bare_s, results=results)


def _measure(streams: Streams, job: Job, setting: str, bare_s: float, times_bare: float | None) -> Result:
    """Prompts one after another, some bare steps between them."""
    streams.engine.pace.itl_target_s = None if times_bare is None else times_bare * bare_s
    streams.begin()
    prompts: list[list[Step]] = []
    for _ in range(job.prompts):
        streams.bare_step_s(8)
        prompts.append(streams.prefill_beside())
    streams.end()
    ttft_s = sorted(sum(step.seconds for step in steps) for steps in prompts)
    return Result(setting=setting, target_s=job.times_bare * bare_s, steps=list(itertools.chain(*prompts)), ttft_s=ttft_s)


def tables(report: Report) -> list[Table]:
    rows = [
        (
            one.setting,
            *(f"{one.itl_s(share) / one.target_s:.2f}" for share in (50, 99, 100)),
            f"{one.itl_s(99) * 1e3:.1f}",
            f"{median(one.ttft_s) * 1e3:.0f}",
            f"{len(one.steps)}",
        )
        for one in report.results
    ]
    header = ("setting", "p50 / target", "p99 / target", "max / target", "p99 ms", "TTFT p50 ms", "steps")
    return [Table("Steps while a prompt is prefilled beside the streams", header, tuple(rows)), _composition(report)]


def _composition(report: Report) -> Table:
    """What the steps carried as the prompts went on, and what the engine had thought that they take."""
    rows = []
    for one in report.results:
        for stretch, steps in itertools.groupby(sorted(one.steps, key=lambda step: step.start), lambda step: step.start // STRETCH):
            group = list(steps)
            tokens, seconds = [step.tokens for step in group], [step.seconds for step in group]
            rows.append(
                (
                    one.setting,
                    f"from {stretch * STRETCH} on",
                    f"{len(group)}",
                    f"{median(tokens):.0f} ({min(tokens)} to {max(tokens)})",
                    f"{median(step.predicted_s for step in group) * 1e3:.1f}",
                    f"{median(seconds) * 1e3:.1f}",
                    f"{max(seconds) * 1e3:.1f}",
                )
            )
    header = ("setting", "prompt's tokens", "steps", "of it a step, p50 (all)", "predicted ms p50", "took ms p50", "longest ms")
    return Table("What the steps carried", header, tuple(rows))


def notes(report: Report) -> list[str]:
    job, target_ms = report.job, report.job.times_bare * report.bare_s * 1e3
    p99 = report.results[-1].itl_s(99) * 1e3 / target_ms
    clock = ["in processor time over the threads, by which the engine sized its steps, too"] if job.processor_time else []
    return [
        *clock,
        f"{job.streams} streams at context {job.context}; a bare step takes {report.bare_s * 1e3:.1f} ms, the target is {target_ms:.1f} ms",
        f"{job.prompts} prompts of {job.prompt} tokens, one after another, in steps of at most 512 tokens",
        f"p99 is {p99:.2f} times the target: {'within' if p99 <= LIMIT else 'OVER'} the {LIMIT} that it may be",
    ]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--model", default="S", show_default=True, help="A shape (S, P, M, L), builtin:tiny, or a Hugging Face directory.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="float32 where a CPU has no bf16.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="OpenMP threads.")
@click.option("--prompts", type=click.IntRange(min=1), default=20, show_default=True, help="How many, one after another.")
@click.option("--processor-time", is_flag=True, help="Instead of wall time, for a busy host: the process's, over its threads.")
@click.option("--quick", is_flag=True, help="The built-in model, short: shows that it runs, not how fast.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write figures and samples here.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Append the section to this file.")
def main(
    model: str,
    dtype: Dtype,
    device: str,
    threads: int,
    prompts: int,
    processor_time: bool,
    quick: bool,
    json_path: Path | None,
    markdown: Path | None,
) -> None:
    """Decode 8 streams while 1,024-token prompts are prefilled beside them, with and without an ITL target of twice the bare step."""
    measure_as_nodes_do(threads)
    torch.set_grad_enabled(False)
    job = Job(
        model=BUILTIN if quick else model,
        dtype="float32" if quick else dtype,
        device=device,
        threads=threads,
        streams=8,
        context=128 if quick else 512,
        prompt=256 if quick else 1024,
        prompts=2 if quick else prompts,
        times_bare=2.0,
        processor_time=processor_time,
    )
    report = run(job)
    title = f"ITL budget: {Path(job.model).name}, {job.dtype}, {job.device}, {job.threads} thread{'s' * (job.threads > 1)}"
    show(section(title, report.machine, report.load, tables(report), notes(report)), markdown)
    write_json(json_path, report)


if __name__ == "__main__":
    main()
