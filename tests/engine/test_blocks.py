"""Blocks come and go by reference counts alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggd.engine.blocks import BlockPool
from disaggd.ids import BlockId


def taken(pool: BlockPool, count: int) -> list[BlockId]:
    blocks = pool.allocate(count)
    assert blocks is not None
    return blocks


def test_allocated_blocks_are_neighbours_and_distinct() -> None:
    pool = BlockPool(4, 16)
    assert taken(pool, 3) == [0, 1, 2]
    assert pool.num_free == 1


def test_too_large_an_allocation_takes_nothing() -> None:
    pool = BlockPool(4, 16)
    assert pool.allocate(5) is None
    assert pool.num_free == 4


def test_a_block_is_free_when_the_last_holder_lets_go() -> None:
    pool = BlockPool(2, 16)
    blocks = taken(pool, 2)
    pool.retain(blocks[:1])
    pool.release(blocks)
    assert (pool.num_free, pool.references(blocks[0]), pool.references(blocks[1])) == (1, 1, 0)
    pool.release(blocks[:1])
    assert pool.num_free == 2


def test_a_freed_block_waits_behind_those_freed_before() -> None:
    pool = BlockPool(3, 16)
    blocks = taken(pool, 3)
    pool.release([blocks[2]])
    pool.release([blocks[0]])
    assert taken(pool, 2) == [blocks[2], blocks[0]]


def test_double_free_and_late_retain_are_caught() -> None:
    pool = BlockPool(1, 16)
    blocks = taken(pool, 1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.release(blocks)
    with pytest.raises(AssertionError, match="is free"):
        pool.retain(blocks)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_blocks_for_rounds_up(num_tokens: int, num_blocks: int) -> None:
    assert BlockPool(4, 16).blocks_for(num_tokens) == num_blocks


def test_a_grant_leaves_growth_and_margin() -> None:
    pool = BlockPool(100, 16)
    taken(pool, 50)
    assert pool.room_for_grant(50 - 5 - 3, num_running=3)
    assert not pool.room_for_grant(50 - 5 - 3 + 1, num_running=3)


def test_an_unused_pool_grants_all_it_has_and_no_more() -> None:
    pool = BlockPool(10, 16)
    assert pool.room_for_grant(10, num_running=0)
    assert not pool.room_for_grant(11, num_running=0)
    taken(pool, 1)
    assert not pool.room_for_grant(9, num_running=0)


@given(st.lists(st.tuples(st.sampled_from(["allocate", "retain", "release"]), st.integers(0, 6)), max_size=60))
def test_free_blocks_and_references_always_add_up(script: list[tuple[str, int]]) -> None:
    pool, held = BlockPool(8, 16), []
    for action, number in script:
        if action == "allocate":
            held += [[block] for block in pool.allocate(number) or []]
        elif held:
            blocks = held[number % len(held)]
            if action == "retain":
                pool.retain(blocks)
                held.append(blocks)
            else:
                pool.release(blocks)
                held.remove(blocks)
        counts = [sum(block in blocks for blocks in held) for block in range(8)]
        assert [pool.references(BlockId(block)) for block in range(8)] == counts
        assert pool.num_free == counts.count(0)
