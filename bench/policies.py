"""Which policy keeps the most requests within their targets? Two traces mixed, replayed under each by turns: see --help."""

import asyncio
import contextlib
import itertools
import os
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median

import click
import msgspec
import uvloop
from client import Outcome, Target
from cluster import Fields, Running, apart, config_text, one_each, running, split
from machine import Load, LoadMeter, Machine, describe_machine, together
from models import BUILTIN, resolve
from namespaces import limit, linked, reachable
from report import Table, section, show, write_json
from samples import percentile, spread
from serve import Prompts, Slo, closed_loop, open_loop
from workload import fixed, plan

from disaggd.observe.receipts import Receipt
from disaggd.simulator.traces import Lengths, Scale, read_trace

MAX_STEP_TOKENS = 2048
MAX_SEQUENCES = 32
_VOCAB_SIZE = 4096
_TIMEOUT_S = 300.0
_TTFT_PREFILLS = 4.0
"""Unless it is said: the first token may take so many times the prefill of a middling prompt,"""
_ITL_STEPS = 5.0
"""and every other one so many times the step of eight decodes."""
_FAST = "10gbit"
_NUM_WARMUP = 4
_IN_A_ROW = 10
"""Requests, by whose median a break-even has moved for good: it differs from one to the next with what runs and waits."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    dtype: str
    seconds: float
    seeds: int
    length_scale: float
    max_input: int
    max_output: int
    load: float
    """Requests come so often that the prefill node would be busy for this part of the time if it got them all."""
    slow_rate: str | None
    """Of the link between the nodes, from the middle of each replay on."""


class Policy(msgspec.Struct, frozen=True):
    name: str
    fields: Fields
    """Of `[disaggregation]`."""


POLICIES = (
    Policy("always", {"policy": "always"}),
    Policy("never", {"policy": "never"}),
    *(Policy(f"threshold {size}", {"policy": "threshold", "max_local_prefill_tokens": size}) for size in (128, 256, 512, 1024, 2048)),
    Policy("adaptive", {"policy": "adaptive"}),
)


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """What this machine does in a second, and what is therefore asked of it."""

    prefill_tokens_per_s: float
    step_ms: float
    """Of eight decodes."""
    rate: float
    """Requests a second."""
    slo: Slo


class Part(msgspec.Struct, frozen=True):
    """Some requests of a replay."""

    requests: int
    good: int
    remote: int

    @property
    def good_share(self) -> float:
        return self.good / self.requests if self.requests else 0.0


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """One policy, one seed."""

    policy: str
    seed: int
    slowed_s: float
    """When the link slowed down, if it did: in the middle."""
    whole: Part
    after: Part
    """The requests that came in the second half."""
    failed: list[str]
    ttft_ms: list[float]
    itl_ms: list[float]
    breakeven: list[tuple[float, int]]
    """For every request that knew it: when it came, in seconds, and from how many uncached tokens on a prefill elsewhere cost less."""
    errors: list[float]
    """Of the predicted times to the first token, as parts of the true ones; none where nothing is predicted."""
    load: Load

    @property
    def before(self) -> Part:
        whole, after = self.whole, self.after
        return Part(whole.requests - after.requests, whole.good - after.good, whole.remote - after.remote)


class Report(msgspec.Struct, frozen=True):
    job: Job
    machine: Machine
    pace: Pace
    replays: list[Replay]


# ── traffic ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Traffic(msgspec.Struct, frozen=True):
    """Two traces, of which every seed gets another stretch."""

    traces: tuple[list[Lengths], ...]

    def stretch(self, seed: int, rate: float, seconds: float) -> list[Lengths]:
        """As many requests of each trace, as bursty as they came, but `rate` a second together."""
        count = max(1, round(rate * seconds / len(self.traces)))
        parts = [_stretch(rows, seed, count, seconds) for rows in self.traces]
        return sorted(itertools.chain(*parts), key=lambda row: row.arrival_s)

    @property
    def mean_input(self) -> float:
        return mean(mean(row.num_input for row in rows) for rows in self.traces)


def _stretch(rows: list[Lengths], seed: int, count: int, seconds: float) -> list[Lengths]:
    first = seed * count % max(1, len(rows) - count)
    found = rows[first : first + count]
    began_s, took_s = found[0].arrival_s, found[-1].arrival_s - found[0].arrival_s
    factor = seconds / took_s if took_s else 0.0
    return [msgspec.structs.replace(row, arrival_s=(row.arrival_s - began_s) * factor) for row in found]


def made_up(count: int) -> list[Lengths]:
    """For those who have no trace at hand: short and long prompts in turn."""
    return [Lengths(arrival_s=float(i), num_input=(40, 300, 90, 700)[i % 4], num_output=(12, 4)[i % 2]) for i in range(count)]


# ── a replay ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Bench(msgspec.Struct, frozen=True):
    job: Job
    path: str
    cpus: tuple[int, ...]
    traffic: Traffic

    @contextlib.contextmanager
    def cluster(self, policy: Policy, targets: Fields) -> Iterator[tuple[Running, Callable[[str], None] | None]]:
        """1P1D under a policy, and what sets the rate of the link between its nodes; None where they share loopback."""
        with contextlib.ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            config = directory / "config.toml"
            nodes = one_each(self.cpus, kv_cache="1GiB", max_step_tokens=MAX_STEP_TOKENS, max_sequences=MAX_SEQUENCES)
            tables: dict[str, Fields] = {
                "model": {"path": self.path, "name": "served", "dtype": self.job.dtype},
                "disaggregation": {**policy.fields, **targets},
                "router": {"receipts": 10_000},
            }
            if self.job.slow_rate is None:
                config.write_text(config_text(nodes, **tables))
                yield stack.enter_context(running(config, directory / "cluster.log")), None
                return
            namespaces = stack.enter_context(linked(_FAST))
            prefill, decode = stack.enter_context(reachable(namespaces))
            cluster = stack.enter_context(apart(nodes, tables, {"prefill": prefill, "decode": decode}, directory))
            yield cluster, partial(limit, namespaces)

    def measure_pace(self, slo: tuple[float | None, float | None], rate: float | None) -> Pace:
        """Alone on the machine: prompts of a middling length elsewhere, then eight streams."""
        size = round(self.traffic.mean_input)
        with self.cluster(POLICIES[0], {}) as (cluster, _):
            client = Client(cluster)
            client.closed(fixed(2, size, 2), 1, seed=-1)
            prefill_s = median(map(_prefill_ms, cluster.receipts(client.closed(fixed(3, size, 2), 1, seed=-2)))) / 1e3
            streams = client.closed(fixed(8, 32, 48), 8, seed=-3)
        step_ms = median(gap for one in streams for gap in one.gaps_s) * 1e3
        ttft_ms = slo[0] or _rounded(_TTFT_PREFILLS * prefill_s * 1e3)
        itl_ms = slo[1] or _rounded(_ITL_STEPS * step_ms)
        return Pace(
            prefill_tokens_per_s=size / prefill_s,
            step_ms=step_ms,
            rate=rate or self.job.load / prefill_s,
            slo=Slo(ttft_ms=ttft_ms, tpot_ms=None, itl_ms=itl_ms),
        )

    def replay(self, policy: Policy, seed: int, pace: Pace) -> Replay:
        rows = self.traffic.stretch(seed, pace.rate, self.job.seconds)
        targets = {"ttft_target_ms": pace.slo.ttft_ms, "itl_target_ms": pace.slo.itl_ms}
        with self.cluster(policy, targets) as (cluster, set_rate):
            client = Client(cluster)
            client.closed(rows[:_NUM_WARMUP], 1, seed=-1)
            meter = LoadMeter(cluster.pids)
            outcomes = client.open(rows, seed, None if set_rate is None else partial(self._slow_down, set_rate))
            load = meter.read()
            receipts = cluster.receipts(outcomes)
        pairs = list(zip(outcomes, receipts, strict=True))
        began_s = min(one.due_s for one in outcomes)
        middle_s = began_s + self.job.seconds / 2
        return Replay(
            policy=policy.name,
            seed=seed,
            slowed_s=self.job.seconds / 2,
            whole=_part(pairs, pace.slo),
            after=_part([pair for pair in pairs if pair[0].due_s >= middle_s], pace.slo),
            failed=[one.error for one in outcomes if one.error is not None],
            ttft_ms=[one.ttft_s * 1e3 for one in outcomes if one.error is None],
            itl_ms=[gap * 1e3 for one in outcomes if one.error is None for gap in one.gaps_s],
            breakeven=[(outcome.due_s - began_s, tokens) for outcome, receipt in pairs if (tokens := _breakeven(receipt)) is not None],
            errors=[one.prediction_error for one in receipts if one is not None and one.prediction_error is not None],
            load=load,
        )

    async def _slow_down(self, set_rate: Callable[[str], None]) -> None:
        await asyncio.sleep(self.job.seconds / 2)
        assert self.job.slow_rate is not None, "only a link that slows down can be set"
        await asyncio.to_thread(set_rate, self.job.slow_rate)


def _part(pairs: Iterable[tuple[Outcome, Receipt | None]], slo: Slo) -> Part:
    pairs = list(pairs)
    remote = sum(receipt is not None and receipt.decision == "remote" for _, receipt in pairs)
    return Part(requests=len(pairs), good=sum(slo.is_met(outcome) for outcome, _ in pairs), remote=remote)


def _breakeven(receipt: Receipt | None) -> int | None:
    return None if receipt is None or receipt.predicted is None else receipt.predicted.breakeven_tokens


def _prefill_ms(receipt: Receipt | None) -> float:
    assert receipt is not None and receipt.spans_ms.prefill is not None, "a request that ended well was prefilled"
    return receipt.spans_ms.prefill


def _rounded(milliseconds: float) -> float:
    """To two digits: a target that people could have set."""
    return float(f"{milliseconds:.2g}")


class Client:
    """This process, towards one cluster."""

    def __init__(self, cluster: Running) -> None:
        self._target = Target.of(cluster.url, "completions", None)
        self._prompts = Prompts(model=cluster.model, tokenizer=None, chat=False, ignore_eos=True, temperature=0.0)

    def closed(self, rows: Sequence[Lengths], concurrency: int, seed: int) -> list[Outcome]:
        """RuntimeError if one fails."""
        requests = [(self._target, body) for body in self._bodies(rows, seed)]
        outcomes: list[Outcome] = uvloop.run(closed_loop(requests, concurrency, _TIMEOUT_S))
        if failed := [one.error for one in outcomes if one.error is not None]:
            raise RuntimeError(f"{len(failed)} of {len(outcomes)} requests failed: {failed[0]}")
        return outcomes

    def open(self, rows: Sequence[Lengths], seed: int, meanwhile: Callable[[], Awaitable[None]] | None) -> list[Outcome]:
        """Every row at its time; what fails is among the outcomes."""
        arrivals = [(row.arrival_s, body) for row, body in zip(rows, self._bodies(rows, seed), strict=True)]

        async def replay() -> list[Outcome]:
            other = asyncio.ensure_future(meanwhile()) if meanwhile is not None else None
            outcomes = await open_loop(self._target, arrivals, _TIMEOUT_S)
            if other is not None:
                await other
            return outcomes

        return uvloop.run(replay())

    def _bodies(self, rows: Sequence[Lengths], seed: int) -> list[bytes]:
        return self._prompts.bodies(plan(list(rows), _VOCAB_SIZE, 1.0, seed))


# ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────────────


def table(replays: list[Replay], *, halves: bool) -> Table:
    """A row per policy: means over the seeds, the best of the fixed ones beside it."""
    of = {name: [one for one in replays if one.policy == name] for name in dict.fromkeys(one.policy for one in replays)}
    rows = []
    for name, found in of.items():
        cells = [_percent(_good(found, lambda one: one.whole)), _range([one.whole.good_share for one in found])]
        if halves:
            cells += [_percent(_good(found, lambda one: one.before)), _percent(_good(found, lambda one: one.after))]
        ttft, itl = (sorted(itertools.chain(*parts)) for parts in ([one.ttft_ms for one in found], [one.itl_ms for one in found]))
        cells += [
            f"{percentile(ttft, 50):,.0f}",
            f"{percentile(ttft, 99):,.0f}",
            f"{percentile(itl, 50):,.0f}",
            f"{percentile(itl, 99):,.0f}",
        ]
        cells += [_percent(mean(one.whole.remote / one.whole.requests for one in found)), f"{sum(len(one.failed) for one in found)}"]
        rows.append((name, *cells, f"{sum(one.load.is_quiet for one in found)} of {len(found)}"))
    parts = ("first half", "second half") if halves else ()
    header = ("", "good", "of the seeds", *parts, "TTFT ms p50", "p99", "ITL ms p50", "p99", "remote", "failed", "quiet")
    return Table("Requests that kept their targets", header, tuple(rows))


def verdicts(replays: list[Replay], *, halves: bool) -> list[str]:
    """`adaptive` against the best of the others, of each half where the link changes; how its break-even moved; how well it foretold."""
    mine = [one for one in replays if one.policy == "adaptive"]
    lines = _ranks([one for one in replays if one.policy != "adaptive"], mine, halves=halves)
    if halves:
        lines += [_moved(one) for one in mine]
    if errors := sorted(abs(error) for one in mine for error in one.errors):
        middle, most = percentile(errors, 50), percentile(errors, 90)
        lines.append(f"TTFT foretold: off by {middle:.0%} in the middle, {most:.0%} at p90, of {len(errors)} (asked: ≤ 20 %, ≤ 50 %)")
    elif mine:
        lines.append("TTFT was not foretold: no receipt has a prediction")
    return lines


def _ranks(others: list[Replay], mine: list[Replay], *, halves: bool) -> list[str]:
    if not mine or not others:
        return []
    parts: dict[str, Callable[[Replay], Part]] = {"": lambda one: one.whole}
    if halves:
        parts |= {" of the first half": lambda one: one.before, " of the second half": lambda one: one.after}
    lines = []
    for which, part in parts.items():
        names = {one.policy for one in others}
        best, share = max(((name, _good([one for one in others if one.policy == name], part)) for name in names), key=lambda pair: pair[1])
        ours = _good(mine, part)
        ratio = f"{ours / share:.3f} of it" if share else "nobody kept any"
        lines.append(f"adaptive{which}: {ours:.1%} good; the best fixed policy is {best} with {share:.1%}: {ratio} (asked: ≥ 0.92)")
    return lines


def _moved(replay: Replay) -> str:
    """The break-even in the first half, in the second, and how many requests of the second had come when it was twice what it had been."""
    before = [tokens for at, tokens in replay.breakeven if at < replay.slowed_s]
    after = [tokens for at, tokens in replay.breakeven if at >= replay.slowed_s]
    if not before or not after:
        return f"break-even, seed {replay.seed}: unknown"
    usual = median(before)
    moved = next((i for i, one in enumerate(after) if min(one, median(after[i : i + _IN_A_ROW])) >= 2 * usual), None)
    when = "never twice as many" if moved is None else f"twice as many after {moved} requests (asked: ≤ 20)"
    return f"break-even, seed {replay.seed}: {usual:,.0f} tokens, {median(after):,.0f} in the second half, {when}"


def _good(replays: list[Replay], part: Callable[[Replay], Part]) -> float:
    return mean(part(one).good_share for one in replays)


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _range(shares: list[float]) -> str:
    return f"{min(shares):.0%}–{max(shares):.0%}"


def notes(job: Job, pace: Pace) -> list[str]:
    slo = pace.slo
    return [
        f"targets, set beforehand: TTFT ≤ {slo.ttft_ms:g} ms, every ITL ≤ {slo.itl_ms:g} ms",
        f"{pace.rate:.2f} requests/s for {job.seconds:g} s, {job.seeds} seeds",
        f"lengths × {job.length_scale:g}, at most {job.max_input:,} in and {job.max_output} out",
        f"a core alone prefills {pace.prefill_tokens_per_s:,.0f} tokens/s and takes {pace.step_ms:.0f} ms for a step of 8 decodes",
        *([] if job.slow_rate is None else [f"the link between the nodes: {_FAST}, and {job.slow_rate} from the middle on"]),
    ]


def _brief(replay: Replay) -> str:
    felt = spread(replay.ttft_ms)
    ttft = "" if felt is None else f", TTFT {felt.p50:,.0f} / {felt.p99:,.0f} ms"
    good = f"{replay.whole.good} of {replay.whole.requests} good{ttft}, {replay.whole.remote} remote"
    return f"seed {replay.seed}, {replay.policy}: {good}; {replay.load}"


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────

_TRACE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--trace", "paths", type=_TRACE, multiple=True, help="Azure .csv or Mooncake .jsonl; again for more, mixed one to one.")
@click.option("--model", default="S", show_default=True, help="A shape (S, P, M), builtin:tiny, or a Hugging Face directory.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--seconds", type=click.FloatRange(5, 180), default=50.0, show_default=True, help="Of each replay.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Replays of each policy.")
@click.option(
    "--length-scale", type=click.FloatRange(min=0, min_open=True), default=0.25, show_default=True, help="Multiplies the lengths."
)
@click.option("--max-input", type=click.IntRange(min=2), default=1536, show_default=True, help="Cuts longer prompts.")
@click.option("--max-output", type=click.IntRange(min=2), default=64, show_default=True, help="Cuts longer outputs.")
@click.option(
    "--load", type=click.FloatRange(min=0, min_open=True), default=0.7, show_default=True, help="Of the prefill node, if it got all."
)
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="Requests a second.  [default: what makes this load here]")
@click.option("--ttft-ms", type=click.FloatRange(min=1), help="Target.  [default: 4 × the prefill of a middling prompt]")
@click.option("--itl-ms", type=click.FloatRange(min=1), help="Target of every gap.  [default: 5 × a step of 8 decodes]")
@click.option("--slow-link", "slow_rate", metavar="RATE", help="Nodes in two namespaces (root); from the middle on the link has this rate.")
@click.option("--only", multiple=True, help="Only policies whose names hold this; may be given again.")
@click.option("--quick", is_flag=True, help="Two policies, the built-in model, a made-up trace: shows that it runs.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write every replay here.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Append the section to this file.")
def main(
    paths: tuple[Path, ...],
    model: str,
    dtype: str,
    seconds: float,
    seeds: int,
    length_scale: float,
    max_input: int,
    max_output: int,
    load: float,
    rate: float | None,
    ttft_ms: float | None,
    itl_ms: float | None,
    slow_rate: str | None,
    only: tuple[str, ...],
    quick: bool,
    json_path: Path | None,
    markdown: Path | None,
) -> None:
    """Replay the same mixed traffic under every policy of a prefill and a decode node with a core each, and count who kept their targets.

    First the machine is measured alone; it sets the rate, and the targets, unless they are given. Each seed is another stretch of the
    traces; the policies take turns within it, and each turn is a cluster of its own. A good request has its first token in time, and no
    gap between two others that is longer than its target.
    """
    job = Job(
        model=model,
        dtype=dtype,
        seconds=seconds,
        seeds=seeds,
        length_scale=length_scale,
        max_input=max_input,
        max_output=max_output,
        load=load,
        slow_rate=slow_rate,
    )
    if quick:
        job = Job(
            model=BUILTIN,
            dtype="float32",
            seconds=5.0,
            seeds=1,
            length_scale=1.0,
            max_input=800,
            max_output=16,
            load=0.3,
            slow_rate=slow_rate,
        )
        only, rate = only or ("threshold 256", "adaptive"), rate or 2.0
    elif not paths:
        raise click.UsageError("name the traces with --trace")
    scale = Scale(length=job.length_scale, max_input=job.max_input, max_output=job.max_output)
    cpus = tuple(sorted(os.sched_getaffinity(0)))
    os.sched_setaffinity(0, split(cpus)[0])
    traces = tuple(_with_outputs(read_trace(path, None, scale)) for path in paths) if paths else (made_up(40),)
    bench = Bench(job, resolve(job.model), cpus, Traffic(traces))
    pace = bench.measure_pace((ttft_ms, itl_ms), rate)
    for line in notes(job, pace):
        click.echo(line, err=True)
    replays: list[Replay] = []
    for seed in range(job.seeds):
        for policy in POLICIES:
            if only and not any(part in policy.name for part in only):
                continue
            replays.append(bench.replay(policy, seed, pace))
            click.echo(_brief(replays[-1]), err=True)
            write_json(json_path, Report(job, describe_machine(), pace, replays))
    halves = job.slow_rate is not None
    lines = [*notes(job, pace), *verdicts(replays, halves=halves)]
    show(section("Policies", describe_machine(), together([one.load for one in replays]), [table(replays, halves=halves)], lines), markdown)


def _with_outputs(rows: list[Lengths]) -> list[Lengths]:
    """Two tokens at least: a request of one needs no decode node."""
    return [msgspec.structs.replace(row, num_output=max(2, row.num_output)) for row in rows]


if __name__ == "__main__":
    main()
