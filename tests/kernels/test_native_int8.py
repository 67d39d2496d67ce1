"""The native product by weights of 8 bits, for every instruction set that this CPU has, against float64."""

import pytest
import torch

from disaggd import kernels
from disaggd.kernels import int8, native
from disaggd.kernels.native import Isa, Native
from disaggd.kernels.native_int8 import NativeInt8

LIBRARY = native.library()
BEST = None if LIBRARY is None else native.best_isa(LIBRARY)

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the native kernels were not built: python setup.py build_ext --inplace")


@pytest.fixture(params=list(Isa), ids=lambda isa: isa.name)
def ops(request) -> NativeInt8:
    if request.param > BEST:
        pytest.skip(f"this CPU has no {request.param.name}")
    return NativeInt8(Native(LIBRARY, request.param))


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request) -> torch.dtype:
    return request.param


SHAPES = [(192, 100), (151, 63), (64, 1025), (5, 1), (4160, 8)]  # 4,160 outputs are packed in two parts


def int8_case(shape, dtype, seed=8):
    """A weight [out, in], a bias, and x [33, in]; and, in float64, what the weight is once it is quantized."""
    random = torch.Generator().manual_seed(seed)
    weight, bias, x = (torch.randn(size, generator=random).to(dtype) for size in (shape, shape[:1], (33, shape[1])))
    q, scales = int8.quantize(weight)
    return weight, bias, x, q.double() * scales[:, None].double()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_of_an_int8_weight(ops, dtype, shape, with_bias):
    weight, bias, x, quantized = int8_case(shape, dtype)
    packed = ops.pack(weight)
    expected = x.double() @ quantized.T + (bias.double() if with_bias else 0)
    # Of the largest result: one rounding to a half, or those of float32's sums of up to 1,025 terms; measured 0.4 and 9.
    atol = expected.abs().max().item() * torch.finfo(dtype).eps * (32 if dtype == torch.float32 else 1)
    for rows in range(34):
        ours = ops.linear(x[:rows], packed, bias if with_bias else None)
        assert (ours.dtype, ours.shape) == (dtype, (rows, shape[0]))
        torch.testing.assert_close(ours.double(), expected[:rows], atol=atol, rtol=0)


@pytest.mark.parametrize("shape", [(192, 1030), (151, 63)], ids=str)
def test_a_row_by_an_int8_weight_is_the_same_alone_and_in_a_batch(ops, dtype, shape):
    weight, bias, _, _ = int8_case(shape, dtype)
    packed = ops.pack(weight)
    x = torch.randn(400, shape[1], generator=torch.Generator().manual_seed(9)).to(dtype)
    together = ops.linear(x, packed, bias)
    for count in (1, 2, 8, 33):
        assert torch.equal(torch.cat([ops.linear(part, packed, bias) for part in x.split(count)]), together)


def test_an_int8_weight_takes_a_byte_for_each_of_its_elements(ops, dtype):
    packed = ops.pack(torch.randn(256, 512).to(dtype))
    assert packed.untyped_storage().nbytes() == 256 * (512 + int8.SCALE_BYTES)


def test_int8_operations_differ_in_the_weights_alone():
    plain, quantized = (kernels.select(torch.device("cpu"), weights) for weights in ("auto", "int8"))
    assert quantized.linear.__self__ == NativeInt8(Native(LIBRARY, BEST)) == NativeInt8(plain.linear.__self__)
    functions = [
        {name: getattr(getattr(ops, name), "__func__", getattr(ops, name)) for name in ops.__slots__} for ops in (plain, quantized)
    ]
    changed = {"pack": NativeInt8.pack, "linear": NativeInt8.linear, "linear_silu_mul": NativeInt8.linear_silu_mul}
    assert functions[1] == functions[0] | changed


def test_linear_silu_mul_is_the_two_in_turn(ops, dtype):
    weight, bias, x, _ = int8_case((128, 63), dtype)
    packed = ops.pack(weight)
    assert torch.equal(ops.linear_silu_mul(x, packed, bias), ops.native.silu_mul(ops.linear(x, packed, bias)))
