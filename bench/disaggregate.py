"""Does disaggregation pay on one machine? Streams that decode while long prompts arrive, by turns in every setting: see --help."""

import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median

import click
import msgspec
from arrivals import Listener, Stream
from client import Target
from cluster import Fields, Running, config_text, one_each, running, split
from machine import Load, LoadMeter, Machine, describe_machine, together
from models import BUILTIN, resolve
from report import Table, section, show, write_json
from samples import Spread, spread

from disaggd.model.directory import open_directory
from disaggd.observe.receipts import Receipt

MAX_SEQUENCES = 16
_LOOK_S = 0.002
_LEAD_S = 0.25
"""Of every period, before its prompt is sent: the streams as they are without one."""
_SETTLED = 16
"""Tokens that each stream has had before the window begins."""
_VOCAB_SIZE = 4096


class Job(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    dtype: str
    streams: int
    context: int
    prompt: int
    output: int
    every_s: float
    prompts: int
    rounds: int

    @property
    def window_s(self) -> float:
        return self.prompts * self.every_s


class Setting(msgspec.Struct, frozen=True):
    """A cluster on this machine's processors."""

    name: str
    policy: str
    nodes: tuple[Fields, ...]
    client_cpus: tuple[int, ...]


class Long(msgspec.Struct, frozen=True):
    """A prompt that came while the others streamed; seconds of the window."""

    sent_s: float
    first_s: float
    ended_s: float


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """One setting's turn."""

    setting: str
    round: int
    seconds: float
    gaps: list[tuple[float, float]]
    """Of all streams, every gap between two tokens that ended in the window: at which second of it, and its milliseconds."""
    longs: list[Long]
    load: Load

    @property
    def itl_ms(self) -> Spread:
        found = spread(gap for _, gap in self.gaps)
        assert found is not None, "no stream had two tokens"
        return found

    @property
    def tokens_per_s(self) -> float:
        """Of the streams alone."""
        return len(self.gaps) / self.seconds

    @property
    def ttft_s(self) -> float:
        return median(one.first_s - one.sent_s for one in self.longs)

    @property
    def num_done(self) -> int:
        return sum(one.ended_s <= self.seconds for one in self.longs)


class Report(msgspec.Struct, frozen=True):
    job: Job
    machine: Machine
    windows: list[Window]


# ── the settings ─────────────────────────────────────────────────────────────────────────────────────────────────────


def settings(job: Job, cpus: tuple[int, ...]) -> list[Setting]:
    """1P1D first, then the co-located ones, prefill whole before prefill in chunks; all on the same processors."""
    whole = job.prompt + 64
    pair = one_each(cpus, max_step_tokens=whole, max_sequences=MAX_SEQUENCES)
    return [
        Setting("1P1D, a core each", "always", pair, split(cpus)[0]),
        _co_located("whole prompts", whole, cpus),
        *(_co_located(f"chunks of {size}", size + MAX_SEQUENCES, cpus) for size in (512, 128) if size < job.prompt),
    ]


def _co_located(how: str, max_step_tokens: int, cpus: tuple[int, ...]) -> Setting:
    """One engine on all processors. What is left of a step's tokens when every sequence has had its own is the chunk."""
    limits = {"max_step_tokens": max_step_tokens, "max_sequences": MAX_SEQUENCES}
    nodes = ({"role": "router", "cpus": cpus}, {"role": "decode", "cpus": cpus, "threads": len(cpus), **limits})
    return Setting(f"co-located, {how}", "never", nodes, cpus)


# ── a turn ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Turn(msgspec.Struct, frozen=True):
    """One setting in one round: its cluster from start to end."""

    job: Job
    setting: Setting
    path: str
    round: int

    def take(self) -> Window:
        """RuntimeError if the cluster does not start, or does not answer everything as it should."""
        os.sched_setaffinity(0, self.setting.client_cpus)
        with tempfile.TemporaryDirectory() as directory:
            config = Path(directory) / "config.toml"
            config.write_text(self._config())
            with running(config, Path(directory) / "cluster.log") as cluster, Listener(_LOOK_S) as listener:
                client = _Client(listener, Target.of(cluster.url, "completions", None), cluster.model, random.Random(self.round))
                return self._measure(client, cluster)

    def _config(self) -> str:
        nodes = [node if node["role"] == "router" else {**node, "kv_cache": "1GiB"} for node in self.setting.nodes]
        model = {"path": self.path, "name": "served", "dtype": self.job.dtype}
        return config_text(nodes, model=model, disaggregation={"policy": self.setting.policy})

    def _measure(self, client: "_Client", cluster: Running) -> Window:
        job = self.job
        client.listen_to_the_end([client.ask(job.prompt, job.output)])  # warms up
        most = open_directory(self.path).spec().max_position_embeddings - job.context
        streams = [client.ask(job.context, most) for _ in range(job.streams)]  # they end when their client leaves, not before
        client.listen(until=lambda: all(len(stream.event_s) >= _SETTLED or not stream.is_open for stream in streams))
        self._check(streams)
        meter, began_s, longs = LoadMeter(cluster.pids), time.time(), []
        for number in range(job.prompts):
            client.listen_until_s(began_s + number * job.every_s + _LEAD_S)
            longs.append(client.ask(job.prompt, job.output))
        client.listen_until_s(began_s + job.window_s)
        load = meter.read()
        client.listen_to_the_end(longs)
        self._check(streams)
        self._check_places([cluster.receipt(long.request_id) for long in longs])
        return Window(
            setting=self.setting.name,
            round=self.round,
            seconds=job.window_s,
            gaps=sorted(gap for stream in streams for gap in _gaps(stream, began_s, job.window_s)),
            longs=[Long(one.sent_s - began_s, one.event_s[0] - began_s, one.event_s[-1] - began_s) for one in longs],
            load=load,
        )

    def _check(self, streams: list[Stream]) -> None:
        """RuntimeError if one of them has ended."""
        for stream in streams:
            if not stream.is_open:
                raise RuntimeError(f"{self.setting.name}: a stream ended after {len(stream.event_s)} events: {stream.head!r}")

    def _check_places(self, receipts: list[Receipt]) -> None:
        """RuntimeError if a prompt was prefilled elsewhere than this setting says."""
        expected = "remote" if self.setting.policy == "always" else "local"
        for receipt in receipts:
            if receipt.decision != expected:
                raise RuntimeError(f"{self.setting.name}: a prompt was prefilled {receipt.decision}: {receipt.reason}")


def _gaps(stream: Stream, began_s: float, seconds: float) -> Iterator[tuple[float, float]]:
    for before, after in pairwise(stream.event_s):
        if 0 <= after - began_s <= seconds:
            yield after - began_s, (after - before) * 1e3


class _Client(msgspec.Struct, frozen=True):
    listener: Listener
    target: Target
    model: str
    draw: random.Random

    def ask(self, num_input: int, num_output: int) -> Stream:
        """Of a prompt like no other."""
        prompt = [self.draw.randrange(1, _VOCAB_SIZE) for _ in range(num_input)]
        fields = {"model": self.model, "prompt": prompt, "max_tokens": num_output}
        body = msgspec.json.encode({**fields, "temperature": 0, "stream": True, "ignore_eos": True})
        return self.listener.open(self.target, body)

    def listen(self, until: Callable[[], bool]) -> None:
        self.listener.listen(until)

    def listen_until_s(self, due_s: float) -> None:
        self.listener.listen(lambda: time.time() >= due_s)

    def listen_to_the_end(self, streams: list[Stream]) -> None:
        """RuntimeError for a reply that is not what was asked for."""
        self.listener.listen(lambda: not any(stream.is_open for stream in streams))
        for stream in streams:
            if not stream.event_s:
                raise RuntimeError(f"no tokens: {stream.head!r}")


# ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────────────


def figures(windows: list[Window]) -> Table:
    """A row per setting: medians of the rounds, and of the worst gap their range."""
    rows = []
    for name, found in _by_setting(windows).items():
        worst = [one.itl_ms.max for one in found]
        rows.append(
            (
                name,
                f"{median(one.itl_ms.p50 for one in found):.1f}",
                f"{median(one.itl_ms.p99 for one in found):.1f}",
                f"{median(worst):,.1f}",
                f"{min(worst):,.0f}–{max(worst):,.0f}",
                f"{median(one.tokens_per_s for one in found):,.0f}",
                f"{median(one.ttft_s for one in found):.2f}",
                f"{sum(one.num_done for one in found)} of {sum(len(one.longs) for one in found)}",
                f"{sum(one.load.is_quiet for one in found)} of {len(found)}",
            )
        )
    header = ("", "ITL ms p50", "p99", "worst", "of the rounds", "streams' tok/s", "TTFT s p50", "prompts done", "quiet")
    return Table("Streams beside long prompts", header, tuple(rows))


class Aim(msgspec.Struct, frozen=True):
    """A figure of which 1P1D should have so much more, or less, than the others."""

    name: str
    asked: str
    ratio: Callable[[Window, Window], float]
    """Of 1P1D's window and another's."""


AIMS = (
    Aim("worst ITL, lower", "≥ 4×", lambda ours, theirs: theirs.itl_ms.max / ours.itl_ms.max),
    Aim("p99 ITL, lower", "> 1×", lambda ours, theirs: theirs.itl_ms.p99 / ours.itl_ms.p99),
    Aim("streams' tokens/s, more", "≥ 1.3×", lambda ours, theirs: ours.tokens_per_s / theirs.tokens_per_s),
    Aim("TTFT p50, longer", "≤ 1.85× whole", lambda ours, theirs: ours.ttft_s / theirs.ttft_s),
)


def ratios(windows: list[Window]) -> Table:
    """1P1D against each of the others: the medians of the rounds' ratios."""
    ours, *others = _by_setting(windows).values()
    rows = []
    for aim in AIMS:
        cells = [f"{median(aim.ratio(one, other) for one, other in zip(ours, theirs, strict=True)):.2f}×" for theirs in others]
        rows.append((aim.name, aim.asked, *cells))
    return Table("1P1D against the same cores co-located", ("", "asked", *(found[0].setting for found in others)), tuple(rows))


def _by_setting(windows: list[Window]) -> dict[str, list[Window]]:
    return {name: [one for one in windows if one.setting == name] for name in dict.fromkeys(one.setting for one in windows)}


def draw(windows: list[Window], title: str, path: Path) -> None:
    """Of each setting the round that is typical by its worst gap."""
    from timeline import Lane, draw_lanes  # noqa: PLC0415  only a picture wants matplotlib

    typical = [sorted(found, key=lambda one: one.itl_ms.max)[len(found) // 2] for found in _by_setting(windows).values()]
    lanes = [Lane(one.setting, one.gaps, [long.sent_s for long in one.longs], [long.first_s for long in one.longs]) for one in typical]
    draw_lanes(lanes, title, path)


def _brief(window: Window) -> str:
    itl = window.itl_ms
    ours = f"ITL {itl.p50:.1f} / {itl.p99:.1f} / {itl.max:,.1f} ms, {window.tokens_per_s:,.0f} tokens/s, TTFT {window.ttft_s:.2f} s"
    return f"round {window.round}, {window.setting}: {ours}; {window.load}"


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--model", default="S", show_default=True, help="A shape (S, P, M), builtin:tiny, or a Hugging Face directory.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--streams", type=click.IntRange(1, MAX_SEQUENCES - 4), default=8, show_default=True, help="That decode all the time.")
@click.option("--context", type=click.IntRange(min=1), default=256, show_default=True, help="Tokens of a stream's prompt; it grows.")
@click.option("--prompt", type=click.IntRange(min=1), default=2048, show_default=True, help="Tokens of a long prompt.")
@click.option("--output", type=click.IntRange(min=2), default=16, show_default=True, help="Tokens that follow it.")
@click.option("--every", "every_s", type=click.FloatRange(min=1), default=3.5, show_default=True, help="Seconds from one to the next.")
@click.option("--prompts", type=click.IntRange(min=1), default=7, show_default=True, help="Long prompts in a window.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Turns of each setting.")
@click.option("--only", multiple=True, help="Only settings whose names hold this; may be given again.")
@click.option("--quick", is_flag=True, help="The built-in model, short: shows that it runs, not how fast.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write every gap here.")
@click.option("--png", type=click.Path(path_type=Path), help="Draw the gaps of a typical round of each setting.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Append the section to this file.")
def main(
    model: str,
    dtype: str,
    streams: int,
    context: int,
    prompt: int,
    output: int,
    every_s: float,
    prompts: int,
    rounds: int,
    only: tuple[str, ...],
    quick: bool,
    json_path: Path | None,
    png: Path | None,
    markdown: Path | None,
) -> None:
    """Measure what long prompts do to streams beside them: one prefill and one decode node with a core each, against one engine on both.

    Every turn starts a cluster, sets its streams going, and sends a long prompt every few seconds; the settings take turns. Times are taken
    at the client's sockets, by the kernel. Streams end when their client leaves, after the window.
    """
    if png is not None and find_spec("matplotlib") is None:
        raise click.UsageError("--png wants matplotlib: pip install -e '.[bench]'")
    job = Job(
        model=model,
        dtype=dtype,
        streams=streams,
        context=context,
        prompt=prompt,
        output=output,
        every_s=every_s,
        prompts=prompts,
        rounds=rounds,
    )
    if quick:
        job = Job(model=BUILTIN, dtype="float32", streams=4, context=32, prompt=384, output=4, every_s=1.0, prompts=2, rounds=1)
    cpus = tuple(sorted(os.sched_getaffinity(0)))
    chosen = [one for one in settings(job, cpus) if not only or any(part in one.name for part in only)]
    windows: list[Window] = []
    for number in range(1, job.rounds + 1):
        for setting in chosen:
            windows.append(Turn(job, setting, resolve(job.model), number).take())
            click.echo(_brief(windows[-1]), err=True)
            write_json(json_path, Report(job, describe_machine(), windows))
    if png is not None:
        draw(windows, f"What {job.streams} streams feel of prompts of {job.prompt:,} tokens, {len(cpus)} cores", png)
    tables = [figures(windows)] + ([ratios(windows)] if len(chosen) > 1 and not only else [])
    load = (
        f"{job.streams} streams from {job.context} tokens of context; {job.prompt:,} tokens every {job.every_s:g} s, {job.prompts} a round"
    )
    notes = [load, f"{job.dtype}; medians of {job.rounds} rounds by turns, ratios within each"]
    show(section("Disaggregation", describe_machine(), together([one.load for one in windows]), tables, notes), markdown)


if __name__ == "__main__":
    main()
