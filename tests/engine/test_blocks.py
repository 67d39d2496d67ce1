"""Blocks come and go by reference counts alone; what was registered is found until its memory is wanted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggd.engine.blocks import BlockPool, CacheChanges
from disaggd.ids import BlockId
from disaggd.prefix import PrefixHasher


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


# ── what can be found ────────────────────────────────────────────────────────────────────────────────────────────────

HASHER = PrefixHasher("model", "float32", 2)


def digests(*tokens: int) -> list[bytes]:
    return HASHER.digests(tokens)


def caching(num_blocks: int = 4, hash_bytes: int = 16) -> BlockPool:
    return BlockPool(num_blocks, 2, PrefixHasher("model", "float32", 2, hash_bytes))


def registered(pool: BlockPool, *tokens: int) -> list[BlockId]:
    """Held blocks, registered for `tokens`."""
    chain = digests(*tokens)
    blocks = taken(pool, len(chain))
    for block, digest in zip(blocks, chain, strict=True):
        pool.register(block, digest)
    return blocks


def test_registered_blocks_are_found_held_or_not() -> None:
    pool = caching()
    blocks = registered(pool, 1, 2, 3, 4)
    assert pool.find(digests(1, 2, 3, 4, 5, 6)) == blocks
    pool.release(blocks)
    assert (pool.num_free, pool.num_cached, pool.num_available) == (2, 2, 4)
    assert pool.find(digests(1, 2, 9, 9)) == blocks[:1]
    assert pool.find(digests(9, 9, 3, 4)) == []


def test_a_taken_block_is_no_longer_available() -> None:
    pool = caching()
    blocks = registered(pool, 1, 2, 3, 4)
    pool.release(blocks)
    assert pool.num_unheld(blocks) == 2
    pool.take(blocks[:1])
    pool.take(blocks[:1])
    assert (pool.references(blocks[0]), pool.num_unheld(blocks), pool.num_available) == (2, 1, 3)


def test_free_blocks_go_before_cached_ones_and_the_least_recently_used_of_those() -> None:
    pool = caching()
    old, young = registered(pool, 1, 2), registered(pool, 3, 4)
    pool.release(old)
    pool.release(young)
    pool.take(old)
    pool.release(old)
    assert taken(pool, 3) == [2, 3, *young]
    assert pool.find(digests(1, 2)) == old
    assert pool.find(digests(3, 4)) == []
    assert pool.num_evicted == 1


def test_of_a_sequence_the_deepest_blocks_are_evicted_first_and_come_back_as_neighbours() -> None:
    pool = caching()
    blocks = registered(pool, 1, 2, 3, 4, 5, 6, 7, 8)
    pool.release(blocks)
    assert taken(pool, 2) == blocks[2:]
    assert pool.find(digests(1, 2, 3, 4, 5, 6)) == blocks[:2]


def test_touched_blocks_count_as_used_now_whatever_the_order_they_were_released_in() -> None:
    pool = caching()
    blocks, other = registered(pool, 1, 2, 3, 4), registered(pool, 5, 6)
    for block in blocks:
        pool.release([block])
    pool.release(other)
    pool.touch(digests(1, 2, 3, 4))
    taken(pool, 1 + 2)
    assert pool.find(digests(1, 2, 3, 4)) == blocks[:1]


def test_of_two_blocks_with_the_same_tokens_one_is_registered() -> None:
    pool = caching()
    first, second = registered(pool, 1, 2), registered(pool, 1, 2)
    assert pool.find(digests(1, 2)) == first
    pool.release(second)
    assert (pool.num_free, pool.num_cached) == (3, 0)


def test_a_collision_of_hashes_finds_nothing_of_others() -> None:
    pool = caching(hash_bytes=1)
    mine = digests(0, 0)
    others = next(chain for token in range(1, 10_000) if (chain := digests(token, 0))[0][:1] == mine[0][:1])
    (block,) = taken(pool, 1)
    pool.register(block, others[0])
    assert pool.find(mine) == []
    (private,) = taken(pool, 1)
    pool.register(private, mine[0])
    assert pool.find(mine) == []
    assert pool.find(others) == [block]


def test_changes_are_told_once_and_what_came_and_went_not_at_all() -> None:
    pool = caching(2)
    names = [HASHER.hash(digest) for digest in digests(1, 2, 3, 4)]
    pool.release(registered(pool, 1, 2, 3, 4))
    assert pool.take_changes() == CacheChanges(tuple(names), ())
    assert pool.hashes() == names
    taken(pool, 1)
    assert pool.take_changes() == CacheChanges((), (names[1],))
    assert pool.take_changes() == CacheChanges((), ())
    pool.clear()
    pool.release(registered(pool, 1, 2))
    assert pool.take_changes() == CacheChanges((), ())
    pool.release(registered(pool, 5, 6))
    pool.clear()
    assert pool.take_changes() == CacheChanges((), (names[0],))


def test_only_held_blocks_are_registered_and_only_registered_ones_taken() -> None:
    pool = caching()
    (block,) = taken(pool, 1)
    with pytest.raises(AssertionError, match="not registered"):
        pool.take([block])
    pool.release([block])
    with pytest.raises(AssertionError, match="nothing to register"):
        pool.register(block, digests(1, 2)[0])


def test_a_pool_without_a_hasher_finds_nothing() -> None:
    pool = BlockPool(4, 2)
    pool.release(taken(pool, 4))
    assert (pool.find(digests(1, 2)), pool.num_cached, pool.hashes()) == ([], 0, [])


@given(st.lists(st.tuples(st.sampled_from(["begin", "grow", "end", "clear"]), st.integers(0, 7), st.integers(1, 4)), max_size=80))
def test_free_cached_and_held_always_add_up(script: list[tuple[str, int, int]]) -> None:
    pool, held, known = caching(8), [], set()
    for action, number, count in script:
        if action == "begin":
            chain = digests(*[number % 3] * (2 * count))
            found = pool.find(chain)
            pool.take(found)
            fresh = pool.allocate(count - len(found))
            if fresh is None:
                pool.release(found)
                continue
            for block, digest in zip(fresh, chain[len(found) :], strict=True):
                pool.register(block, digest)
            held.append(found + fresh)
        elif action == "grow" and held and (fresh := pool.allocate(1)):
            held[number % len(held)] += fresh
        elif action == "end" and held:
            pool.release(held.pop(number % len(held)))
        elif action == "clear":
            pool.clear()
        counts = [sum(block in blocks for blocks in held) for block in range(8)]
        assert [pool.references(BlockId(block)) for block in range(8)] == counts
        assert pool.num_free + pool.num_cached == counts.count(0)
        assert not any(counts[block] for block in (*pool._free, *pool._cached))
        changes = pool.take_changes()
        assert not known & set(changes.stored)
        known = (known | set(changes.stored)) - set(changes.evicted)
        assert known == set(pool.hashes())
