"""The native kernels, for every instruction set that this CPU has, against the reference in float32."""

import pytest
import torch

from disaggd import kernels
from disaggd.kernels import native, onednn, reference
from disaggd.kernels.native import Isa, Native

LIBRARY = native.library()
BEST = None if LIBRARY is None else native.best_isa(LIBRARY)
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 0.02, torch.float16: 0.002}  # of results of magnitude 4
INT32 = torch.int32

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the native kernels were not built: python setup.py build_ext --inplace")


@pytest.fixture(params=list(Isa), ids=lambda isa: isa.name)
def ops(request) -> Native:
    if request.param > BEST:
        pytest.skip(f"this CPU has no {request.param.name}")
    return Native(LIBRARY, request.param)


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request) -> torch.dtype:
    return request.param


class Case:
    """Sequences `(context length, new tokens)` in scattered blocks of a random pool, their queries, and attention over them."""

    def __init__(self, shape, dtype, *, kv_heads=2, group=3, head_dim=32, block_size=16, window=None, seed=0):
        random = torch.Generator().manual_seed(seed)
        self.num_new = [count for _, count in shape]
        needed = [-(-length // block_size) for length, _ in shape]
        self.kv = torch.randn(sum(needed) + 3, kv_heads, 2, block_size, head_dim, generator=random).to(dtype)
        free = torch.randperm(len(self.kv), generator=random).tolist()
        self.tables = [[free.pop() for _ in range(count)] for count in needed]
        self.unused = free
        self.lengths = [length for length, _ in shape]
        self.queries = torch.randn(sum(self.num_new), kv_heads * group, head_dim, generator=random).to(dtype)
        self.settings = {"kv_heads": kv_heads, "block_size": block_size, "window": window}

    def made(self, make, members=None):
        members = range(len(self.tables)) if members is None else members
        size = self.settings["block_size"]
        slots, starts = [], [0]
        for i in members:
            new = range(self.lengths[i] - self.num_new[i], self.lengths[i])
            slots += [self.tables[i][p // size] * size + p % size for p in new]
            starts.append(len(slots))
        width = max(len(self.tables[i]) for i in members)
        tables = torch.tensor([self.tables[i] + [0] * (width - len(self.tables[i])) for i in members], dtype=INT32)
        lengths = torch.tensor([self.lengths[i] for i in members], dtype=INT32)
        return make(torch.tensor(slots, dtype=torch.int64), torch.tensor(starts, dtype=INT32), lengths, tables, **self.settings)

    def expected(self):
        return self.made(reference.PagedAttention).attend(self.kv.float(), self.queries.float())


def close(ours, expected, dtype):
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype] / 4)


SHAPES = {
    "decodes": [(1, 1), (40, 1), (700, 1), (64, 1), (1030, 1)],
    "chunks": [(9, 9), (300, 140), (8, 2), (131, 130)],
    "both, and one with nothing new": [(21, 6), (30, 1), (5, 0), (12, 12), (513, 1)],
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("window", [None, 5, 300])
def test_attention_equals_the_reference(ops, dtype, shape, window):
    case = Case(shape, dtype, window=window)
    close(case.made(ops.paged_attention).attend(case.kv, case.queries), case.expected(), dtype)


@pytest.mark.parametrize(
    "sizes",
    [
        (2, 1, 8, 4),
        (1, 2, 64, 64),
        (2, 4, 128, 16),
        (1, 7, 96, 8),
        (1, 5, 256, 32),
        (3, 3, 80, 5),
        (1, 9, 33, 16),
        (1, 2, 64, 48),
        (1, 2, 64, 1024),
    ],
)
def test_attention_of_any_heads_and_blocks(ops, dtype, sizes):
    kv_heads, group, head_dim, block_size = sizes
    case = Case([(150, 1), (70, 61), (3, 3)], dtype, kv_heads=kv_heads, group=group, head_dim=head_dim, block_size=block_size)
    close(case.made(ops.paged_attention).attend(case.kv, case.queries), case.expected(), dtype)


def test_a_row_is_the_same_alone_in_a_batch_and_on_two_threads(ops, dtype):
    case = Case([(700, 1), (300, 140), (1030, 1), (130, 1)], dtype)
    together = case.made(ops.paged_attention).attend(case.kv, case.queries).split(case.num_new)
    given = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(given, 2))
        for i, queries in enumerate(case.queries.split(case.num_new)):
            assert torch.equal(case.made(ops.paged_attention, [i]).attend(case.kv, queries), together[i])
    finally:
        torch.set_num_threads(given)


def test_chunks_give_the_bits_of_the_whole(ops, dtype):
    whole = Case([(400, 400)], dtype, window=150)
    expected = whole.made(ops.paged_attention).attend(whole.kv, whole.queries)
    for start, end in [(0, 128), (128, 133), (133, 400)]:
        whole.lengths, whole.num_new = [end], [end - start]
        assert torch.equal(whole.made(ops.paged_attention).attend(whole.kv, whole.queries[start:end]), expected[start:end])


def test_what_is_not_attended_to_is_not_read(ops, dtype):
    """A NaN that a block's former owner left, or that lies before the window, stays where it is."""
    case = Case([(21, 1), (37, 20)], dtype, window=12)
    expected = case.expected()
    for table, length, count in zip(case.tables, case.lengths, case.num_new, strict=True):
        case.kv[table[-1], :, :, length % 16 :] = torch.nan
        oldest = length - count + 1 - 12
        for position in range(oldest):
            case.kv[table[position // 16], :, :, position % 16] = torch.nan
    case.kv[case.unused] = torch.nan
    close(case.made(ops.paged_attention).attend(case.kv, case.queries), expected, dtype)


@pytest.mark.parametrize("head_dim", [8, 34, 64, 128])
@pytest.mark.parametrize("normed", [True, False])
def test_rotate_and_store_equals_the_reference(ops, dtype, head_dim, normed):
    case = Case([(9, 9), (21, 1), (400, 200)], dtype, head_dim=head_dim)
    random = torch.Generator().manual_seed(3)
    projected = torch.randn(210, 10 * head_dim, generator=random).to(dtype)
    weight = torch.randn(8, head_dim, generator=random).to(dtype) if normed else None
    angles = torch.randn(210, 1, head_dim // 2, generator=random)
    rotation = torch.cat((angles.cos(),) * 2, -1).to(dtype), torch.cat((-angles.sin(), angles.sin()), -1).to(dtype)
    expected_kv = case.kv.float()
    in_float = None if weight is None else weight.float(), 1e-5, tuple(t.float() for t in rotation)
    expected = case.made(reference.PagedAttention).rotate_and_store(expected_kv, projected.float(), *in_float)
    ours = case.made(ops.paged_attention).rotate_and_store(case.kv, projected, weight, 1e-5, rotation)
    for result, wanted in ((ours, expected), (case.kv, expected_kv)):
        torch.testing.assert_close(result.float(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(1, 5), (3, 64), (70, 1000), (0, 64)])
def test_norms_equal_the_reference(ops, dtype, shape):
    random = torch.Generator().manual_seed(4)
    x, residual = (torch.randn(shape, generator=random).to(dtype) for _ in range(2))
    weight = torch.randn(shape[1], generator=random).to(dtype)
    total = x + residual
    close(ops.rms_norm(x, weight, 0.1), reference.rms_norm(x.float(), weight.float(), 0.1), dtype)
    close(ops.add_rms_norm(x, residual, weight, 0.1), reference.rms_norm(total.float(), weight.float(), 0.1), dtype)
    assert torch.equal(residual, total)


def test_silu_mul_equals_the_reference(ops, dtype):
    random = torch.Generator().manual_seed(5)
    gate_up = torch.randn(40, 2 * 501, generator=random)
    gate_up[0, :6] = torch.tensor([-1e3, -88, -87, 30, 88, 200])
    gate_up = gate_up.to(dtype)
    expected = reference.silu_mul(gate_up.float())
    torch.testing.assert_close(ops.silu_mul(gate_up).float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_float16_rounds_as_torch_does(ops):
    """The baseline converts by hand: zeros, the least and the largest numbers, ties, infinities."""
    sums = torch.tensor([0.0, 6e-8, 3e-8, 6.1e-5, 1.00048828125, 1.00146484375, 65504, 65519, 65520, 1e30, -2.5e-7, torch.inf])
    total = torch.zeros(1, len(sums), dtype=torch.float16)
    ops.add_rms_norm(sums.half()[None], total, total[0], 1.0)
    assert torch.equal(total[0], sums.half())
    x = torch.randn(1, 4096).half() * 60
    total = x.flip(1)
    ops.add_rms_norm(x, total, x[0], 1.0)
    assert torch.equal(total, x + x.flip(1))


PRODUCTS = {torch.float32: 1e-5, torch.bfloat16: 0.02}
"""What our own product multiplies, and how near it comes."""


@pytest.mark.parametrize("dtype", PRODUCTS, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 8, 13, 24, 25, 200])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_of_a_packed_weight(ops, dtype, rows, with_bias):
    random = torch.Generator().manual_seed(6)
    x, weight, bias = (torch.randn(shape, generator=random).to(dtype) for shape in ((rows, 1100), (192, 1100), (192,)))
    weight /= 32
    packed = ops.pack(weight)
    assert packed.dim() == 4 and packed.numel() == weight.numel()
    used = bias if with_bias else None
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if used is None else used.double())
    ours = ops.linear(x, packed, used)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), expected, atol=PRODUCTS[dtype], rtol=PRODUCTS[dtype] / 4)


@pytest.mark.parametrize("dtype", PRODUCTS, ids=str)
def test_a_projected_row_is_the_same_alone_and_in_a_batch(ops, dtype):
    random = torch.Generator().manual_seed(7)
    packed = ops.pack(torch.randn(128, 2048, generator=random).to(dtype))
    x = torch.randn(400, 2048, generator=random).to(dtype)
    together = ops.linear(x, packed, None)
    for count in (1, 2, 3, 4, 8, 33):
        assert torch.equal(torch.cat([ops.linear(part, packed, None) for part in x.split(count)]), together)


@pytest.mark.parametrize(
    "weight",
    [torch.randn(128, 64).half(), torch.randn(150, 64), torch.randn(151, 64).bfloat16(), torch.randn(128, 63).bfloat16()],
    ids=["half precision", "150 outputs", "151 outputs", "63 inputs"],
)
def test_a_weight_that_does_not_fit_is_onednns(ops, weight):
    x = torch.randn(3, weight.shape[1]).to(weight.dtype)
    assert ops.pack(weight).dim() == 2
    assert torch.equal(ops.linear(x, ops.pack(weight), None), onednn.linear(x, onednn.pack(weight), None))


def test_the_best_set_is_selected():
    assert kernels.select(torch.device("cpu")).paged_attention.__self__ == Native(LIBRARY, BEST)
