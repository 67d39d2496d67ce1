"""How the Triton kernels are tiled: plain data, one row per kind of work. Knows no tensors and no devices.

Nothing is tuned at run time: a tuning run would stall the first requests, and differ between the nodes of a cluster. Each row is compiled
for sm_90 by `tests/kernels/compile_sm90.py`, which fails on register spills and on more shared memory than a Hopper SM has, and prints what
the comments quote. Timed on an H200, where `bench/kernels.py` repeats it.
"""

from dataclasses import dataclass

MAX_HEAD_DIM = 256


def padded_head_dim(head_dim: int) -> int:
    """The row of `DECODE` and `PREFILL` for heads of so many coordinates: the next power of two, 32 at least."""
    assert 0 < head_dim <= MAX_HEAD_DIM, f"the attention kernels take heads of up to {MAX_HEAD_DIM} coordinates, not {head_dim}"
    return max(32, 1 << (head_dim - 1).bit_length())


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
class LinearTile:
    """One program of a projection makes so many outputs, and walks `depth` inputs at a time."""

    outputs: int
    depth: int
    warps: int
    stages: int = 1


@dataclass(frozen=True, slots=True)
class RowTile:
    """One program of an elementwise kernel works on `size` elements of a row, or on `size` heads of a token."""

    size: int
    warps: int


# By (`padded_head_dim`, bytes per element). bf16 and float16 compile to the same tensor-core shapes. float32 multiplies
# without them, exactly: it is for checking a model's numbers, not for serving it.
#
# A tile of K waits for its block id, so the compiler spends every other stage on ids: 3 stages keep one tile of K and V in flight, 5 keep
# two (by the shared memory they take: 38 and 70 KB for 64 keys of 128 in decode, 96 and 129 in prefill).
DECODE = {
    (32, 2): DecodeTile(keys=128, warps=4, stages=5, programs=4),
    (64, 2): DecodeTile(keys=128, warps=4, stages=5, programs=3),
    (128, 2): DecodeTile(keys=64, warps=4, stages=7, programs=2),
    (256, 2): DecodeTile(keys=32, warps=4, stages=5, programs=3),
    (32, 4): DecodeTile(keys=64, warps=4, stages=3, programs=4),
    (64, 4): DecodeTile(keys=32, warps=4, stages=3, programs=3),
    (128, 4): DecodeTile(keys=32, warps=8, stages=3, programs=3),
    (256, 4): DecodeTile(keys=16, warps=8, stages=3, programs=3),
}

PREFILL = {
    (32, 2): PrefillTile(rows=128, keys=64, warps=8, stages=5),
    (64, 2): PrefillTile(rows=128, keys=64, warps=8, stages=5),  # 127 registers: two programs a multiprocessor
    (128, 2): PrefillTile(rows=128, keys=64, warps=8, stages=5),  # 190; 128 keys take 254
    (256, 2): PrefillTile(rows=128, keys=32, warps=8, stages=3),
    (32, 4): PrefillTile(rows=32, keys=32, warps=4, stages=3),
    (64, 4): PrefillTile(rows=32, keys=32, warps=4, stages=3),
    (128, 4): PrefillTile(rows=32, keys=16, warps=8, stages=3),
    (256, 4): PrefillTile(rows=16, keys=16, warps=8, stages=3),
}

MIN_SPLIT_KEYS = 128
"""A context is not split finer: below that, combining costs more than the parallelism wins."""

MAX_SPLITS = 64

COMBINE_SPLITS = 16
"""Partial results that the combining kernel reads at a time."""

NORM = (RowTile(1024, 4), RowTile(2048, 4), RowTile(4096, 8), RowTile(8192, 16), RowTile(16384, 16))
"""By width: the first row that holds it."""

SILU_MUL = RowTile(1024, 4)  # 8 elements a thread: one 128-bit load of bf16

ROTATE = RowTile(8, 1)  # 128-bit loads from a head_dim of 64 on
ROTATE_FEW = RowTile(2, 1)
"""For up to `FEW_TOKENS`, whose few programs would leave most of the device idle."""
FEW_TOKENS = 64

COPY = RowTile(4096, 4)  # 128-bit loads, 4 in flight per thread

REPACK = RowTile(4096, 4)
"""Likewise: tokens of one head's keys, or values."""

VOCABULARY = RowTile(2048, 4)
"""A program of the samplers' kernels: 75 of them share a row of 152k logits, so that one row alone keeps half of an H100 busy."""

COUNT = RowTile(512, 8)  # of those, entries whose digits are counted at a time, each against all 16: 32 64-bit sums a thread

LEAST_ENTRIES = 32
"""Of a row of logits, looked up by one warp: more than a request may ask for, so that one kernel serves them all."""

MOST_ROWS = 16
"""Rows that our projections take; more are the vendor's library's."""

# By bytes per element. One program of these fills a multiprocessor's shared memory: launched ahead of their turn, two would share one while
# others stay idle.
LINEAR_ROWS = {2: LinearTile(outputs=64, depth=256, warps=4, stages=3), 4: LinearTile(outputs=64, depth=64, warps=4, stages=3)}
LINEAR_ROWS_WIDE = {2: LinearTile(outputs=128, depth=128, warps=8, stages=4), 4: LinearTile(outputs=64, depth=64, warps=4, stages=3)}
LINEAR_ROWS_GATED = {2: LinearTile(outputs=64, depth=128, warps=4, stages=4), 4: LinearTile(outputs=64, depth=32, warps=4, stages=3)}
LINEAR_ROW = LinearTile(outputs=2, depth=2048, warps=4)
LINEAR_ROW_GATED = LinearTile(outputs=2, depth=1024, warps=4)
ADD_PARTS = RowTile(1024, 4)
