"""Load for any OpenAI endpoint that streams, and what its clients felt: see --help."""

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
import msgspec
import uvloop
from client import Outcome, Target, fetch
from cluster import running, small_config
from machine import Load, LoadMeter, Machine, describe_machine, trees_cpu_s
from report import Table, section, show, write_json
from samples import Spread, spread
from tokenizers import Tokenizer
from workload import Planned, fixed, plan, poisson

from disaggd.simulator.traces import Scale, read_trace


class Slo(msgspec.Struct, frozen=True):
    """What a good request keeps within, in milliseconds; None: anything."""

    ttft_ms: float | None
    tpot_ms: float | None
    itl_ms: float | None
    """Its longest gap."""

    def is_met(self, outcome: Outcome) -> bool:
        if outcome.error is not None:
            return False
        tpot_s, longest_s = outcome.tpot_s or 0.0, max(outcome.gaps_s, default=0.0)
        felt = ((self.ttft_ms, outcome.ttft_s), (self.tpot_ms, tpot_s), (self.itl_ms, longest_s))
        return all(limit is None or seconds * 1e3 <= limit for limit, seconds in felt)


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Times in milliseconds."""

    requests: int
    failed: int
    errors: list[str]
    """Of the first few that failed."""
    seconds: float
    """From the first request to the last token."""
    input_tokens: int
    output_tokens: int
    input_tokens_per_s: float
    output_tokens_per_s: float
    requests_per_s: float
    ttft_ms: Spread | None
    itl_ms: Spread | None
    tpot_ms: Spread | None
    total_ms: Spread | None
    slo: Slo
    goodput_per_s: float
    """Requests a second that kept the SLO."""
    good_share: float
    late_ms: float
    """How late at worst this client began a request that was due."""
    client_cores: float
    client_us_per_event: float
    server_cores: float | None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    label: str
    machine: Machine
    load: Load
    summary: Summary


class Body(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is posted. The servers' own extensions are left out where they are not asked for."""

    model: str
    prompt: list[int] | str | None = None
    messages: list[dict[str, str]] | None = None
    max_tokens: int
    temperature: float
    stream: bool
    stream_options: dict[str, bool] | None = None
    ignore_eos: bool | None = None


# ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def closed_loop(requests: Iterable[tuple[Target, bytes]], concurrency: int, timeout_s: float) -> list[Outcome]:
    """So many at a time, the next as soon as one has ended; in the order of their ends."""
    left, outcomes = iter(requests), []

    async def worker() -> None:
        for target, body in left:
            outcomes.append(await fetch(target, body, time.perf_counter(), timeout_s))

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker())
    return outcomes


async def open_loop(target: Target, arrivals: Iterable[tuple[float, bytes]], timeout_s: float) -> list[Outcome]:
    """Each when it is due, whatever became of those before."""
    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for arrival_s, body in arrivals:
            due_s = began + arrival_s
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            tasks.append(group.create_task(fetch(target, body, due_s, timeout_s)))
    return [task.result() for task in tasks]


def summarize(outcomes: list[Outcome], slo: Slo, client_cpu_s: float, server_cpu_s: float | None) -> Summary:
    good = [outcome for outcome in outcomes if outcome.error is None]
    began, ended = min(one.sent_s for one in outcomes), max(one.ended_s for one in outcomes)
    seconds, num_kept = ended - began, sum(slo.is_met(one) for one in outcomes)
    num_in, num_out = sum(one.prompt_tokens or 0 for one in good), sum(one.num_tokens for one in good)
    return Summary(
        requests=len(outcomes),
        failed=len(outcomes) - len(good),
        errors=[one.error for one in outcomes if one.error is not None][:3],
        seconds=seconds,
        input_tokens=num_in,
        output_tokens=num_out,
        input_tokens_per_s=num_in / seconds,
        output_tokens_per_s=num_out / seconds,
        requests_per_s=len(good) / seconds,
        ttft_ms=spread(one.ttft_s * 1e3 for one in good),
        itl_ms=spread(gap * 1e3 for one in good for gap in one.gaps_s),
        tpot_ms=spread(one.tpot_s * 1e3 for one in good if one.tpot_s is not None),
        total_ms=spread((one.event_s[-1] - one.sent_s) * 1e3 for one in good),
        slo=slo,
        goodput_per_s=num_kept / seconds,
        good_share=num_kept / len(outcomes),
        late_ms=max((one.sent_s - one.due_s) * 1e3 for one in outcomes),
        client_cores=client_cpu_s / seconds,
        client_us_per_event=client_cpu_s * 1e6 / max(1, sum(len(one.event_s) for one in outcomes)),
        server_cores=None if server_cpu_s is None else server_cpu_s / seconds,
    )


class Prompts(msgspec.Struct, frozen=True, kw_only=True):
    """How a planned request is put to this server."""

    model: str
    tokenizer: str | None
    chat: bool
    ignore_eos: bool
    temperature: float

    def bodies(self, planned: list[Planned]) -> list[bytes]:
        """Encoded before the run: it costs the client nothing then."""
        backing = None if self.tokenizer is None else Tokenizer.from_file(str(Path(self.tokenizer) / "tokenizer.json"))
        return [msgspec.json.encode(self._body(one, backing)) for one in planned]

    def _body(self, planned: Planned, backing: Tokenizer | None) -> Body:
        prompt = planned.prompt if backing is None else backing.decode(planned.prompt)
        return Body(
            model=self.model,
            prompt=None if self.chat else prompt,
            messages=[{"role": "user", "content": str(prompt)}] if self.chat else None,
            max_tokens=planned.max_tokens,
            temperature=self.temperature,
            stream=True,
            stream_options={"include_usage": True},
            ignore_eos=True if self.ignore_eos else None,
        )


# ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────────────


def tables(found: Summary) -> list[Table]:
    felt = {"TTFT": found.ttft_ms, "ITL": found.itl_ms, "TPOT": found.tpot_ms, "whole request": found.total_ms}
    rows = [
        (name, *(f"{value:,.1f}" for value in (one.mean, one.p50, one.p90, one.p99, one.max)))
        for name, one in felt.items()
        if one is not None
    ]
    return [Table("Milliseconds", ("", "mean", "p50", "p90", "p99", "max"), tuple(rows))]


def notes(found: Summary) -> list[str]:
    server = "" if found.server_cores is None else f"; server {found.server_cores:.2f} cores"
    limits = {"TTFT": found.slo.ttft_ms, "TPOT": found.slo.tpot_ms, "longest ITL": found.slo.itl_ms}
    asked = ", ".join(f"{name} ≤ {limit:g} ms" for name, limit in limits.items() if limit is not None)
    lines = [
        f"{found.requests} requests in {found.seconds:.1f} s, {found.failed} failed",
        f"output {found.output_tokens_per_s:,.1f} tokens/s, input {found.input_tokens_per_s:,.1f} tokens/s",
        f"client {found.client_cores:.2f} cores, {found.client_us_per_event:.0f} µs per event, at most {found.late_ms:.1f} ms late{server}",
    ]
    if asked:
        lines.append(f"goodput ({asked}): {found.goodput_per_s:.2f} requests/s, {found.good_share:.0%} of all")
    return lines + [f"error: {error}" for error in found.errors]


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--url", help="The server, such as http://127.0.0.1:8000.")
@click.option("--config", type=click.Path(exists=True, path_type=Path), help="Instead: start this disaggd cluster for the run.")
@click.option("--model", help="The name that requests bear.  [default: the cluster's; else needed]")
@click.option("--chat", is_flag=True, help="Use /v1/chat/completions (wants --tokenizer).")
@click.option("--tokenizer", type=click.Path(exists=True), help="A model directory: send its text for the tokens, not token ids.")
@click.option("--api-key", help="Sent as a bearer token.")
@click.option("--requests", "num_requests", type=click.IntRange(min=1), help="How many.  [default: 32, or the whole trace]")
@click.option("--input", "num_input", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens of each prompt.")
@click.option("--output", "num_output", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens to generate for each.")
@click.option("--trace", type=click.Path(exists=True, path_type=Path), help="Lengths from an Azure .csv or a Mooncake .jsonl instead.")
@click.option("--concurrency", type=click.IntRange(min=1), help="Closed loop: so many at a time.  [default: 8 without a trace]")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="Open loop: Poisson arrivals, so many a second.")
@click.option("--time-scale", type=click.FloatRange(min=0), default=1.0, show_default=True, help="Multiplies the trace's arrival times.")
@click.option("--length-scale", type=click.FloatRange(min=0), default=1.0, show_default=True, help="Multiplies the trace's lengths.")
@click.option("--max-input", type=click.IntRange(min=1), help="Cuts longer prompts of a trace.")
@click.option("--max-output", type=click.IntRange(min=1), help="Cuts longer outputs of a trace.")
@click.option("--vocab-size", type=click.IntRange(min=2), default=4096, show_default=True, help="Prompts are random ids below this.")
@click.option("--ignore-eos/--heed-eos", default=True, show_default=True, help="Ask to generate on; not every server knows it.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True)
@click.option("--slo-ttft", type=float, metavar="MS", help="Goodput: the time to the first token.")
@click.option("--slo-tpot", type=float, metavar="MS", help="Goodput: the mean time per token after it.")
@click.option("--slo-itl", type=float, metavar="MS", help="Goodput: the longest gap within a request.")
@click.option("--warmup", type=click.IntRange(min=0), default=2, show_default=True, help="Requests before the run that do not count.")
@click.option("--server-pid", "server_pids", type=int, multiple=True, help="A process of the server: not foreign load.")
@click.option("--timeout", "timeout_s", type=float, default=600.0, show_default=True, metavar="S", help="For each request.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--label", default="", help="What this run is, in the report.")
@click.option("--quick", is_flag=True, help="Start a small cluster of the built-in model and send it eight short requests.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the summary here.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Append the section to this file.")
def main(
    url: str | None,
    config: Path | None,
    model: str | None,
    chat: bool,
    tokenizer: str | None,
    api_key: str | None,
    num_requests: int | None,
    num_input: int,
    num_output: int,
    trace: Path | None,
    concurrency: int | None,
    rate: float | None,
    time_scale: float,
    length_scale: float,
    max_input: int | None,
    max_output: int | None,
    vocab_size: int,
    ignore_eos: bool,
    temperature: float,
    slo_ttft: float | None,
    slo_tpot: float | None,
    slo_itl: float | None,
    warmup: int,
    server_pids: tuple[int, ...],
    timeout_s: float,
    seed: int,
    label: str,
    quick: bool,
    json_path: Path | None,
    markdown: Path | None,
) -> None:
    """Send an OpenAI endpoint a load, and report TTFT, ITL, TPOT, throughput and goodput.

    \b
      serve.py --url http://127.0.0.1:8000 --model tiny --requests 16 --input 512 --output 64 --concurrency 8
      serve.py --url … --model m --trace azure_llm_2023_conv.csv --requests 200 --time-scale 4 --max-input 2000
      serve.py --config config.toml --rate 0.5 --slo-ttft 2000 --slo-itl 100

    A closed loop keeps --concurrency requests going; --rate sends them at random times; a trace without either is
    replayed at its own times. Times count from the begin of a request's connection; ITL is between events, TPOT over the
    tokens that the server says it sent.
    """
    if quick:
        num_requests, num_input, num_output, concurrency, warmup = 8, 64, 16, 4, 1
    if concurrency is not None and rate is not None:
        raise click.UsageError("--concurrency is a closed loop, --rate an open one: give one of them")
    if chat and tokenizer is None:
        raise click.UsageError("--chat sends text: name the model's --tokenizer")
    rows = (
        fixed(num_requests or 32, num_input, num_output)
        if trace is None
        else read_trace(trace, num_requests, Scale(time=time_scale, length=length_scale, max_input=max_input, max_output=max_output))
    )
    if rate is not None:
        rows = poisson(rows, rate, seed)
    elif trace is None and concurrency is None:
        concurrency = 8
    planned = plan(rows, vocab_size, length_scale, seed)
    with _server(url, config, model, quick) as (where, name, pids):
        target = Target.of(where, "chat/completions" if chat else "completions", api_key)
        prompts = Prompts(model=name, tokenizer=tokenizer, chat=chat, ignore_eos=ignore_eos, temperature=temperature)
        job = Job(target, planned, prompts.bodies(planned), prompts.bodies(warmup_of(planned, warmup, vocab_size)), concurrency, timeout_s)
        summary, load = job.run(Slo(slo_ttft, slo_tpot, slo_itl), (*server_pids, *pids))
    report = Report(label=label, machine=describe_machine(), load=load, summary=summary)
    show(section(label or "Served", report.machine, load, tables(summary), notes(summary)), markdown)
    write_json(json_path, report)
    if summary.failed:
        raise SystemExit(1)


class Job(msgspec.Struct, frozen=True):
    """A load and where it goes."""

    target: Target
    planned: list[Planned]
    bodies: list[bytes]
    warmup: list[bytes]
    concurrency: int | None
    """None: each at its arrival time."""
    timeout_s: float

    def run(self, slo: Slo, server_pids: tuple[int, ...]) -> tuple[Summary, Load]:
        uvloop.run(closed_loop(self._to(self.warmup), 1, self.timeout_s))
        meter = LoadMeter(server_pids)
        server_cpu_s, client_cpu_s = trees_cpu_s(server_pids), time.process_time()
        outcomes = uvloop.run(self._outcomes())
        client_cpu_s = time.process_time() - client_cpu_s
        server_used_s = trees_cpu_s(server_pids) - server_cpu_s if server_pids else None
        load = meter.read()
        return summarize(outcomes, slo, client_cpu_s, server_used_s), load

    async def _outcomes(self) -> list[Outcome]:
        if self.concurrency is not None:
            return await closed_loop(self._to(self.bodies), self.concurrency, self.timeout_s)
        arrivals = [(one.arrival_s, body) for one, body in zip(self.planned, self.bodies, strict=True)]
        return await open_loop(self.target, arrivals, self.timeout_s)

    def _to(self, bodies: list[bytes]) -> Iterator[tuple[Target, bytes]]:
        return ((self.target, body) for body in bodies)


def warmup_of(planned: list[Planned], count: int, vocab_size: int) -> list[Planned]:
    """Of the run's lengths, but with prompts of their own: the run shall find nothing cached."""
    rows = fixed(count, len(planned[0].prompt), min(8, planned[0].max_tokens))
    return plan(rows, vocab_size, 1.0, seed=-1)


@contextlib.contextmanager
def _server(url: str | None, config: Path | None, model: str | None, quick: bool) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Its address, the model's name, and the processes that this run started for it."""
    if url is not None:
        if model is None:
            raise click.UsageError("--url wants --model: the name that the server knows it by")
        yield url, model, ()
        return
    with tempfile.TemporaryDirectory() as directory:
        if quick and config is None:
            config = Path(directory) / "config.toml"
            config.write_text(small_config())
        if config is None:
            raise click.UsageError("give --url of a server, or --config of a disaggd cluster to start")
        with running(config, Path(directory) / "cluster.log") as cluster:
            yield cluster.url, model or cluster.model, cluster.pids


if __name__ == "__main__":
    main()
