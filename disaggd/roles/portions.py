"""Which tokens one write takes to another node, and in which blocks they lie here. Pure arithmetic.

Two nodes may have blocks of different sizes. What is written is whole blocks of the target: its block is what a grant names, and
what it counts the bytes by. So a run of tokens begins and ends on the target's blocks, and anywhere in ours.
"""

from collections.abc import Iterator, Sequence

from disaggd.ids import BlockId
from disaggd.transfer.layout import Span


def portions(tokens: range, block_size: int, most: int) -> Iterator[range]:
    """`tokens`, which begin a block of `block_size`, in runs of as many whole blocks as `most` tokens may take up, and of one at least.

    The last run ends where `tokens` do.
    """
    assert tokens.start % block_size == 0
    stride = -(-most // block_size) * block_size
    for start in range(tokens.start, tokens.stop, stride):
        yield range(start, min(start + stride, tokens.stop))


def span(table: Sequence[BlockId], block_size: int, tokens: range) -> Span:
    """Where `tokens`, one at least, of a sequence lie whose blocks, of `block_size`, are `table`."""
    first, last = tokens.start // block_size, -(-tokens.stop // block_size)
    assert first < last <= len(table), "all of the tokens are in the table's blocks"
    return Span(tuple(table[first:last]), tokens.start % block_size, len(tokens))
