"""What this machine can do at best: bytes read and multiplications per second. See --help; the other benches import it.

Runs in the calling process with as many threads as torch has there. Knows no engine.
"""

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import msgspec
import torch
from machine import LoadMeter, describe_machine, measure_as_nodes_do
from report import Table, section, show, write_json

_REPEATS = 7

_libc = ctypes.CDLL(None)
_libc.memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
_libc.memchr.restype = ctypes.c_void_p


class Roofline(msgspec.Struct, frozen=True, kw_only=True):
    """The best of several tries: a limit, not a mean."""

    device: str
    threads: int
    read_bytes_per_s: float
    bf16_flops: float
    fp32_flops: float


def better(one: Roofline, other: Roofline) -> Roofline:
    """Of two measurements of the same device: a disturbance only ever makes it look slower."""
    return msgspec.structs.replace(
        one,
        read_bytes_per_s=max(one.read_bytes_per_s, other.read_bytes_per_s),
        bf16_flops=max(one.bf16_flops, other.bf16_flops),
        fp32_flops=max(one.fp32_flops, other.fp32_flops),
    )


def measure(device: str = "cpu", *, quick: bool = False) -> Roofline:
    """The limits of `device` with the threads that torch has now."""
    where = torch.device(device)
    return Roofline(
        device=torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        threads=torch.get_num_threads() if where.type == "cpu" else 0,
        read_bytes_per_s=_read_bytes_per_s(where, quick),
        bf16_flops=_matrix_flops(where, torch.bfloat16, quick),
        fp32_flops=_matrix_flops(where, torch.float32, quick),
    )


def _read_bytes_per_s(where: torch.device, quick: bool) -> float:
    """Over far more than any cache holds. On a CPU the better of two readers: libc's memchr, and torch's sum of int64."""
    num_bytes = (2**32 if where.type == "cuda" else 2**30) // (4 if quick else 1)
    values = torch.zeros(num_bytes // 8, dtype=torch.int64, device=where)
    readers: list[Callable[[], object]] = [values.sum]
    if where.type == "cuda":
        readers = [values.view(torch.float32).sum, values.view(torch.float32).amax]
    else:
        readers.append(lambda: _memchr(values))
    return num_bytes / min(_best_s(reader, where) for reader in readers)


def _memchr(values: torch.Tensor) -> None:
    """Looks for a byte that is not there: nothing but loads and compares, one stretch per thread."""
    threads = torch.get_num_threads()
    share = values.nbytes // threads
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda index: _libc.memchr(values.data_ptr() + index * share, 1, share), range(threads)))


def _matrix_flops(where: torch.device, dtype: torch.dtype, quick: bool) -> float:
    """Square products, the best of two sizes."""
    sizes = (8192, 4096) if where.type == "cuda" else (1024,) if quick else (2048, 1024)
    return max(_matrix_flops_of(size, where, dtype) for size in sizes)


def _matrix_flops_of(size: int, where: torch.device, dtype: torch.dtype) -> float:
    left, right = (torch.randn(size, size, device=where).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype, device=where)
    return 2 * size**3 / _best_s(lambda: torch.mm(left, right, out=out), where)


def _best_s(function: Callable[[], object], where: torch.device) -> float:
    function()
    best = float("inf")
    for _ in range(_REPEATS):
        _finish(where)
        began = time.perf_counter()
        function()
        _finish(where)
        best = min(best, time.perf_counter() - began)
    return best


def _finish(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def _measure_with_threads(threads: int, *, quick: bool) -> Roofline:
    """In a process of its own: OpenMP's threads are fixed when it starts."""
    command = [sys.executable, __file__, "--threads", str(threads), "--raw", *(["--quick"] if quick else [])]
    return msgspec.convert(json.loads(subprocess.run(command, check=True, capture_output=True).stdout), Roofline)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--threads", "counts", type=click.IntRange(min=1), multiple=True, help="May be given again.  [default: 1, and all]")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--quick", is_flag=True, help="Smaller and a little less exact: seconds.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Append the section to this file.")
@click.option("--raw", is_flag=True, hidden=True)
def main(counts: tuple[int, ...], device: str, quick: bool, json_path: Path | None, markdown: Path | None, raw: bool) -> None:
    """Measure read bandwidth and the matrix peak of this machine, the limits that the other benches compare with.

    Decoding reads every weight once a step, so bandwidth limits it; prefilling multiplies matrices.
    """
    if raw:
        measure_as_nodes_do(counts[0])
        click.echo(msgspec.json.encode(measure(device, quick=quick)))
        return
    load = LoadMeter()
    if device == "cpu":
        found = [_measure_with_threads(threads, quick=quick) for threads in counts or sorted({1, len(os.sched_getaffinity(0))})]
    else:
        found = [measure(device, quick=quick)]
    show(section("Roofline", describe_machine(), load.read(), [table(found)]), markdown)
    write_json(json_path, found)


def table(found: list[Roofline]) -> Table:
    """One row per limit that was measured."""
    rows = [
        (
            f"{one.device}, {one.threads} threads" if one.threads else one.device,
            f"{one.read_bytes_per_s / 1e9:.1f}",
            f"{one.bf16_flops / 1e12:.3f}",
            f"{one.fp32_flops / 1e12:.3f}",
        )
        for one in found
    ]
    return Table("Limits", ("device", "read GB/s", "bf16 TFLOP/s", "fp32 TFLOP/s"), tuple(rows))


if __name__ == "__main__":
    main()
