"""How the Triton kernels are tiled: plain data, one row per kind of work. Knows no tensors and no devices.

Nothing is tuned at run time: a tuning run would stall the first requests, and differ between the nodes of a cluster. Each row is compiled
for sm_90 by `tests/kernels/test_compile_sm90.py`, which fails on register spills and on more shared memory than a Hopper SM has; the
comments carry what `python tools/compile_kernels.py` printed. How fast the rows are only a GPU can say: nothing here has been timed.
"""

from dataclasses import dataclass

MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """One program of decode attention holds a KV head's query heads, and walks `keys` tokens of the context at a time."""

    keys: int
    warps: int
    stages: int
    """Tiles of K and V in flight at once, by cp.async."""
    programs: int
    """How many fit a multiprocessor beside each other, by shared memory."""


@dataclass(frozen=True, slots=True)
class PrefillTile:
    """One program of prefill attention holds `rows` (token, query head) pairs of one KV head, and walks `keys` tokens at a time."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class RowTile:
    """One program of an elementwise kernel works on `size` elements of a row, or on `size` heads of a token."""

    size: int
    warps: int


# By (head_dim rounded up to a power of two, bytes per element). bf16 and float16 compile to the same tensor-core shapes. float32 multiplies
# without them, exactly: it is for checking a model's numbers, not for serving it.
DECODE = {
    (16, 2): DecodeTile(keys=128, warps=4, stages=3, programs=4),
    (32, 2): DecodeTile(keys=128, warps=4, stages=3, programs=4),
    (64, 2): DecodeTile(keys=128, warps=4, stages=3, programs=2),
    (128, 2): DecodeTile(keys=64, warps=4, stages=3, programs=2),
    (256, 2): DecodeTile(keys=32, warps=4, stages=3, programs=2),
    (16, 4): DecodeTile(keys=64, warps=4, stages=2, programs=2),
    (32, 4): DecodeTile(keys=64, warps=4, stages=2, programs=2),
    (64, 4): DecodeTile(keys=32, warps=4, stages=2, programs=2),
    (128, 4): DecodeTile(keys=32, warps=4, stages=2, programs=2),
    (256, 4): DecodeTile(keys=16, warps=4, stages=2, programs=2),
}

PREFILL = {
    (16, 2): PrefillTile(rows=128, keys=64, warps=4, stages=3),
    (32, 2): PrefillTile(rows=128, keys=64, warps=4, stages=3),
    (64, 2): PrefillTile(rows=128, keys=64, warps=4, stages=3),
    (128, 2): PrefillTile(rows=128, keys=64, warps=8, stages=3),
    (256, 2): PrefillTile(rows=128, keys=32, warps=8, stages=3),
    (16, 4): PrefillTile(rows=32, keys=32, warps=4, stages=2),
    (32, 4): PrefillTile(rows=32, keys=32, warps=4, stages=2),
    (64, 4): PrefillTile(rows=32, keys=32, warps=4, stages=2),
    (128, 4): PrefillTile(rows=32, keys=32, warps=8, stages=2),
    (256, 4): PrefillTile(rows=16, keys=16, warps=8, stages=2),
}

MIN_SPLIT_KEYS = 256
"""A context is not split finer: below that, combining costs more than the parallelism wins."""

MAX_SPLITS = 64

COMBINE_SPLITS = 16
"""Partial results that the combining kernel reads at a time."""

NORM = (RowTile(1024, 4), RowTile(2048, 4), RowTile(4096, 8), RowTile(8192, 16), RowTile(16384, 16))
"""By width: the first row that holds it."""

SILU_MUL = RowTile(1024, 4)  # 8 elements a thread: one 128-bit load of bf16

ROTATE = RowTile(8, 4)

COPY = RowTile(4096, 4)  # 128-bit loads, 4 in flight per thread

VOCABULARY = RowTile(2048, 4)
"""A program of the samplers' kernels: 75 of them share a row of 152k logits, so that one row alone keeps half of an H100 busy."""
