"""The pattern in a pool's memory: what was filled is found again, byte by byte, and nothing else is taken for it."""

import pytest
import torch

from disaggd.engine.patterns import PatternMemory, RankPatterns
from disaggd.ids import BlockId
from disaggd.kernels import fp8
from disaggd.transfer.pattern import PEAK, block_pattern

BLOCKS, TOKENS = [BlockId(4), BlockId(1)], 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pool(dtype: torch.dtype = torch.float32, heads: int = 2) -> torch.Tensor:
    return torch.full((3, 6, heads, 2, 4, 8), 0.5, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_was_filled_is_found_and_nothing_else_is_touched(dtype: torch.dtype) -> None:
    kv = pool(dtype)
    memory = PatternMemory(kv, range(2))
    memory.fill(BLOCKS, 7)
    assert memory.compare(BLOCKS, TOKENS, 7) is None
    assert torch.equal(kv[:, BLOCKS].to(torch.int8), torch.from_numpy(block_pattern(3, 2, range(2), 4, 8, 7)))
    assert (kv[:, [0, 2, 3, 5]] == 0.5).all()


def test_other_blocks_another_order_and_another_salt_are_told_apart() -> None:
    memory = PatternMemory(pool(), range(2))
    memory.fill(BLOCKS, 7)
    for blocks, salt in (([BlockId(4), BlockId(2)], 7), (BLOCKS[::-1], 7), (BLOCKS, 8)):
        assert memory.compare(blocks, TOKENS, salt) is not None


@pytest.mark.parametrize("num_tokens", [5, 7, 8])
def test_what_is_behind_the_last_token_is_nobodys(num_tokens: int) -> None:
    kv = pool()
    memory = PatternMemory(kv, range(2))
    memory.fill(BLOCKS, 7)
    kv[:, BLOCKS[1], :, :, num_tokens - 4 :] = 99
    assert memory.compare(BLOCKS, num_tokens, 7) is None
    kv[2, BLOCKS[1], 1, 1, num_tokens - 5, 3] = 99
    mismatch = memory.compare(BLOCKS, num_tokens, 7)
    assert mismatch is not None
    assert (mismatch.token, mismatch.num_wrong, mismatch.num_compared) == (num_tokens - 1, 1, 3 * 2 * 2 * num_tokens * 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bit", [0, -1], ids=["least", "sign"])
def test_one_bit_is_enough(dtype: torch.dtype, bit: int) -> None:
    """Though it may be that of a zero."""
    kv = pool(dtype)
    memory = PatternMemory(kv, range(2))
    memory.fill(BLOCKS, 7)
    place = next(tuple(index) for index in (kv[:, BLOCKS] == 0).nonzero().tolist())
    words = kv.view(torch.int32 if dtype is torch.float32 else torch.int16)
    words[place[0], BLOCKS[place[1]], *place[2:]] ^= 1 if bit == 0 else torch.iinfo(words.dtype).min
    mismatch = memory.compare(BLOCKS, TOKENS, 7)
    assert mismatch is not None
    assert mismatch.num_wrong == 1 and mismatch.layer == place[0] and mismatch.heads == (place[2],)


def test_a_rank_fills_its_heads_of_the_whole() -> None:
    whole, part = pool(heads=4), pool(heads=2)
    PatternMemory(whole, range(4)).fill(BLOCKS, 7)
    PatternMemory(part, range(1, 3)).fill(BLOCKS, 7)
    assert torch.equal(whole[:, BLOCKS][:, :, 1:3], part[:, BLOCKS])


def test_the_ranks_of_a_node_say_by_rank_what_is_wrong() -> None:
    kv = pool()
    patterns = RankPatterns(PatternMemory(kv, range(2)))
    patterns.fill(BLOCKS, 7)
    assert patterns.compare(BLOCKS, TOKENS, 7) == [None]
    kv[0, BLOCKS[0], 1, 0, 0, 0] = 0
    [mismatch] = patterns.compare(BLOCKS, TOKENS, 7)
    assert mismatch is not None and mismatch.heads == (1,)


def test_fp8_with_a_scale_holds_it_exactly() -> None:
    """The scale of a block's head takes its greatest number to the greatest of e4m3, 448: then a seventh of that is 64."""
    exact = torch.from_numpy(block_pattern(3, 2, range(2), 4, 8, 7)).float()
    scale = exact.abs().amax(dim=(-1, -2), keepdim=True) / 448
    assert (scale == PEAK / 448).all()
    assert torch.equal((exact / scale).to(torch.float8_e4m3fn).float() * scale, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_comes_through_fp8_byte_by_byte(dtype: torch.dtype) -> None:
    """What lands in fp8, and is unpacked into the pool, is compared as any other is."""
    sent, found = pool(dtype), pool(dtype)
    PatternMemory(sent, range(2)).fill(BLOCKS, 7)
    found[:, BLOCKS] = fp8.dequantize(fp8.quantize(sent[:, BLOCKS]), 4, 8, dtype)
    memory = PatternMemory(found, range(2))
    assert memory.compare(BLOCKS, TOKENS, 7) is None
    assert memory.compare(BLOCKS, TOKENS, 8) is not None
