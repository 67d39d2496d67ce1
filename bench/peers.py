"""Our servers against those that users would take instead, by turns: see --help."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click
import msgspec
from client import Target
from machine import Load, LoadMeter, Machine, describe_machine, together, trees_cpu_s
from models import BUILTIN, SHAPES, resolve
from peer_servers import CONCURRENCY, Contender, Served, contenders
from report import Table, section, show, write_json
from serve import Job, Prompts, Slo, Summary, warmup_of
from workload import fixed, plan

_MODEL = "P"
_VOCAB_SIZE = 4096
"""Prompts are random ids below this."""
_NUM_WARMUP = 2
_TIMEOUT_S = 600.0
_ANYTHING = Slo(ttft_ms=None, tpot_ms=None, itl_ms=None)


class Trace(msgspec.Struct, frozen=True):
    """A closed loop of equal requests."""

    requests: int
    num_input: int
    num_output: int
    concurrency: int

    def __str__(self) -> str:
        return f"{self.requests} × {self.num_input:,} in / {self.num_output} out, {self.concurrency} at a time"


TRACES = {"single": Trace(3, 512, 128, 1), "c8": Trace(16, 512, 64, CONCURRENCY), "prefill": Trace(6, 3000, 1, 2)}
_QUICK_TRACES = {"single": Trace(1, 64, 16, 1), "c8": Trace(8, 64, 16, CONCURRENCY), "prefill": Trace(2, 300, 1, 2)}


class Metric(msgspec.Struct, frozen=True):
    of: Callable[[Summary], float]
    is_rate: bool = False
    """More is better; else it is a time in milliseconds."""

    def lead(self, ours: float, theirs: float) -> float:
        """How many times better ours is."""
        return ours / theirs if self.is_rate else theirs / ours


_TTFT = Metric(lambda found: found.ttft_ms.p50 if found.ttft_ms else 0.0)
METRICS = {
    "single": {"TTFT ms": _TTFT, "TPOT ms": Metric(lambda found: found.tpot_ms.p50 if found.tpot_ms else 0.0)},
    "c8": {
        "out tokens/s": Metric(lambda found: found.output_tokens_per_s, is_rate=True),
        "TTFT p50 ms": _TTFT,
        "ITL p50 ms": Metric(lambda found: found.itl_ms.p50 if found.itl_ms else 0.0),
        "ITL p99 ms": Metric(lambda found: found.itl_ms.p99 if found.itl_ms else 0.0),
    },
    "prefill": {"in tokens/s": Metric(lambda found: found.input_tokens_per_s, is_rate=True)},
}


class Run(msgspec.Struct, frozen=True):
    """One trace, sent to one server."""

    contender: str
    trace: str
    round: int
    load: Load
    summary: Summary


class Idle(msgspec.Struct, frozen=True):
    contender: str
    round: int
    cores: float
    load: Load


class Report(msgspec.Struct, frozen=True):
    machine: Machine
    runs: list[Run]
    idle: list[Idle]


class Turn(msgspec.Struct, frozen=True):
    """One contender's, in one round, from its start to its end."""

    name: str
    contender: Contender
    round: int
    traces: dict[str, Trace]
    tries: int
    idle_s: float

    def take(self) -> tuple[list[Run], Idle]:
        """Idle time comes last, warm. RuntimeError if the server does not start, ClickException if it does not do what it is asked."""
        with tempfile.TemporaryDirectory() as directory, self.contender.serve(Path(directory)) as served:
            return [self._quietest(trace, served) for trace in self.traces], self._idle(served)

    def _idle(self, served: Served) -> Idle:
        meter, cpu_s = LoadMeter(served.pids), trees_cpu_s(served.pids)
        time.sleep(self.idle_s)
        load = meter.read()
        return Idle(self.name, self.round, (trees_cpu_s(served.pids) - cpu_s) / load.seconds, load)

    def _quietest(self, trace: str, served: Served) -> Run:
        """Again and again while others disturb it, up to `tries` times."""
        runs: list[Run] = []
        while len(runs) < self.tries and not any(run.load.is_quiet for run in runs):
            runs.append(self._measure(trace, served, seed=100 * self.round + len(runs)))
            click.echo(f"round {self.round}, {self.name}, {trace}: {_in_brief(runs[-1])}", err=True)
        return min(runs, key=lambda run: run.load.foreign_cores)

    def _measure(self, trace: str, served: Served, seed: int) -> Run:
        asked = self.traces[trace]
        planned = plan(fixed(asked.requests, asked.num_input, asked.num_output), _VOCAB_SIZE, 1.0, seed)
        prompts = Prompts(model=served.model, tokenizer=None, chat=False, ignore_eos=True, temperature=0.0)
        warmup = prompts.bodies(warmup_of(planned, _NUM_WARMUP, _VOCAB_SIZE))
        job = Job(Target.of(served.url, "completions", None), planned, prompts.bodies(planned), warmup, asked.concurrency, _TIMEOUT_S)
        summary, load = job.run(_ANYTHING, served.pids)
        self._check(asked, summary)
        return Run(self.name, trace, self.round, load, summary)

    def _check(self, asked: Trace, found: Summary) -> None:
        """Every server has computed the same number of tokens, by its own account."""
        expected = (asked.requests * asked.num_input, asked.requests * asked.num_output)
        if found.failed or (found.input_tokens, found.output_tokens) != expected:
            counted = f"{found.input_tokens} tokens in and {found.output_tokens} out instead of {expected[0]} and {expected[1]}"
            raise click.ClickException(f"{self.name}: {counted}; {found.failed} failed {found.errors}")


# ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────────────


def tables(runs: list[Run], idle: list[Idle], everyone: dict[str, Contender], traces: dict[str, Trace]) -> list[Table]:
    shown = [_trace_table(name, trace, runs, everyone) for name, trace in traces.items()]
    cores = {name: [one for one in idle if one.contender == name] for name in everyone}
    rows = [(name, f"{median(one.cores for one in found):.1%}", _quiet([one.load for one in found])) for name, found in cores.items()]
    return [*shown, Table("Idle", ("", "of a core", "quiet"), tuple(rows))]


def _trace_table(trace: str, asked: Trace, runs: list[Run], everyone: dict[str, Contender]) -> Table:
    """A row per contender: the median of its rounds, their range, and how many times better ours is."""
    metrics = METRICS[trace]
    of = {name: [run for run in runs if (run.contender, run.trace) == (name, trace)] for name in everyone}
    rows = []
    for name, contender in everyone.items():
        cells = []
        for metric in metrics.values():
            found = [metric.of(run.summary) for run in of[name]]
            ours = None if contender.against is None else median(metric.of(run.summary) for run in of[contender.against])
            cells += [_spread(found), "" if ours is None else f"{metric.lead(ours, median(found)):.2f}×"]
        rows.append((name, *cells, _quiet([run.load for run in of[name]])))
    header = [cell for metric in metrics for cell in (metric, "ours better")]
    return Table(f"{trace}: {asked}", ("", *header, "quiet"), tuple(rows))


def _spread(found: list[float]) -> str:
    """`16.1 [15.4–16.9]`"""
    digits = 0 if median(found) >= 100 else 1
    middle, low, high = (f"{value:,.{digits}f}" for value in (median(found), min(found), max(found)))
    return f"{middle} [{low}–{high}]"


def _quiet(loads: list[Load]) -> str:
    return f"{sum(load.is_quiet for load in loads)} of {len(loads)}"


def _in_brief(run: Run) -> str:
    figures = [f"{name} {metric.of(run.summary):,.1f}" for name, metric in METRICS[run.trace].items()]
    return f"{', '.join(figures)}; {run.load}"


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--vllm", type=_FILE, metavar="PYTHON", help="The interpreter of an environment with vLLM's CPU build and NIXL.")
@click.option("--llama-server", type=_FILE, help="llama.cpp's server.")
@click.option("--gguf", type=_FILE, help="The same model for it.")
@click.option("--model", default=_MODEL, show_default=True, help=f"{', '.join(SHAPES)}, or a directory.")
@click.option("--contender", "names", multiple=True, help="Only these, and ours that they are compared with.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Turns of each.")
@click.option(
    "--tries", type=click.IntRange(min=1), default=3, show_default=True, help="Of a trace that others disturb: the quietest counts."
)
@click.option("--idle", "idle_s", type=click.FloatRange(min=1), default=20.0, show_default=True, metavar="S", help="Of each turn.")
@click.option("--quick", is_flag=True, help="One round of short requests to the built-in model, unless --model is given.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write every run here.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Append the section to this file.")
def main(
    vllm: Path | None,
    llama_server: Path | None,
    gguf: Path | None,
    model: str,
    names: tuple[str, ...],
    rounds: int,
    tries: int,
    idle_s: float,
    quick: bool,
    json_path: Path | None,
    markdown: Path | None,
) -> None:
    """Run the same three traces against our servers and others, each started, measured and ended in turn, round by round.

    \b
      single   3 × 512 in / 128 out, one at a time: TTFT, TPOT
      c8       16 × 512 in / 64 out, 8 at a time: tokens/s, TTFT, ITL
      prefill  6 × 3,000 in / 1 out, 2 at a time: tokens/s

    Two threads for those in one process, a core each for 1P1D. Prompts are the same token ids for all, and new in every run.
    """
    if (llama_server is None) != (gguf is None):
        raise click.UsageError("--llama-server and --gguf want each other")
    everyone = _chosen(contenders(resolve(BUILTIN if quick and model == _MODEL else model), vllm, llama_server, gguf), names)
    traces = _QUICK_TRACES if quick else TRACES
    runs: list[Run] = []
    idle: list[Idle] = []
    for round_number in range(1, 2 if quick else rounds + 1):
        for name, contender in everyone.items():
            measured, rested = Turn(name, contender, round_number, traces, tries, idle_s).take()
            runs += measured
            idle.append(rested)
            write_json(json_path, Report(describe_machine(), runs, idle))
    notes = [f"medians [range] of {len(idle) // len(everyone)} rounds by turns; of a disturbed trace, the quietest of {tries} tries"]
    show(section("Peers", describe_machine(), together([run.load for run in runs]), tables(runs, idle, everyone, traces), notes), markdown)


def _chosen(everyone: dict[str, Contender], names: tuple[str, ...]) -> dict[str, Contender]:
    """Those named, and those that they are compared with; all where none is. Raises UsageError."""
    if unknown := set(names) - set(everyone):
        raise click.UsageError(f"no contender {', '.join(sorted(unknown))}; the options given bring {', '.join(everyone)}")
    wanted = set(names or everyone)
    wanted |= {against for name in wanted if (against := everyone[name].against) is not None}
    return {name: contender for name, contender in everyone.items() if name in wanted}


if __name__ == "__main__":
    main()
