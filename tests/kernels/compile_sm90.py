"""Compiles every Triton kernel for sm_90, in every configuration of its table, on a machine without a GPU.

    python -m tests.kernels.compile_sm90            prints what each takes; exits 1 if one spills registers, cannot fit in an SM,
                                                    or is compiled anew for what differs from step to step, or write to write
    … --first           of each kernel, with each of its switches, only the first configuration: does this triton compile it at all?

Must run in a process of its own: not in one that interprets Triton's kernels. The launchers themselves are called, with tensors that have
shapes but no memory, and a driver that has a target but no device. So what is compiled is what they would launch, with the alignments and
widths that Triton reads off their arguments.
"""

import contextlib
import io
import os
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from disaggd.kernels import configurations, fp8
from disaggd.kernels.block_copy import gather_blocks, scatter_blocks
from disaggd.kernels.decode_attention import decode_attention
from disaggd.kernels.draws import Draws
from disaggd.kernels.kv_store import kv_store
from disaggd.kernels.linear import linear, linear_silu_mul
from disaggd.kernels.logprobs import logprobs
from disaggd.kernels.prefill_attention import prefill_attention
from disaggd.kernels.repack import repack, unpack_fp8
from disaggd.kernels.rms_norm import add_rms_norm, rms_norm
from disaggd.kernels.rotate_and_store import rotate_and_store
from disaggd.kernels.sampling import sample
from disaggd.kernels.silu_mul import silu_mul

SHARED_BYTES = 227 * 1024  # what one program may have of a Hopper multiprocessor's
BLOCK_SIZE = 64
VOCAB_SIZE = 151_936
DTYPES = {2: torch.bfloat16, 4: torch.float32}


@dataclass(frozen=True, slots=True)
class Compiled:
    """What ptxas says of one kernel."""

    case: str
    kernel: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    wgmma: int
    mma: int
    async_copies: int
    wide_loads: int  # of 128 bits

    @property
    def fits(self) -> bool:
        return self.spilled_bytes == 0 and self.shared_bytes <= SHARED_BYTES


class _NoDevice:
    """A driver with a target and nothing behind it."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention_batch(sequences: int = 8, blocks: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    int32 = torch.int32
    return tensor(sequences + 1, dtype=int32), tensor(sequences, dtype=int32), tensor(sequences, blocks, dtype=int32)


def pool(head_dim: int, dtype: torch.dtype, block_size: int = BLOCK_SIZE) -> Tensor:
    return tensor(1024, 8, 2, block_size, head_dim, dtype=dtype)


def decode(
    head_dim: int,
    itemsize: int,
    *,
    group: int = 4,
    block_size: int = BLOCK_SIZE,
    window: int | None = None,
    processors: int = 132,
    batch: tuple[int, int] = (8, 128),
):
    dtype = DTYPES[itemsize]
    queries = tensor(8, 8 * group, head_dim, dtype=dtype)
    kv = pool(head_dim, dtype, block_size)
    decode_attention(torch.empty_like(queries), queries, kv, *attention_batch(*batch), window=window, processors=processors)


def prefill(
    head_dim: int,
    itemsize: int,
    *,
    group: int = 4,
    block_size: int = BLOCK_SIZE,
    window: int | None = None,
    batch: tuple[int, int] = (8, 128),
):
    dtype = DTYPES[itemsize]
    queries = tensor(2048, 8 * group, head_dim, dtype=dtype)
    prefill_attention(torch.empty_like(queries), queries, pool(head_dim, dtype, block_size), *attention_batch(*batch), window=window)


def rotate(head_dim: int, *, normalized: bool):
    kv = pool(head_dim, torch.bfloat16)
    weight = tensor(40, head_dim) if normalized else None
    for tokens in (16, 1024):
        cos, sin = (tensor(tokens, 1, head_dim) for _ in range(2))
        rotate_and_store(kv, tensor(tokens, 48 * head_dim), weight, 1e-6, (cos, sin), tensor(tokens, dtype=torch.int64))


def store(head_dim: int):
    kv_store(pool(head_dim, torch.bfloat16), tensor(16, 8, head_dim), tensor(16, 8, head_dim), tensor(16, dtype=torch.int64))


def norm(dim: int):
    rms_norm(tensor(16, dim), tensor(dim), 1e-6)
    add_rms_norm(tensor(16, dim), tensor(16, dim), tensor(dim), 1e-6)


def project(rows: int, outputs: int, inputs: int, dtype: torch.dtype = torch.bfloat16):
    x, weight, bias = (tensor(*shape, dtype=dtype) for shape in ((rows, inputs), (outputs, inputs), (outputs,)))
    linear(x, weight, bias)
    linear_silu_mul(x, weight, bias)


def copy():
    kv, staging, ids = tensor(36, 1024, 8, 2, 64, 128), tensor(36, 16, 4, 2, 64, 128), tensor(16, dtype=torch.int32)
    gather_blocks(staging, kv, ids, layers=range(36), heads=range(4, 8))
    scatter_blocks(kv, staging, ids, layers=range(36), heads=range(4, 8))


def repacked(block_size: int, target_size: int, target: torch.dtype, head_dim: int = 128, *, span: tuple[int, int] = (0, 1024)):
    start, num_tokens = span
    kv, ids = tensor(36, 1024, 8, 2, block_size, head_dim), tensor(-(-(start + num_tokens) // block_size), dtype=torch.int64)
    in_head = (fp8.head_bytes(target_size, head_dim),) if target == torch.uint8 else (2, target_size, head_dim)
    out = tensor(36, -(-num_tokens // target_size), 4, *in_head, dtype=target)
    repack(out, kv, ids, layers=range(36), heads=range(4, 8), start=start, num_tokens=num_tokens)


def unpacked(dtype: torch.dtype, *, count: int = 16, wire_blocks: int = 32):
    kv, wire = tensor(36, 1024, 8, 2, 64, 128, dtype=dtype), tensor(36, wire_blocks, 8, fp8.head_bytes(64, 128), dtype=torch.uint8)
    ids = tensor(count, dtype=torch.int64)
    unpack_fp8(kv, wire, ids, ids)


def draw(*, any_top_k: bool, any_top_p: bool):
    floats = [tensor(16, dtype=torch.float32) for _ in range(3)]
    temperatures, top_p, floors = floats
    seeds, positions = (tensor(16, dtype=torch.int64) for _ in range(2))
    top_k = tensor(16, dtype=torch.int32)
    draws = Draws(temperatures, top_k, top_p, floors, seeds, positions, any_top_k, any_top_p)
    sample(tensor(16, VOCAB_SIZE, dtype=torch.float32), draws)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """(its name, what launches it)."""
    for head_dim, itemsize in configurations.DECODE:
        name = f"head_dim {head_dim} {DTYPES[itemsize]}".replace("torch.", "")
        yield f"decode {name}", lambda d=head_dim, i=itemsize: decode(d, i)
    for head_dim, itemsize in configurations.PREFILL:
        name = f"head_dim {head_dim} {DTYPES[itemsize]}".replace("torch.", "")
        yield f"prefill {name}", lambda d=head_dim, i=itemsize: prefill(d, i)
    for head_dim in (64, 128):
        yield f"decode window, head_dim {head_dim}", lambda d=head_dim: decode(d, 2, window=4096)
        yield f"prefill window, head_dim {head_dim}", lambda d=head_dim: prefill(d, 2, window=4096)
    yield "decode unsplit", lambda: decode(128, 2, processors=1)
    yield "decode blocks of 16", lambda: decode(128, 2, block_size=16)
    yield "prefill blocks of 16", lambda: prefill(128, 2, block_size=16)
    yield "decode head_dim 80", lambda: decode(80, 2)
    yield "prefill head_dim 80", lambda: prefill(80, 2)
    yield "prefill head_dim 96, 7 heads a group", lambda: prefill(96, 2, group=7)
    for head_dim in (64, 80, 128, 256):
        yield f"rotate and store, head_dim {head_dim}", lambda d=head_dim: rotate(d, normalized=True)
    yield "rotate and store, not normalized", lambda: rotate(128, normalized=False)
    yield "KV store", lambda: store(128)
    for tile in configurations.NORM:
        yield f"norm of {tile.size}", lambda n=tile.size: norm(n)
    for rows in (1, 8):
        for outputs, inputs in ((4096, 12288), (24576, 4096), (151936, 4096)):
            for dtype in DTYPES.values():
                name = f"linear, {rows} x {inputs} to {outputs} {dtype}".replace("torch.", "")
                yield name, lambda n=rows, o=outputs, i=inputs, d=dtype: project(n, o, i, d)
    yield "linear, uneven", lambda: [project(n, 2500, 1000) for n in (1, 2)]
    yield "SiLU-mul", lambda: silu_mul(tensor(16, 2 * 12288))
    yield "block copy", copy
    for block_size, target_size in ((64, 64), (16, 64), (64, 16)):
        for target in (torch.bfloat16, torch.float32, torch.uint8):
            name = f"repack, blocks of {block_size} to {target_size}, {target}".replace("torch.", "").replace("uint8", "fp8")
            yield name, lambda b=block_size, t=target_size, d=target: repacked(b, t, d)
    yield "repack, head_dim 80", lambda: repacked(64, 64, torch.bfloat16, 80)
    for dtype in DTYPES.values():
        yield f"unpack to {dtype}".replace("torch.", ""), lambda d=dtype: unpacked(d)
    yield "sample", lambda: draw(any_top_k=False, any_top_p=False)
    yield "sample, top-k and top-p", lambda: draw(any_top_k=True, any_top_p=True)
    yield "log-probabilities", lambda: logprobs(tensor(16, VOCAB_SIZE, dtype=torch.float32), tensor(16, 21, dtype=torch.int64))


def served() -> Iterator[tuple[str, list[Callable[[], None]]]]:
    """(what a node does, launches of it that differ as its steps or writes do): of each kernel one is compiled, before requests come."""
    for target in (torch.bfloat16, torch.uint8):
        spans = ((0, 1024), (5, 1), (48, 999), (0, 16))  # from which token of a block on, how many
        yield f"repack to {target}", [partial(repacked, 64, 16, target, span=span) for span in spans]
    yield "unpack", [partial(unpacked, torch.bfloat16, count=count, wire_blocks=blocks) for count, blocks in ((16, 32), (1, 33), (5, 48))]
    batches = ((8, 128), (1, 127), (16, 97))  # sequences, blocks of the longest
    yield "decode", [partial(decode, 128, 2, batch=batch) for batch in batches]
    yield "prefill", [partial(prefill, 128, 2, batch=batch) for batch in (*batches, (1, 1))]
    yield "linear", [partial(linear, tensor(rows, 4096), tensor(4096, 4096), None) for rows in (2, 5, 16)]
    logits = tensor(16, VOCAB_SIZE, dtype=torch.float32)
    yield "log-probabilities", [partial(logprobs, logits, tensor(16, count, dtype=torch.int64)) for count in (1, 6, 16, 21)]


def compile_all(only_first: bool = False) -> tuple[list[Compiled], list[str]]:
    """What each takes, and what of `served` is compiled more than once.

    `only_first`: of each kernel, for each setting of its switches, only the configuration that is launched first, and nothing of `served`.
    """
    triton.runtime.driver.set_active(_NoDevice())
    triton.knobs.nvidia.dump_ptxas_log = True
    found: list[Compiled] = []
    anew: list[str] = []
    wanted = _Firsts() if only_first else _every
    with tempfile.TemporaryDirectory() as cache:  # a kernel from a cache has no log
        triton.knobs.cache.dir = cache
        for case, launch in cases():
            with _launches_compiled(case, found, wanted):
                launch()
        for what, launches in () if only_first else served():
            with _launches_compiled(what, found, _every) as hashes:
                for launch in launches:
                    launch()
            anew += [f"{what}: {kernel} is compiled {len(each)} times" for kernel, each in hashes.items() if len(each) > 1]
    return found, anew


def _every(kernel: Any, options: dict[str, Any]) -> bool:
    return True


class _Firsts:
    """Whether a kernel has not been launched yet with these values of its switches, which decide what of it is compiled."""

    def __init__(self) -> None:
        self._launched: set[tuple[object, ...]] = set()

    def __call__(self, kernel: Any, options: dict[str, Any]) -> bool:
        switches = ((name, value) for name, value in sorted(options.items()) if isinstance(value, bool))
        one = (kernel.fn, *switches)
        is_first = one not in self._launched
        self._launched.add(one)
        return is_first


@contextlib.contextmanager
def _launches_compiled(case: str, found: list[Compiled], wanted: Callable[[Any, dict[str, Any]], bool]) -> Iterator[dict[str, set[str]]]:
    """Within, a launch that is wanted compiles, and adds a row to `found` if it had not been compiled before.

    By kernel: hashes of what is launched.
    """
    hashes: dict[str, set[str]] = defaultdict(set)

    def launcher(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            if not wanted(kernel, options):
                return
            log = io.StringIO()
            with contextlib.redirect_stdout(log):
                compiled = kernel.run(*args, grid=grid, warmup=True, **options)
            hashes[kernel.__name__].add(compiled.hash)
            if log.getvalue():
                found.append(_row(case, kernel.__name__, compiled, log.getvalue()))

        return launch

    with patch.object(triton.runtime.JITFunction, "__getitem__", launcher):
        yield hashes


def _row(case: str, kernel: str, compiled: Any, log: str) -> Compiled:
    ptx = compiled.asm["ptx"]
    return Compiled(
        case=case,
        kernel=kernel,
        registers=max(int(count) for count in re.findall(r"Used (\d+) registers", log)),
        spilled_bytes=sum(int(count) for count in re.findall(r"(\d+) bytes spill", log)),
        shared_bytes=compiled.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma=ptx.count("mma.sync"),
        async_copies=ptx.count("cp.async.cg"),
        wide_loads=len(re.findall(r"ld\.global[.\w:]*\.v4\.b32|ld\.global[.\w:]*\.v2\.b64", ptx)),
    )


def table(rows: list[Compiled]) -> str:
    lines = [f"{'case':40}{'kernel':18}{'regs':>5}{'spill':>6}{'shared KB':>10}{'wgmma':>6}{'mma':>5}{'cp.async':>9}{'ld.128':>7}"]
    for row in rows:
        lines.append(
            f"{row.case:40}{row.kernel:18}{row.registers:5}{row.spilled_bytes:6}{row.shared_bytes / 1024:10.1f}"
            f"{row.wgmma:6}{row.mma:5}{row.async_copies:9}{row.wide_loads:7}{'' if row.fits else '  DOES NOT FIT'}"
        )
    return "\n".join(lines)


def main() -> int:
    assert "TRITON_INTERPRET" not in os.environ, "an interpreted kernel cannot be compiled"
    rows, anew = compile_all(only_first="--first" in sys.argv[1:])
    print(f"triton {triton.__version__}, sm_90\n{table(rows)}", *anew, sep="\n")
    return 0 if rows and all(row.fits for row in rows) and not anew else 1


if __name__ == "__main__":
    sys.exit(main())
