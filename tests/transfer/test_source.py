"""Where writes read from: the pool itself, or memory that its blocks are copied to."""

import msgspec
import numpy as np
import pytest

from disaggd.errors import ConfigError
from disaggd.ids import BlockId
from disaggd.transfer.layout import KVGroup, KVSpec, PoolPlace
from disaggd.transfer.pool import Pool
from disaggd.transfer.reshape import HeadCut
from disaggd.transfer.share import Share
from disaggd.transfer.source import InPlace, Load, OutOfReach, Staged, staging_blocks
from tests.support.copies import LateCopies
from tests.support.endpoints import plain_kv, span

KV = KVSpec(dtype="float32", block_size=4, head_dim=1, groups=(KVGroup(layers=3, kv_heads=1, head_bytes=8),))
POOL = Pool(PoolPlace(4096, 10), KV)


def blocks(*ids: int) -> tuple[BlockId, ...]:
    return tuple(BlockId(block) for block in ids)


class Bench:
    """A pool of ten blocks and three layers, each descriptor holding its own number, and staging memory of two blocks: six descriptors."""

    def __init__(self) -> None:
        self.pool, self.staged = np.arange(30), np.full(6, -1)
        self.copies = LateCopies(self.pool, self.staged, KV)
        self.source = Staged(Share(KV), POOL.place, self.copies)

    def load(self, layers: range, *ids: int) -> Load:
        load = self.source.load(layers, span(blocks(*ids), 4))
        assert load is not None
        return load


def test_a_registered_pool_is_read_where_it_lies() -> None:
    sources = InPlace(Share(KV), POOL.place)
    source = sources.of(HeadCut(0, 0, range(1)), Share(KV))
    load = source.load(range(1, 3), span(blocks(7, 2), 4))
    assert load is not None
    assert load.is_ready()
    assert load.indices.tolist() == [17, 12, 27, 22]
    assert source.registered == POOL.whole()
    assert sources.regions == (POOL.region,)


def test_a_pool_out_of_reach_is_registered_nowhere_and_written_from_in_other_blocks_only() -> None:
    sources = OutOfReach(Share(KV), POOL.place)
    assert sources.regions == () and sources.pool == POOL
    with pytest.raises(ConfigError, match="writes no blocks as they are"):
        sources.of(HeadCut(0, 0, range(1)), Share(KV))
    with pytest.raises(ConfigError, match="head_dim differs: 1 and 2"):
        sources.of(HeadCut(0, 0, range(1)), Share(msgspec.structs.replace(KV, head_dim=2)))


def test_staged_blocks_are_read_once_they_are_copied() -> None:
    bench = Bench()
    load = bench.load(range(1, 3), 7, 2)
    assert bench.source.staged.place == PoolPlace(bench.staged.ctypes.data, 2)
    assert not load.is_ready()
    bench.copies.make()
    assert load.is_ready()
    assert bench.staged[load.indices].tolist() == [17, 12, 27, 22]


def test_a_layer_may_have_all_of_the_staging_memory() -> None:
    bench = Bench()
    load = bench.load(range(2, 3), 0, 1, 2, 3, 4, 5)
    assert sorted(load.indices.tolist()) == list(range(6))


def test_without_room_nothing_is_loaded_until_something_is_unloaded() -> None:
    bench = Bench()
    first, second = bench.load(range(0, 1), 0, 1, 2, 3), bench.load(range(0, 1), 4)
    assert bench.source.load(range(0, 1), span(blocks(5, 6), 4)) is None
    assert bench.copies.num_waiting == 2
    bench.source.unload(first)
    third = bench.load(range(0, 1), 5, 6)
    assert not set(third.indices.tolist()) & set(second.indices.tolist())


def test_neighbours_stay_neighbours_for_the_wire() -> None:
    bench = Bench()
    for _ in range(3):
        load = bench.load(range(1, 2), 3, 4, 5)
        assert np.diff(load.indices).tolist() == [1, 1]
        bench.source.unload(load)


def test_what_was_unloaded_before_it_was_copied_does_not_spoil_what_takes_its_place() -> None:
    bench = Bench()
    bench.source.unload(bench.load(range(0, 1), 0, 1, 2, 3, 4, 5))
    load = bench.load(range(2, 3), 9, 8, 7, 6, 5, 4)
    bench.copies.make(2)
    assert load.is_ready()
    assert bench.staged[load.indices].tolist() == [29, 28, 27, 26, 25, 24]


def test_more_at_once_than_there_is_altogether_is_a_fault_and_does_not_wait_for_ever() -> None:
    with pytest.raises(AssertionError, match="9 descriptors at once, of 6"):
        Bench().source.load(range(0, 3), span(blocks(1, 2, 3), 4))


def test_staging_memory_has_the_blocks_that_its_bytes_hold_and_no_more_than_the_pool() -> None:
    """A block has 24 bytes."""
    assert staging_blocks(KV, 24 * 7 + 23, num_ranks=1, pool_blocks=None, max_step_tokens=8, layer_group=1) == 7
    assert staging_blocks(KV, 24 * 7 + 23, num_ranks=1, pool_blocks=100, max_step_tokens=8, layer_group=1) == 7
    assert staging_blocks(KV, 24 * 7 + 23, num_ranks=1, pool_blocks=5, max_step_tokens=8, layer_group=1) == 5


@pytest.mark.parametrize(
    ("max_step_tokens", "layer_group", "least"),
    [
        (4, 1, 1),  # one block of one layer, but some write has all layers of one block
        (24, 1, 2),
        (25, 1, 3),
        (24, 2, 4),
        (24, 3, 6),
        (24, 99, 6),
    ],
)
def test_staging_memory_holds_what_one_write_takes(max_step_tokens: int, layer_group: int, least: int) -> None:
    def found(staging_bytes: int) -> int:
        return staging_blocks(KV, staging_bytes, num_ranks=1, pool_blocks=None, max_step_tokens=max_step_tokens, layer_group=layer_group)

    assert found(24 * least) == least
    with pytest.raises(ConfigError, match=f"transfer.staging: {24 * least - 1} bytes are less .* must have {24 * least}$"):
        found(24 * least - 1)


@pytest.mark.parametrize(("num_ranks", "block_bytes"), [(1, 48), (2, 48), (3, 72), (4, 96)])
def test_a_head_that_several_ranks_hold_takes_its_bytes_on_each(num_ranks: int, block_bytes: int) -> None:
    """Two heads of 24 bytes."""

    def found(staging_bytes: int) -> int:
        kv = plain_kv(1, 48, kv_heads=2)
        return staging_blocks(kv, staging_bytes, num_ranks=num_ranks, pool_blocks=None, max_step_tokens=1, layer_group=1)

    assert (found(3 * block_bytes - 1), found(3 * block_bytes)) == (2, 3)
    with pytest.raises(ConfigError, match=f"must have {block_bytes}$"):
        found(block_bytes - 1)


def test_a_pool_that_is_smaller_than_a_step_is_all_that_one_write_can_take() -> None:
    assert staging_blocks(KV, 2**30, num_ranks=1, pool_blocks=2, max_step_tokens=1000, layer_group=3) == 2
