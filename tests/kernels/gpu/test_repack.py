import pytest
import torch

from disaggd.kernels import configurations, fp8, reference_repack
from disaggd.kernels.repack import repack, unpack_fp8

LAYERS, HEADS = range(1, 3), range(1, 3)


@pytest.fixture(params=[4096, 128], ids=lambda size: f"tile of {size}")
def tile(request, monkeypatch):
    """Blocks of fewer tokens than a program's tile, and of more."""
    monkeypatch.setattr("disaggd.kernels.repack.REPACK", configurations.RowTile(request.param, 4))


def pool(where, generator, block_size, dtype=torch.float32, head_dim=24):
    return torch.randn(3, 7, 4, 2, block_size, head_dim, generator=generator, device=where).to(dtype)


def both(kv, where, *, target_size, start, num_tokens, out_dtype):
    """What the kernel makes of it, and what the reference does."""
    block_size, head_dim = kv.shape[4:]
    ids = torch.tensor([6, 0, 3, 5, 2][: -(-(start + num_tokens) // block_size)], dtype=torch.int32, device=where)
    in_head = (fp8.head_bytes(target_size, head_dim),) if out_dtype == torch.uint8 else (2, target_size, head_dim)
    shape = (len(LAYERS), -(-num_tokens // target_size), len(HEADS), *in_head)
    made = []
    for operation in (repack, reference_repack.repack):
        out = torch.full(shape, 9, dtype=out_dtype, device=where)
        operation(out, kv, ids, layers=LAYERS, heads=HEADS, start=start, num_tokens=num_tokens)
        made.append(out)
    return made


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize(
    ("block_size", "target_size", "start", "num_tokens"),
    [(4, 4, 0, 7), (8, 4, 3, 9), (4, 6, 1, 13), (3, 5, 0, 1)],
)
def test_tokens_come_to_lie_as_the_target_has_them(dtype, generator, where, block_size, target_size, start, num_tokens):
    kv = pool(where, generator, block_size, dtype)
    ours, expected = both(kv, where, target_size=target_size, start=start, num_tokens=num_tokens, out_dtype=dtype)
    assert torch.equal(ours, expected)


def test_the_dtype_is_cast(generator, where):
    kv = pool(where, generator, 4)
    ours, expected = both(kv, where, target_size=6, start=1, num_tokens=13, out_dtype=torch.float16)
    assert torch.equal(ours, expected)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize(("block_size", "target_size", "start", "num_tokens"), [(4, 6, 1, 13), (6, 4, 5, 7)])
def test_fp8_blocks_are_the_references(dtype, generator, where, block_size, target_size, start, num_tokens):
    kv = pool(where, generator, block_size, dtype)
    kv[1, 6, 1, 0] = 0
    ours, expected = both(kv, where, target_size=target_size, start=start, num_tokens=num_tokens, out_dtype=torch.uint8)
    assert torch.equal(ours, expected)


def test_in_fp8_what_is_no_number_is_none_and_spoils_no_other(generator, where):
    kv = pool(where, generator, 4)
    kv[1, 6, 1, 0, 2, 3], kv[1, 6, 1, 0, 1, 5], kv[2, 0, 2, 1, 0, 0] = torch.nan, -torch.inf, torch.inf
    wires = both(kv, where, target_size=4, start=0, num_tokens=8, out_dtype=torch.uint8)
    ours, expected = (fp8.dequantize(wire, 4, 24, torch.float32) for wire in wires)
    assert ours.isnan().sum() == 3
    assert torch.equal(ours.nan_to_num(), expected.nan_to_num()) and torch.equal(ours.isnan(), expected.isnan())


def test_from_fp8_comes_every_code(where):
    wire = torch.zeros(1, 1, 1, fp8.head_bytes(8, 16), dtype=torch.uint8, device=where)
    wire[0, 0, 0, fp8.HEADER_BYTES :] = torch.arange(256, device=where)
    wire[0, 0, 0, : fp8.HEADER_BYTES].view(torch.float32)[:2] = 1.0
    kv, ids = torch.zeros(1, 1, 1, 2, 8, 16, device=where), torch.zeros(1, dtype=torch.int64, device=where)
    unpack_fp8(kv, wire, ids, ids)
    torch.testing.assert_close(kv, fp8.dequantize(wire, 8, 16, torch.float32), rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("tile")
def test_fp8_blocks_are_unpacked_where_they_belong_and_nowhere_else(dtype, generator, where):
    kv = torch.full((2, 7, 3, 2, 5, 24), 7.0, dtype=dtype, device=where)
    wire = fp8.quantize(torch.randn(2, 4, 3, 2, 5, 24, generator=generator, device=where))
    block_ids, landed_ids = (torch.tensor(ids, device=where) for ids in ([6, 0], [1, 3]))
    expected = kv.clone()
    reference_repack.unpack_fp8(expected, wire, block_ids, landed_ids)
    unpack_fp8(kv, wire, block_ids, landed_ids)
    assert torch.equal(kv, expected)


def test_no_tokens(where):
    kv = torch.zeros(3, 7, 4, 2, 4, 24, device=where)
    ids = torch.zeros(0, dtype=torch.int64, device=where)
    repack(torch.zeros(3, 0, 4, 2, 6, 24, device=where), kv, ids, layers=range(3), heads=range(4), start=0, num_tokens=0)


def test_blocks_that_do_not_hold_the_tokens_are_refused(where):
    kv, ids = torch.zeros(3, 7, 4, 2, 4, 24, device=where), torch.zeros(1, dtype=torch.int64, device=where)
    out = torch.zeros(3, 1, 4, 2, 4, 24, device=where)
    with pytest.raises(AssertionError, match="1 blocks for 4 tokens from 1"):
        repack(out, kv, ids, layers=range(3), heads=range(4), start=1, num_tokens=4)
