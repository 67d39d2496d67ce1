"""What routing by cache is worth: conversations over one prefill and two decode nodes whose pools are too small, by turns: see --help."""

import os
import tempfile
import time
from pathlib import Path
from statistics import mean, median

import click
import msgspec
import uvloop
from client import Outcome, Target
from cluster import Fields, Running, config_text, running, split
from machine import Load, LoadMeter, Machine, describe_machine, together
from models import BUILTIN, resolve
from report import Table, section, show, write_json
from samples import percentile
from serve import Prompts, closed_loop
from workload import plan

from disaggd.model.directory import open_directory
from disaggd.observe.receipts import Receipt
from disaggd.simulator.traces import MOONCAKE_BLOCK, Lengths, Scale, read_trace
from disaggd.transfer.layout import kv_spec

POOL_SHARE = 0.3
"""Of the working set: every distinct block that the trace names."""
MAX_SEQUENCES = 16
_VOCAB_SIZE = 4096
_TIMEOUT_S = 600.0
_NUM_WARMUP = 4


class Job(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    dtype: str
    policy: str
    block_size: int
    """Tokens, and what one of the trace's ids stands for."""
    weights: dict[str, float]
    """Of `[routing]`, where they are not the default's."""
    concurrency: int
    rounds: int


ROUTINGS: dict[str, Fields] = {"by cost": {"decode": "cost"}, "round robin": {"decode": "round_robin"}}
"""By name, what they say in `[routing]`."""


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """One routing, one round."""

    routing: str
    round: int
    seconds: float
    prompt_tokens: int
    cached_at_decode: int
    cached_at_prefill: int
    remote_share: float
    per_node: dict[str, int]
    """Requests by decode node."""
    ttft_ms: list[float]
    load: Load


class Report(msgspec.Struct, frozen=True):
    job: Job
    machine: Machine
    replays: list[Replay]


def working_set(rows: list[Lengths]) -> int:
    """Blocks."""
    return len({block for row in rows for block in row.blocks})


# ── a replay ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Bench(msgspec.Struct, frozen=True):
    job: Job
    path: str
    rows: list[Lengths]
    cpus: tuple[int, ...]

    @property
    def pool_blocks(self) -> int:
        return round(POOL_SHARE * working_set(self.rows))

    def replay(self, routing: str, number: int) -> Replay:
        with tempfile.TemporaryDirectory() as directory:
            config = Path(directory) / "config.toml"
            config.write_text(self._config(routing))
            with running(config, Path(directory) / "cluster.log") as cluster:
                return self._replay(routing, number, cluster)

    def _replay(self, routing: str, number: int, cluster: Running) -> Replay:
        target = Target.of(cluster.url, "completions", None)
        prompts = Prompts(model=cluster.model, tokenizer=None, chat=False, ignore_eos=True, temperature=0.0)

        def ask(rows: list[Lengths], concurrency: int, seed: int) -> list[Outcome]:
            bodies = prompts.bodies(plan(rows, _VOCAB_SIZE, self.job.block_size / MOONCAKE_BLOCK, seed))
            requests = [(target, body) for body in bodies]
            outcomes: list[Outcome] = uvloop.run(closed_loop(requests, concurrency, _TIMEOUT_S))
            if failed := [one.error for one in outcomes if one.error is not None]:
                raise RuntimeError(f"{routing}: {len(failed)} of {len(outcomes)} requests failed: {failed[0]}")
            return outcomes

        ask([msgspec.structs.replace(row, blocks=()) for row in self.rows[:_NUM_WARMUP]], 2, seed=-number)  # two at once: each its node
        meter, began_s = LoadMeter(cluster.pids), time.monotonic()
        outcomes = ask(self.rows, self.job.concurrency, seed=number)
        seconds, load = time.monotonic() - began_s, meter.read()
        receipts = [receipt for receipt in cluster.receipts(outcomes) if receipt is not None]
        return Replay(
            routing=routing,
            round=number,
            seconds=seconds,
            prompt_tokens=sum(one.prompt_tokens for one in receipts),
            cached_at_decode=sum(one.cached_tokens.decode for one in receipts),
            cached_at_prefill=sum(one.cached_tokens.prefill for one in receipts),
            remote_share=mean(one.decision == "remote" for one in receipts),
            per_node=_per_node(receipts),
            ttft_ms=[one.ttft_s * 1e3 for one in outcomes],
            load=load,
        )

    def _config(self, routing: str) -> str:
        """The prefill node on all cores but the last, which the decode nodes share."""
        prefill, decode = split(self.cpus)
        layout = kv_spec(open_directory(self.path).spec(self.job.dtype), self.job.block_size)  # type: ignore[arg-type]  # click has checked it
        limits: Fields = {
            "block_size": self.job.block_size,
            "kv_cache": self.pool_blocks * layout.bytes_per_block,
            "max_sequences": MAX_SEQUENCES,
        }
        nodes: list[Fields] = [
            {"role": "router", "cpus": prefill},
            {"role": "prefill", "cpus": prefill, "threads": len(prefill), **limits},
            {"role": "decode", "cpus": decode, **limits},
            {"role": "decode", "cpus": decode, **limits},
        ]
        return config_text(
            nodes,
            model={"path": self.path, "name": "served", "dtype": self.job.dtype},
            disaggregation={"policy": self.job.policy},
            routing={**ROUTINGS[routing], **self.job.weights},
            router={"receipts": len(self.rows) + _NUM_WARMUP + 1},
        )


def _per_node(receipts: list[Receipt]) -> dict[str, int]:
    names = sorted({one.decode_node or "" for one in receipts})
    return {name: sum(one.decode_node == name for one in receipts) for name in names}


# ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────────────


def table(replays: list[Replay]) -> Table:
    """A row per routing: medians of the rounds."""
    rows = []
    for name in dict.fromkeys(one.routing for one in replays):
        found = [one for one in replays if one.routing == name]
        ttft = sorted(at for one in found for at in one.ttft_ms)
        rows.append(
            (
                name,
                f"{median(one.cached_at_decode for one in found):,.0f}",
                f"{median(one.cached_at_decode / one.prompt_tokens for one in found):.1%}",
                f"{median(one.cached_at_prefill for one in found):,.0f}",
                f"{mean(ttft):,.0f}",
                f"{percentile(ttft, 50):,.0f}",
                f"{percentile(ttft, 99):,.0f}",
                f"{median(one.remote_share for one in found):.0%}",
                " / ".join(f"{count}" for count in found[0].per_node.values()),
                f"{median(one.seconds for one in found):,.0f}",
                f"{sum(one.load.is_quiet for one in found)} of {len(found)}",
            )
        )
    cached = ("cached at decode, tokens", "of all", "cached at prefill")
    header = ("", *cached, "TTFT ms mean", "p50", "p99", "remote", "requests d0 / d1", "seconds", "quiet")
    return Table("Routing", header, tuple(rows))


def verdicts(replays: list[Replay]) -> list[str]:
    by_cost, in_turn = ([one for one in replays if one.routing == routing] for routing in ROUTINGS)
    cached = [median(one.cached_at_decode for one in found) for found in (by_cost, in_turn)]
    ttft = [median(mean(one.ttft_ms) for one in found) for found in (by_cost, in_turn)]
    more = f"{cached[0] / cached[1]:.2f}×" if cached[1] else "everything, instead of nothing,"
    return [
        f"by cost: {more} of round robin's cached tokens at decode (asked: ≥ 1.5×), {ttft[0] / ttft[1]:.2f}× its mean TTFT (asked: < 1×)"
    ]


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def made_up(count: int) -> list[Lengths]:
    """For those who have no trace at hand: five conversations in turn, each a little longer every time."""
    return [
        Lengths(num_input=(2 + i // 5) * 16, num_output=2, blocks=tuple(1000 * (i % 5) + n for n in range(2 + i // 5)))
        for i in range(count)
    ]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--trace", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A Mooncake .jsonl.")
@click.option("--requests", "num_requests", type=click.IntRange(min=1), default=1200, show_default=True, help="The trace's first so many.")
@click.option("--model", default="S", show_default=True, help="A shape (S, P, M), builtin:tiny, or a Hugging Face directory.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--policy", default="adaptive", show_default=True, help="Of the decode nodes.")
@click.option("--block-size", type=click.IntRange(1, 512), default=16, show_default=True, help="Tokens; scales the trace's 512.")
@click.option("--max-input", type=click.IntRange(min=1), default=2048, show_default=True, help="Cuts longer prompts.")
@click.option("--max-output", type=click.IntRange(min=2), default=8, show_default=True, help="Cuts longer outputs.")
@click.option("--prefill-weight", type=click.FloatRange(min=0), help="Of [routing].  [default: disaggd's]")
@click.option("--concurrency", type=click.IntRange(min=2), default=4, show_default=True, help="Requests at once.")
@click.option("--rounds", type=click.IntRange(min=1), default=1, show_default=True, help="Replays of each routing.")
@click.option("--quick", is_flag=True, help="The built-in model, a few made-up conversations: shows that it runs.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write every replay here.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Append the section to this file.")
def main(
    trace: Path | None,
    num_requests: int,
    model: str,
    dtype: str,
    policy: str,
    block_size: int,
    max_input: int,
    max_output: int,
    prefill_weight: float | None,
    concurrency: int,
    rounds: int,
    quick: bool,
    json_path: Path | None,
    markdown: Path | None,
) -> None:
    """Replay a trace of conversations over one prefill and two decode nodes, each with a pool for 30 % of what the trace names.

    Requests that share leading blocks in the trace share them here. Routing by cost, which knows who has what, takes turns with round
    robin, which knows nothing. So many requests are under way at once; the next is sent when one has ended.
    """
    if quick:
        model, dtype, num_requests, concurrency, rounds = BUILTIN, "float32", 48, 2, 1
    elif trace is None:
        raise click.UsageError("name the trace with --trace")
    scale = Scale(length=block_size / MOONCAKE_BLOCK, max_input=max_input, max_output=max_output)
    rows = made_up(num_requests) if trace is None else read_trace(trace, num_requests, scale)
    rows = [_fitted(row, block_size) for row in rows]
    weights = {} if prefill_weight is None else {"prefill_weight": prefill_weight}
    job = Job(model=model, dtype=dtype, policy=policy, block_size=block_size, weights=weights, concurrency=concurrency, rounds=rounds)
    cpus = tuple(sorted(os.sched_getaffinity(0)))
    os.sched_setaffinity(0, split(cpus)[0])
    bench = Bench(job, resolve(model), rows, cpus)
    if (longest := max(row.num_input + row.num_output for row in rows)) >= bench.pool_blocks * block_size:
        raise click.UsageError(
            f"a request of {longest} tokens does not fit into {bench.pool_blocks} blocks: more --requests, or a smaller --max-input"
        )
    replays: list[Replay] = []
    for number in range(1, rounds + 1):
        for routing in ROUTINGS:
            replays.append(bench.replay(routing, number))
            click.echo(f"round {number}, {routing}: {replays[-1].cached_at_decode:,} tokens cached; {replays[-1].load}", err=True)
            write_json(json_path, Report(job, describe_machine(), replays))
    size = f"{len(rows)} requests of {mean(row.num_input for row in rows):,.0f} tokens on average, {concurrency} at a time"
    pools = f"{working_set(rows):,} distinct blocks of {block_size} tokens; pools of {bench.pool_blocks:,}"
    asked = "".join(f", {name} {weight:g}" for name, weight in weights.items())
    lines = [f"{size}; {pools}; policy {policy}{asked}, {dtype}", *verdicts(replays)]
    show(section("Routing by cache", describe_machine(), together([one.load for one in replays]), [table(replays)], lines), markdown)


def _fitted(row: Lengths, block_size: int) -> Lengths:
    """Without blocks that the prompt was cut before; two tokens of output at least, since one needs no decode node."""
    return msgspec.structs.replace(row, num_output=max(2, row.num_output), blocks=row.blocks[: row.num_input // block_size])


if __name__ == "__main__":
    main()
