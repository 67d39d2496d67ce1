"""KV between a pool and the memory of the host: the right blocks, in the order they were asked for, beside what computes."""

import ctypes

import numpy as np
import pytest
import torch

from disaggd.engine.kv_staging import KVStaging, make_staging
from disaggd.engine.stream import DeviceStream, SideStream, runs
from disaggd.ids import BlockId
from disaggd.transfer.layout import KVGroup, KVSpec

LAYERS, BLOCKS, STAGED, HEADS, SIZE, DIM = 3, 10, 4, 2, 4, 8
SPEC = KVSpec(
    dtype="float32", block_size=SIZE, head_dim=DIM, groups=(KVGroup(layers=LAYERS, kv_heads=HEADS, head_bytes=2 * SIZE * DIM * 4),)
)
WHERE = ["cpu", pytest.param("cuda:0", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]


def blocks(*ids: int) -> tuple[BlockId, ...]:
    return tuple(BlockId(block) for block in ids)


def noise(num_blocks: int, where: str = "cpu") -> torch.Tensor:
    return torch.arange(LAYERS * num_blocks * HEADS * 2 * SIZE * DIM, dtype=torch.float32, device=where).view(
        LAYERS, num_blocks, HEADS, 2, SIZE, DIM
    )


class Bench:
    def __init__(self, where: str) -> None:
        self.kv = noise(BLOCKS, where)
        self.host = -1 - noise(STAGED)
        if self.kv.is_cuda:
            DeviceStream(self.kv.device).enter()
            self.host = self.host.pin_memory()
        self.staging = KVStaging(self.kv, self.host, SPEC)


def wait(is_done) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    assert is_done()


def test_the_fewest_runs_stand_for_all_pairs() -> None:
    targets, sources = np.array([4, 5, 6, 7, 2, 3], np.int32), np.array([0, 1, 8, 9, 10, 11], np.int32)
    assert list(runs(targets, sources)) == [(4, 0, 2), (6, 8, 2), (2, 10, 2)]
    assert list(runs(np.array([3], np.int32), np.array([5], np.int32))) == [(3, 5, 1)]
    assert list(runs(np.array([3, 2], np.int32), np.array([3, 2], np.int32))) == [(3, 3, 1), (2, 2, 1)]
    assert list(runs(np.array([], np.int32), np.array([], np.int32))) == []


@pytest.mark.parametrize("where", WHERE)
def test_descriptors_of_the_pool_are_copied_out_to_any_of_the_staging_memory(where: str) -> None:
    bench = Bench(where)
    before = bench.host.clone()
    wait(bench.staging.copy_out(np.array([10, 11, 12, 25, 3], np.int32), np.array([4, 5, 6, 0, 11], np.int32)))
    kv, host = bench.kv.cpu().flatten(0, 1), bench.host.flatten(0, 1)
    assert torch.equal(host[[4, 5, 6, 0, 11]], kv[[10, 11, 12, 25, 3]])
    untouched = [1, 2, 3, 7, 8, 9, 10]
    assert torch.equal(host[untouched], before.flatten(0, 1)[untouched])
    assert torch.equal(bench.kv.cpu(), noise(BLOCKS))


@pytest.mark.parametrize("where", WHERE)
def test_all_layers_of_what_landed_are_copied_into_blocks_of_the_pool(where: str) -> None:
    bench = Bench(where)
    wait(bench.staging.copy_in(blocks(3, 0, 1), blocks(5, 9, 2)))
    kv = bench.kv.cpu()
    assert torch.equal(kv[:, [5, 9, 2]], bench.host[:, [3, 0, 1]])
    untouched = [0, 1, 3, 4, 6, 7, 8]
    assert torch.equal(kv[:, untouched], noise(BLOCKS)[:, untouched])


@pytest.mark.parametrize("where", WHERE)
def test_staging_memory_is_described_as_a_pool_of_its_own(where: str) -> None:
    kv = noise(BLOCKS, where)
    staging = make_staging(kv, SPEC, STAGED)
    assert staging.place.num_blocks == STAGED
    wait(staging.copy_out(np.array([7], np.int32), np.array([5], np.int32)))
    row = np.ctypeslib.as_array(
        (ctypes.c_float * (HEADS * 2 * SIZE * DIM)).from_address(staging.place.address + 5 * SPEC.groups[0].block_bytes)
    )
    assert np.array_equal(row, kv.flatten(0, 1)[7].cpu().numpy().reshape(-1)), "what NIXL finds at that address"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_copies_do_not_wait_for_what_computes_nor_the_host_for_them() -> None:
    bench = Bench("cuda:0")
    torch.cuda.synchronize()
    torch.cuda._sleep(2 * 10**9)  # cycles: a second
    is_computed = DeviceStream(bench.kv.device).mark()
    is_copied = bench.staging.copy_in(blocks(0, 1), blocks(0, 1))
    while not is_copied():
        assert not is_computed()
    assert not is_computed()
    torch.cuda.synchronize()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_copies_are_made_one_after_another() -> None:
    """The later one of two to the same place wins, however large the first is."""
    where = torch.device("cuda", 0)
    stream = SideStream(where)
    large, small = torch.ones(64, 2**18, device=where), torch.full((64, 2**18), 2.0, device=where)
    host = torch.zeros(64, 2**18).pin_memory()
    torch.cuda.synchronize()
    every, last = np.arange(64, dtype=np.int32), np.array([63], np.int32)
    first, second = stream.copy(host, every, large, every), stream.copy(host, last, small, last)
    while not second():
        pass
    assert first()
    assert host[63].unique().tolist() == [2.0] and host[:63].unique().tolist() == [1.0]
