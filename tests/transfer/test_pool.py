"""Descriptor arithmetic against the layout it describes."""

import numpy as np

from disaggd.ids import BlockId
from disaggd.transfer.layout import KVGroup, KVSpec, PoolPlace
from disaggd.transfer.pool import Pool


def make_pool(*groups: KVGroup) -> Pool:
    return Pool(PoolPlace(1000, 5), KVSpec(dtype="float32", block_size=1, head_dim=1, groups=groups))


WIDE, NARROW = KVGroup(layers=2, kv_heads=2, head_bytes=64), KVGroup(layers=1, kv_heads=1, head_bytes=16)


def test_rows_cover_the_pool_one_block_of_one_layer_after_the_other() -> None:
    pool = make_pool(WIDE, NARROW)
    addresses = [int(start) + i * int(stride) for start, _, _, stride, count in pool.rows() for i in range(int(count))]
    sizes = [int(length) for _, length, _, _, count in pool.rows() for _ in range(int(count))]
    assert addresses == [1000 + sum(sizes[:i]) for i in range(15)]
    assert sum(sizes) == pool.num_bytes


def test_indices_name_blocks_layer_by_layer() -> None:
    indices = make_pool(WIDE).indices(range(0, 2), (BlockId(3), BlockId(1)))
    assert indices.dtype == np.int32
    assert indices.tolist() == [3, 1, 8, 6]


def test_bytes_of_blocks_in_layers_of_unlike_groups() -> None:
    pool = make_pool(WIDE, NARROW)
    assert pool.bytes_of(range(1, 3), 4) == 4 * (128 + 16)
    assert pool.bytes_of(range(0, 3), 5) == pool.num_bytes


def test_holds_only_its_own_block_ids() -> None:
    pool = make_pool(WIDE)
    assert pool.holds([BlockId(0), BlockId(4)])
    assert not pool.holds([BlockId(5)])
    assert not pool.holds([BlockId(-1)])
