"""Descriptor arithmetic against the layout it describes."""

import numpy as np
import pytest

from disaggd.ids import BlockId
from disaggd.transfer.layout import KVGroup, KVSpec, PoolPlace
from disaggd.transfer.pool import Descriptors, Pool

KV = KVSpec(dtype="float32", block_size=1, head_dim=1, groups=(KVGroup(layers=2, kv_heads=3, head_bytes=64),))
POOL = Pool(PoolPlace(1000, 5), KV)


def runs(descriptors: Descriptors) -> list[tuple[int, int]]:
    """(address, length) of each, as NIXL reads the rows."""
    [(start, length, device, stride, count)] = descriptors.rows().tolist()
    assert device == 0
    return [(start + i * stride, length) for i in range(count)]


def test_descriptors_cover_the_pool_one_block_of_one_layer_after_the_other() -> None:
    assert runs(POOL.whole()) == [(1000 + i * 3 * 64, 3 * 64) for i in range(10)]
    assert POOL.num_bytes == 10 * 3 * 64


@pytest.mark.parametrize("heads", [range(1), range(1, 3), range(2, 3)])
def test_slices_are_those_heads_of_each_block(heads: range) -> None:
    """Of a pool that is an array [layers, blocks, heads, bytes]."""
    bytes_of = np.arange(1000, 1000 + POOL.num_bytes).reshape(2 * 5, 3, 64)
    expected = [block[heads.start : heads.stop].reshape(-1) for block in bytes_of]
    found = [np.arange(address, address + length) for address, length in runs(POOL.slices(heads))]
    assert np.array_equal(found, expected)


def test_indices_name_blocks_layer_by_layer() -> None:
    indices = POOL.indices(range(0, 2), (BlockId(3), BlockId(1)))
    assert indices.dtype == np.int32
    assert indices.tolist() == [3, 1, 8, 6]


def test_holds_only_its_own_block_ids() -> None:
    assert POOL.holds([BlockId(0), BlockId(4)])
    assert not POOL.holds([BlockId(5)])
    assert not POOL.holds([BlockId(-1)])
