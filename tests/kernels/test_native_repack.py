"""The native kernels that repack, for every instruction set that this CPU has, against the reference: the same bits."""

import pytest
import torch

from disaggd import kernels
from disaggd.kernels import fp8, native, reference_repack
from disaggd.kernels.native import Isa, Native
from disaggd.kernels.native_repack import NativeRepack

LIBRARY = native.library()
BEST = None if LIBRARY is None else native.best_isa(LIBRARY)
FLOATS = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the native kernels were not built: python setup.py build_ext --inplace")


@pytest.fixture(params=list(Isa), ids=lambda isa: isa.name)
def ops(request) -> NativeRepack:
    if request.param > BEST:
        pytest.skip(f"this CPU has no {request.param.name}")
    return NativeRepack(Native(LIBRARY, request.param))


@pytest.fixture(params=FLOATS, ids=str)
def dtype(request) -> torch.dtype:
    return request.param


def pool(dtype, *, block_size, head_dim=20, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(4, 9, 5, 2, block_size, head_dim, generator=random).to(dtype)


def both(ops, kv, *, target_size, start, num_tokens, target, layers=range(1, 3), heads=range(2, 5)):
    """What the native kernel makes of it, and what the reference does."""
    block_size, head_dim = kv.shape[4:]
    ids = torch.tensor([8, 0, 3, 5, 2, 7, 1][: -(-(start + num_tokens) // block_size)])
    in_head = (fp8.head_bytes(target_size, head_dim),) if target == torch.uint8 else (2, target_size, head_dim)
    shape = (len(layers), -(-num_tokens // target_size), len(heads), *in_head)
    made = []
    for operation in (ops.repack, reference_repack.repack):
        out = torch.full(shape, 9, dtype=target)
        operation(out, kv, ids, layers=layers, heads=heads, start=start, num_tokens=num_tokens)
        made.append(out)
    return made


SHAPES = [  # block size, target's, token of the first block, tokens
    (4, 4, 0, 16),
    (4, 4, 0, 7),
    (4, 8, 2, 11),
    (16, 4, 3, 29),
    (4, 6, 1, 13),
    (6, 4, 5, 8),
    (1, 5, 0, 6),
    (5, 1, 4, 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("target", [*FLOATS, torch.uint8], ids=str)
def test_the_bits_are_the_references(ops, dtype, target, shape):
    block_size, target_size, start, num_tokens = shape
    ours, expected = both(
        ops, pool(dtype, block_size=block_size), target_size=target_size, start=start, num_tokens=num_tokens, target=target
    )
    assert torch.equal(ours.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("head_dim", [2, 16, 64, 66])
def test_of_heads_of_any_width(ops, head_dim):
    for target in (torch.float32, torch.bfloat16, torch.uint8):
        ours, expected = both(
            ops, pool(torch.float32, block_size=3, head_dim=head_dim), target_size=2, start=1, num_tokens=8, target=target
        )
        assert torch.equal(ours, expected)


def test_casts_of_what_the_target_cannot_hold(ops):
    kv = pool(torch.float32, block_size=4)
    kv[1, 8, 2, 0, 0, :5] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e9, 65520.0])
    for target in (torch.float16, torch.bfloat16):
        ours, expected = both(ops, kv, target_size=4, start=0, num_tokens=4, target=target)
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
        assert ours.isnan().sum() == 1


def test_every_code_of_fp8_is_made_as_torch_makes_it(ops):
    """Each finite code, and what lies between it and its neighbours: the middle, and the next float32 on either side of it."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    above, below = (torch.nextafter(middles, torch.full_like(middles, far)) for far in (torch.inf, -torch.inf))
    values = torch.cat([codes, middles, above, below])
    kv = torch.zeros(1, 1, 1, 2, 1, len(values))
    kv[0, 0, 0, 0, 0], kv[0, 0, 0, 1, 0] = values, -values  # 448 is among them, so the scale is 1
    out = torch.zeros(1, 1, 1, fp8.head_bytes(1, len(values)), dtype=torch.uint8)
    ops.repack(out, kv, torch.zeros(1, dtype=torch.int64), layers=range(1), heads=range(1), start=0, num_tokens=1)
    q = out[0, 0, 0, fp8.HEADER_BYTES :].view(2, -1)
    assert torch.equal(q, torch.stack([values, -values]).to(torch.float8_e4m3fn).view(torch.uint8))


def test_in_fp8_what_is_no_number_is_none_and_spoils_no_other(ops, dtype):
    kv = pool(dtype, block_size=4)
    kv[1, 8, 2, 0, 2, 3], kv[1, 8, 2, 0, 1, 5], kv[2, 0, 3, 1, 0, 19] = torch.nan, -torch.inf, torch.inf
    wires = both(ops, kv, target_size=4, start=0, num_tokens=8, target=torch.uint8)
    ours, expected = (fp8.dequantize(wire, 4, 20, torch.float32) for wire in wires)
    assert ours.isnan().sum() == 3
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("magnitude", [1e-45, 1e-39, 1e-36, 1e30, 3e38])
def test_fp8_of_any_magnitude(ops, magnitude):
    kv = pool(torch.float32, block_size=4).clamp(-1, 1) * magnitude
    ours, expected = both(ops, kv, target_size=4, start=0, num_tokens=8, target=torch.uint8)
    assert torch.equal(ours, expected)


def test_every_code_of_fp8_is_read_as_torch_reads_it(ops, dtype):
    wire = torch.zeros(1, 1, 1, fp8.head_bytes(4, 32), dtype=torch.uint8)
    wire[0, 0, 0, fp8.HEADER_BYTES :] = torch.arange(256)
    wire[0, 0, 0, : fp8.HEADER_BYTES].view(torch.float32)[:2] = torch.tensor([1.0, 3.1])
    kv, ids = torch.zeros(1, 1, 1, 2, 4, 32, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    ops.unpack_fp8(kv, wire, ids, ids)
    torch.testing.assert_close(kv, fp8.dequantize(wire, 4, 32, dtype), rtol=0, atol=0, equal_nan=True)


def test_fp8_blocks_are_unpacked_where_they_belong_and_nowhere_else(ops, dtype):
    wire = fp8.quantize(torch.randn(2, 4, 3, 2, 5, 7))
    kv = torch.full((2, 7, 3, 2, 5, 7), 7.0, dtype=dtype)
    expected, (block_ids, landed_ids) = kv.clone(), (torch.tensor(ids) for ids in ([6, 0], [1, 3]))
    reference_repack.unpack_fp8(expected, wire, block_ids, landed_ids)
    ops.unpack_fp8(kv, wire, block_ids, landed_ids)
    assert torch.equal(kv, expected)
    assert (kv[:, 1:6] == 7).all()


def test_ids_of_no_block_are_refused(ops):
    kv, out = pool(torch.float32, block_size=4), torch.zeros(4, 1, 5, 2, 4, 20)
    for block in (-1, 9):
        with pytest.raises(AssertionError, match="ids beyond 9 blocks"):
            ops.repack(out, kv, torch.tensor([block]), layers=range(4), heads=range(5), start=0, num_tokens=4)


def test_the_best_set_is_selected():
    selected = kernels.select(torch.device("cpu"))
    assert selected.repack.__self__ == selected.unpack_fp8.__self__ == NativeRepack(Native(LIBRARY, BEST))
