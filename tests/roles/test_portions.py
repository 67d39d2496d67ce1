"""Runs of tokens that are whole blocks of the target's, and where they lie in ours."""

from hypothesis import given
from hypothesis import strategies as st

from disaggd.ids import BlockId
from disaggd.roles.portions import portions, span
from disaggd.transfer.layout import Span

SIZES = st.integers(1, 70)


@given(block_size=SIZES, most=SIZES, first=st.integers(0, 20), count=st.integers(0, 400))
def test_portions_follow_each_other_and_each_but_the_last_ends_with_a_block(block_size: int, most: int, first: int, count: int) -> None:
    start = first * block_size
    tokens = range(start, start + count)
    parts = list(portions(tokens, block_size, most))
    assert [token for part in parts for token in part] == list(tokens)
    assert all(part.stop % block_size == 0 for part in parts[:-1])
    assert all(0 < -(-len(part) // block_size) <= -(-most // block_size) for part in parts)


@given(block_size=SIZES, start=st.integers(0, 400), count=st.integers(1, 400))
def test_a_span_finds_every_token_in_its_own_block(block_size: int, start: int, count: int) -> None:
    table = [BlockId(1000 + i) for i in range(-(-(start + count) // block_size))]
    found = span(table, block_size, range(start, start + count))
    slots = [(found.blocks[(found.start + i) // block_size], (found.start + i) % block_size) for i in range(found.num_tokens)]
    assert slots == [(table[token // block_size], token % block_size) for token in range(start, start + count)]
    assert {block for block, _ in slots} == set(found.blocks), "no block is read for nothing"


def test_a_span_that_begins_amid_a_block() -> None:
    table = [BlockId(i) for i in (7, 3, 9)]
    assert span(table, 48, range(64, 128)) == Span((BlockId(3), BlockId(9)), 16, 64)
