"""A pattern for blocks of KV: what stands at each place is a pure function of that place, the same on every node.

It is cut out of one long noise: which window a token's keys, or values, of a head in a layer are, a hash of those and of a salt says. So
a row that came to another's place, or one shifted by a few numbers, differs in nearly all of it, and one that was left from another
salt does too. All numbers are whole, and none is above `PEAK`: every dtype holds them exactly, fp8 (e4m3) too, with the scale that
the first number of each row sees to.
"""

from functools import cache

import msgspec
import numpy as np
from numpy.typing import NDArray

PEAK = 7
"""The greatest number, of either sign; the first of each row is one of the two."""

_NOISE_LENGTH = 2**20
"""A megabyte, which is in the processor's cache; two given rows are the same window once in a million salts."""

Pattern = NDArray[np.int8]
Words = NDArray[np.uint64]


class Mismatch(msgspec.Struct, frozen=True, array_like=True):
    """What is not as it should be in a rank's blocks; places are the whole cache's: heads of all ranks, tokens from the first block on."""

    num_wrong: int
    """Numbers, of `num_compared`."""
    num_compared: int
    heads: tuple[int, ...]
    """In which some are wrong."""
    layer: int
    """Of the first one, as what follows."""
    head: int
    values: bool
    """Not keys."""
    token: int
    dim: int
    found: float
    expected: float

    def __str__(self) -> str:
        what = "values" if self.values else "keys"
        return (
            f"{self.num_wrong:,} of {self.num_compared:,} numbers differ, first in layer {self.layer}, head {self.head}, "
            f"token {self.token}, {what}[{self.dim}]: {self.found:g} in place of {self.expected:g}"
        )


def block_pattern(num_layers: int, num_blocks: int, heads: range, block_size: int, head_dim: int, salt: int) -> Pattern:
    """The first `num_blocks` blocks of the pattern, in a rank that holds `heads`: int8 [layers, blocks, heads, 2, block_size, head_dim].

    `salt` is any number of 64 bits: with another one nearly all is different.
    """
    layer = np.arange(num_layers, dtype=np.uint64).reshape(-1, 1, 1, 1, 1)
    token = np.arange(num_blocks * block_size, dtype=np.uint64).reshape(-1, 1, 1, block_size)
    head = np.arange(heads.start, heads.stop, dtype=np.uint64).reshape(-1, 1, 1)
    values = np.arange(2, dtype=np.uint64).reshape(-1, 1)
    place = (layer << np.uint64(48)) | (head << np.uint64(32)) | (values << np.uint64(31)) | token
    word = _scrambled(place ^ _scrambled(np.array(salt, dtype=np.uint64)))  # [layers, blocks, heads, 2, block_size]
    noise = _noise()
    windows = np.lib.stride_tricks.sliding_window_view(noise, head_dim)
    rows: Pattern = windows[word % np.uint64(len(windows))]
    rows[..., 0] = np.where(word >> np.uint64(63), PEAK, -PEAK)
    return rows


def first_mismatch(
    found: NDArray[np.float64], expected: Pattern, is_wrong: NDArray[np.bool_], heads: range, num_tokens: int
) -> Mismatch | None:
    """What is wrong of `found`, compared with `expected`; both, and `is_wrong`: [layers, blocks, heads, 2, block_size, head_dim].

    Of the blocks the first `num_tokens` were compared. None if nothing is wrong.
    """
    num_wrong = int(is_wrong.sum())
    if not num_wrong:
        return None
    place = np.unravel_index(int(is_wrong.argmax()), is_wrong.shape)
    layer, block, head, values, slot, dim = (int(i) for i in place)
    return Mismatch(
        num_wrong=num_wrong,
        num_compared=is_wrong.size // (is_wrong.shape[1] * is_wrong.shape[4]) * num_tokens,
        heads=tuple(heads.start + int(i) for i in np.flatnonzero(is_wrong.any(axis=(0, 1, 3, 4, 5)))),
        layer=layer,
        head=heads.start + head,
        values=bool(values),
        token=block * is_wrong.shape[4] + slot,
        dim=dim,
        found=float(found[place]),
        expected=float(expected[place]),
    )


@cache
def _noise() -> Pattern:
    word = _scrambled(np.arange(_NOISE_LENGTH, dtype=np.uint64))
    noise: Pattern = ((word >> np.uint64(32)) % np.uint64(2 * PEAK + 1)).astype(np.int8) - np.int8(PEAK)
    return noise


def _scrambled(words: Words) -> Words:
    """Each bit of a word depends on all of it: the finalizer of splitmix64 (Steele, Lea and Flood, 2014)."""
    with np.errstate(over="ignore"):
        words = (words + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(words ^ (words >> np.uint64(31)), dtype=np.uint64)
