"""The pattern tells every place from every other: moved, shifted or left-over numbers differ in nearly all of a row."""

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggd.transfer.pattern import PEAK, Pattern, block_pattern, first_mismatch

LAYERS, HEADS, HEAD_DIM, SALT = 3, 8, 16, 12345


def pattern(num_blocks: int = 2, heads: range = range(HEADS), block_size: int = 8, salt: int = SALT) -> Pattern:
    return block_pattern(LAYERS, num_blocks, heads, block_size, HEAD_DIM, salt)


def rows(blocks: Pattern) -> Pattern:
    """[layers · heads · 2 · tokens, head_dim], whatever the size of the blocks."""
    return blocks.transpose(0, 2, 3, 1, 4, 5).reshape(-1, blocks.shape[-1])


def test_it_is_the_same_on_every_node_and_in_every_version() -> None:
    assert zlib.crc32(pattern().tobytes()) == 0x85DD57C3


@given(st.integers(1, 9), st.integers(1, 9))
def test_blocks_of_any_size_hold_the_same_tokens(one: int, other: int) -> None:
    tokens = one * other
    assert np.array_equal(rows(pattern(other, block_size=one)), rows(pattern(one, block_size=other))), tokens


@given(st.integers(0, HEADS - 1), st.integers(1, HEADS))
def test_a_rank_has_its_heads_of_it(start: int, count: int) -> None:
    heads = range(start, min(HEADS, start + count))
    assert np.array_equal(pattern(heads=heads), pattern()[:, :, heads.start : heads.stop])


def test_rows_are_not_alike() -> None:
    """Of a million pairs of them about one is."""
    all_rows = rows(pattern(num_blocks=4))
    assert len(all_rows) == LAYERS * HEADS * 2 * 32
    assert len(np.unique(all_rows, axis=0)) >= len(all_rows) - 3


@pytest.mark.parametrize("axis", range(6))
def test_whatever_is_moved_by_one_differs(axis: int) -> None:
    """Layers, blocks, heads, keys and values, tokens, dimensions."""
    blocks = pattern()
    differs = (np.roll(blocks, 1, axis) != blocks).mean()
    assert differs > 0.8


def test_another_salts_differs() -> None:
    assert (pattern(salt=1) != pattern(salt=2)).mean() > 0.8


@given(st.integers(0, 2**64 - 1))
def test_numbers_are_small_and_each_row_has_the_greatest(salt: int) -> None:
    blocks = pattern(salt=salt)
    assert np.abs(blocks).max() == PEAK
    assert (np.abs(blocks[..., 0]) == PEAK).all()


def test_what_is_right_is_no_mismatch() -> None:
    blocks = pattern()
    assert first_mismatch(blocks.astype(np.float64), blocks, np.zeros(blocks.shape, dtype=bool), range(HEADS), 16) is None


def test_a_mismatch_names_the_first_place_and_all_heads() -> None:
    blocks = pattern(heads=range(2, 6))
    found = blocks.astype(np.float64)
    found[1, 1, 3, 1, 5, 7] = 99.0
    found[2, 0, 0] += 1
    mismatch = first_mismatch(found, blocks, found != blocks, range(2, 6), 16)
    assert mismatch is not None
    assert (mismatch.num_wrong, mismatch.num_compared) == (1 + 2 * 8 * HEAD_DIM, blocks.size)
    assert mismatch.heads == (2, 5)
    assert (mismatch.layer, mismatch.head, mismatch.values, mismatch.token, mismatch.dim, mismatch.found) == (1, 5, True, 13, 7, 99.0)
    assert str(mismatch).endswith(f"first in layer 1, head 5, token 13, values[7]: 99 in place of {blocks[1, 1, 3, 1, 5, 7]}")
