"""Every Triton kernel at the shapes of an 8B model, as a part of what the GPU can do: see --help.

Timed as they are used in a decode step: captured in a CUDA graph, over inputs that together are larger than the cache. Wants a GPU.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import click
import msgspec
import torch
import torch.nn.functional as F
from machine import LoadMeter, describe_machine
from report import Table, section, show, write_json
from roofline import Roofline, better
from roofline import measure as measure_roofline
from torch import Tensor

from disaggd.kernels import fp8
from disaggd.kernels.block_copy import gather_blocks
from disaggd.kernels.configurations import MOST_ROWS
from disaggd.kernels.decode_attention import decode_attention
from disaggd.kernels.draws import Draws
from disaggd.kernels.linear import linear, linear_silu_mul
from disaggd.kernels.logprobs import top_logprobs
from disaggd.kernels.prefill_attention import prefill_attention
from disaggd.kernels.repack import repack, unpack_fp8
from disaggd.kernels.rms_norm import add_rms_norm
from disaggd.kernels.rotate_and_store import rotate_and_store
from disaggd.kernels.sampling import greedy, sample
from disaggd.kernels.silu_mul import silu_mul

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4096, 12_288, 32, 8, 128, 151_936
BLOCK_SIZE = 64
PROJECTIONS = {
    "query, key, value": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
    "attention's output": (HIDDEN, HEADS * HEAD_DIM),
    "gate, up, SiLU": (2 * INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
    "head": (VOCAB, HIDDEN),
}
CACHE_BYTES = 2 * 60 * 2**20
"""Of inputs that take turns: twice an H200's L2."""

WHERE = torch.device("cuda")
BF16 = torch.bfloat16


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One row. `bytes_moved` are read and written at least once; `flops` where products are the limit."""

    kernel: str
    seconds: float
    bytes_moved: float
    flops: float | None = None
    vendor_seconds: float | None = None

    def share_of(self, limits: Roofline) -> float:
        if self.flops is not None:
            return self.flops / self.seconds / limits.bf16_flops
        return self.bytes_moved / self.seconds / limits.read_bytes_per_s


class Report(msgspec.Struct, frozen=True, kw_only=True):
    roofline: Roofline
    figures: list[Figure]


def seconds_of(work: list[Callable[[], object]], repeats: int) -> float:
    """Of one of `work`, which take turns; captured together, the median of `repeats` replays."""
    for one in work:
        one()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in work:
            one()
    graph.replay()
    return median(_replay_s(graph) for _ in range(repeats)) / len(work)


def _replay_s(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=WHERE, dtype=BF16)


def copies(num_bytes: int) -> range:
    """How many inputs of so many bytes take turns."""
    return range(max(1, math.ceil(CACHE_BYTES / num_bytes)))


# ── what is measured ─────────────────────────────────────────────────────────────────────────────────────────────────


def decode_figures(repeats: int, batches: tuple[int, ...], contexts: tuple[int, ...]) -> Iterator[Figure]:
    for batch, context in [(batch, context) for batch in batches for context in contexts]:
        blocks = batch * context // BLOCK_SIZE
        kv_bytes = blocks * BLOCK_SIZE * KV_HEADS * 2 * HEAD_DIM * 2
        tables = torch.randperm(blocks, device=WHERE, dtype=torch.int32).view(batch, -1)
        starts = torch.arange(batch + 1, device=WHERE, dtype=torch.int32)
        lens = torch.full((batch,), context, device=WHERE, dtype=torch.int32)
        queries = random(batch, HEADS, HEAD_DIM)
        out = torch.empty_like(queries)
        attend = partial(decode_attention, window=None, processors=torch.cuda.get_device_properties(WHERE).multi_processor_count)
        pools = [random(blocks, KV_HEADS, 2, BLOCK_SIZE, HEAD_DIM) for _ in copies(kv_bytes)]
        work: list[Callable[[], object]] = [partial(attend, out, queries, pool, starts, lens, tables) for pool in pools]
        name = f"decode attention, batch {batch}, context {context:,}"
        yield Figure(kernel=name, seconds=seconds_of(work, repeats), bytes_moved=kv_bytes)


def prefill_figures(repeats: int, lengths: tuple[int, ...]) -> Iterator[Figure]:
    for length in lengths:
        blocks = length // BLOCK_SIZE
        tables = torch.randperm(blocks, device=WHERE, dtype=torch.int32).view(1, -1)
        starts, lens = (torch.tensor(entries, device=WHERE, dtype=torch.int32) for entries in ([0, length], [length]))
        queries, pool = random(length, HEADS, HEAD_DIM), random(blocks, KV_HEADS, 2, BLOCK_SIZE, HEAD_DIM)
        out = torch.empty_like(queries)
        attend = partial(prefill_attention, out, queries, pool, starts, lens, tables, window=None)
        rows = queries.view(1, length, HEADS, HEAD_DIM).transpose(1, 2)
        keys, values = (random(1, KV_HEADS, length, HEAD_DIM) for _ in range(2))
        sdpa = partial(F.scaled_dot_product_attention, rows, keys, values, is_causal=True, enable_gqa=True)
        yield Figure(
            kernel=f"prefill attention, {length:,} tokens",
            seconds=seconds_of([attend], repeats),
            bytes_moved=2 * (queries.nbytes + pool.nbytes),
            flops=2 * length**2 * HEADS * HEAD_DIM,
            vendor_seconds=seconds_of([sdpa], repeats),
        )


def projection_figures(repeats: int, rows: tuple[int, ...]) -> Iterator[Figure]:
    for name, (outputs, inputs) in PROJECTIONS.items():
        weights = [random(outputs, inputs) for _ in copies(outputs * inputs * 2)]
        gated = name.startswith("gate")
        for count in rows:
            x = random(count, inputs)
            ours: list[Callable[[], object]] = [partial(linear_silu_mul if gated else linear, x, weight, None) for weight in weights]
            theirs: list[Callable[[], object]] = [partial(_vendor_silu_mul if gated else F.linear, x, weight) for weight in weights]
            yield Figure(
                kernel=f"{name}, {count} row{'s' * (count > 1)}",
                seconds=seconds_of(ours, repeats),
                bytes_moved=weights[0].nbytes,
                vendor_seconds=seconds_of(theirs, repeats),
            )


def _vendor_silu_mul(x: Tensor, weight: Tensor) -> Tensor:
    return silu_mul(F.linear(x, weight))


def elementwise_figures(repeats: int, tokens: int) -> Iterator[Figure]:
    wide = [random(tokens, 2 * INTERMEDIATE) for _ in copies(tokens * 2 * INTERMEDIATE * 2)]
    yield Figure(
        kernel=f"SiLU-mul, {tokens:,} tokens",
        seconds=seconds_of([partial(silu_mul, each) for each in wide], repeats),
        bytes_moved=1.5 * wide[0].nbytes,
    )
    streams = [(random(tokens, HIDDEN), random(tokens, HIDDEN)) for _ in copies(tokens * HIDDEN * 4)]
    weight = random(HIDDEN)
    yield Figure(
        kernel=f"RMS norm with residual, {tokens:,} tokens",
        seconds=seconds_of([partial(add_rms_norm, x, residual, weight, 1e-6) for x, residual in streams], repeats),
        bytes_moved=4 * streams[0][0].nbytes,
    )
    projected = [random(tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM) for _ in copies(tokens * (HEADS + 2 * KV_HEADS) * HEAD_DIM * 2)]
    pool, norm = random(tokens // BLOCK_SIZE, KV_HEADS, 2, BLOCK_SIZE, HEAD_DIM), random(HEADS + KV_HEADS, HEAD_DIM)
    rotation, slots = (random(tokens, 1, HEAD_DIM), random(tokens, 1, HEAD_DIM)), torch.arange(tokens, device=WHERE)
    yield Figure(
        kernel=f"head norm, rotation and KV store, {tokens:,} tokens",
        seconds=seconds_of([partial(rotate_and_store, pool, each, norm, 1e-6, rotation, slots) for each in projected], repeats),
        bytes_moved=2 * projected[0].nbytes,
    )
    layers, blocks = 36, 64
    kv = random(layers, 2 * blocks, KV_HEADS, 2, BLOCK_SIZE, HEAD_DIM)
    staging = torch.empty_like(kv[:, :blocks])
    ids = torch.randperm(2 * blocks, device=WHERE, dtype=torch.int32)[:blocks].contiguous()
    copy = partial(gather_blocks, staging, kv, ids, layers=range(layers), heads=range(KV_HEADS))
    yield Figure(kernel=f"block copy, {blocks} blocks", seconds=seconds_of([copy], repeats), bytes_moved=2 * staging.nbytes)


def repack_figures(repeats: int, tokens: int) -> Iterator[Figure]:
    """Half of the heads, as for a target of twice as many ranks, and so into the host's memory, as nodes do; from 8 bits all of them."""
    layers, half = 36, KV_HEADS // 2
    kv = random(layers, 2 * tokens // BLOCK_SIZE, KV_HEADS, 2, BLOCK_SIZE, HEAD_DIM)
    ids = torch.randperm(kv.shape[1], device=WHERE, dtype=torch.int32)[: tokens // BLOCK_SIZE].contiguous()
    read_bytes = kv.nbytes // 4
    kinds = ((16, "blocks of 16", False), (128, "blocks of 128", False), (BLOCK_SIZE, "fp8", False), (16, "blocks of 16", True))
    for target_size, name, is_hosts in kinds:
        wire = (fp8.head_bytes(target_size, HEAD_DIM),)
        shape = (layers, tokens // target_size, half, *(wire if name == "fp8" else (2, target_size, HEAD_DIM)))
        dtype = torch.uint8 if name == "fp8" else BF16
        out = torch.empty(shape, dtype=dtype, pin_memory=True) if is_hosts else torch.empty(shape, dtype=dtype, device=WHERE)
        work = partial(repack, out, kv, ids, layers=range(layers), heads=range(half), start=0, num_tokens=tokens)
        to = f"{name} in the host's memory" if is_hosts else name
        yield Figure(kernel=f"repack to {to}, {tokens:,} tokens", seconds=seconds_of([work], repeats), bytes_moved=read_bytes + out.nbytes)
    blocks = tokens // BLOCK_SIZE
    wire_blocks = torch.zeros(layers, blocks, KV_HEADS, fp8.head_bytes(BLOCK_SIZE, HEAD_DIM), dtype=torch.uint8, device=WHERE)
    landed = torch.arange(blocks, device=WHERE, dtype=torch.int32)
    seconds = seconds_of([partial(unpack_fp8, kv, wire_blocks, ids, landed)], repeats)
    yield Figure(kernel=f"unpack from fp8, {tokens:,} tokens", seconds=seconds, bytes_moved=2 * read_bytes + wire_blocks.nbytes)


def sampling_figures(repeats: int, rows: int) -> Iterator[Figure]:
    logits = [torch.randn(rows, VOCAB, device=WHERE) for _ in copies(rows * VOCAB * 4)]
    draws = Draws(
        temperatures=torch.full((rows,), 0.8, device=WHERE),
        top_k=torch.full((rows,), 50, dtype=torch.int32, device=WHERE),
        top_p=torch.full((rows,), 0.95, device=WHERE),
        floors=torch.full((rows,), -26.1, device=WHERE),
        seeds=torch.arange(rows, device=WHERE),
        positions=torch.arange(rows, device=WHERE),
        any_top_k=True,
        any_top_p=True,
    )
    for name, work in (
        ("greedy", [partial(greedy, each) for each in logits]),
        ("temperature, top-k and top-p", [partial(sample, each, draws) for each in logits]),
        ("20 log-probabilities", [partial(top_logprobs, each, draws.positions, 20) for each in logits]),
    ):
        yield Figure(kernel=f"sampling, {rows} rows: {name}", seconds=seconds_of(list(work), repeats), bytes_moved=logits[0].nbytes)


# ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────────────


def table(report: Report) -> Table:
    rows = [
        (
            one.kernel,
            f"{one.seconds * 1e6:,.1f}",
            f"{one.bytes_moved / one.seconds / 1e9:,.0f}",
            "–" if one.flops is None else f"{one.flops / one.seconds / 1e12:.0f}",
            f"{one.share_of(report.roofline):.0%}",
            "–" if one.vendor_seconds is None else f"{one.vendor_seconds / one.seconds:.2f}×",
        )
        for one in report.figures
    ]
    return Table("Kernels", ("kernel", "µs", "GB/s", "TFLOP/s", "of roofline", "against the vendor's"), tuple(rows))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--repeats", type=click.IntRange(min=1), default=15, show_default=True, help="Replays; figures are their medians.")
@click.option("--quick", is_flag=True, help="Few shapes: shows that it runs.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Append the section to this file.")
def main(repeats: int, quick: bool, json_path: Path | None, markdown: Path | None) -> None:
    """Time every Triton kernel in bfloat16 at the shapes of Qwen3-8B, against this GPU's read bandwidth or matrix peak.

    Projections and prefill attention also against the vendor's: torch's linear and scaled_dot_product_attention as torch chooses.
    """
    if not torch.cuda.is_available():
        raise click.UsageError("wants a GPU")
    torch.set_grad_enabled(False)
    load, limits = LoadMeter(), measure_roofline("cuda", quick=quick)
    figures = [
        *decode_figures(repeats, (8,) if quick else (1, 8, 64), (1024,) if quick else (1024, 8192)),
        *prefill_figures(repeats, (1024,) if quick else (4096, 16_384)),
        *projection_figures(repeats, (1,) if quick else (1, 8, MOST_ROWS)),
        *elementwise_figures(repeats, 1024 if quick else 4096),
        *repack_figures(repeats, 1024 if quick else 4096),
        *sampling_figures(repeats, 8 if quick else 64),
    ]
    report = Report(roofline=better(limits, measure_roofline("cuda", quick=quick)), figures=figures)
    limits = report.roofline
    notes = [
        f"roofline in this run: {limits.read_bytes_per_s / 1e9:,.0f} GB/s read, {limits.bf16_flops / 1e12:.0f} TFLOP/s bf16",
        f"medians of {repeats} replays of a CUDA graph; inputs take turns beyond the cache",
    ]
    show(section("Kernels", describe_machine(), load.read(), [table(report)], notes), markdown)
    write_json(json_path, report)


if __name__ == "__main__":
    main()
