import pytest
import torch

from disaggd.kernels import configurations
from disaggd.kernels.block_copy import gather_blocks, scatter_blocks

SHAPE = (3, 7, 4, 2, 4, 24)  # layers, blocks, KV heads, K and V, block size, head_dim
LAYERS, HEADS, BLOCKS = range(1, 3), range(1, 4), [6, 0, 3]


def chosen(kv):
    return kv[LAYERS.start : LAYERS.stop, BLOCKS, HEADS.start : HEADS.stop]


@pytest.fixture(params=[4096, 64], ids=lambda size: f"tile of {size}")
def tile(request, monkeypatch):
    """Runs shorter than a program's tile, and longer ones that no number of tiles fills."""
    monkeypatch.setattr("disaggd.kernels.block_copy.COPY", configurations.RowTile(request.param, 4))


@pytest.mark.usefixtures("tile")
def test_gather_takes_the_blocks_heads_and_layers(dtype, generator, where):
    kv = torch.randn(SHAPE, generator=generator, device=where).to(dtype)
    staging = torch.empty(2, 3, 3, *SHAPE[3:], dtype=dtype, device=where)
    gather_blocks(staging, kv, torch.tensor(BLOCKS, dtype=torch.int32, device=where), layers=LAYERS, heads=HEADS)
    assert torch.equal(staging, chosen(kv))


@pytest.mark.usefixtures("tile")
def test_scatter_puts_them_back_and_nothing_else(generator, where):
    kv = torch.full(SHAPE, 7.0, device=where)
    staging = torch.randn(2, 3, 3, *SHAPE[3:], generator=generator, device=where)
    scatter_blocks(kv, staging, torch.tensor(BLOCKS, device=where), layers=LAYERS, heads=HEADS)
    assert torch.equal(chosen(kv), staging)
    assert (kv == 7).sum() == kv.numel() - staging.numel()


def test_the_dtype_is_cast(generator, where):
    kv = torch.randn(SHAPE, generator=generator, device=where).half()
    staging = torch.empty(2, 3, 3, *SHAPE[3:], device=where)
    gather_blocks(staging, kv, torch.tensor(BLOCKS, device=where), layers=LAYERS, heads=HEADS)
    assert torch.equal(staging, chosen(kv).float())


def test_no_blocks(where):
    kv = torch.zeros(SHAPE, device=where)
    gather_blocks(
        torch.zeros(3, 0, 4, *SHAPE[3:], device=where), kv, torch.zeros(0, dtype=torch.int64, device=where), layers=range(3), heads=range(4)
    )


def test_heads_that_are_not_there_are_refused(where):
    kv = torch.zeros(SHAPE, device=where)
    staging = torch.zeros(3, 1, 3, *SHAPE[3:], device=where)
    with pytest.raises(AssertionError, match=r"range\(2, 5\)"):
        gather_blocks(staging, kv, torch.zeros(1, dtype=torch.int64, device=where), layers=range(3), heads=range(2, 5))
