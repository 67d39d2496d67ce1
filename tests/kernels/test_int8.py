"""What quantizing keeps of a weight, and projections by it in plain torch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disaggd.kernels import int8

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 70), st.sampled_from(DTYPES), st.floats(-4, 4))
def test_no_element_is_off_by_more_than_half_its_scale(seed, outputs, inputs, dtype, magnitude):
    weight = (torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 10**magnitude).to(dtype)
    q, scales = int8.quantize(weight)
    assert (q.dtype, scales.dtype) == (torch.int8, torch.float32)
    error = (weight.double() - q.double() * scales[:, None].double()).abs()
    assert (error <= scales[:, None].double() * (0.5 + 1e-5)).all()  # float32's own rounding of w / scale: 127 · 2⁻²⁴


def test_every_row_uses_the_whole_range_and_one_of_zeros_stays_zero():
    weight = torch.randn(50, 40)
    weight[7] = 0
    q, scales = int8.quantize(weight)
    assert q.abs().amax(1).tolist() == [127] * 7 + [0] + [127] * 42
    assert scales[7] == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_linear_is_the_product_with_the_quantized_weight(dtype, rows):
    random = torch.Generator().manual_seed(1)
    weight, bias, x = (torch.randn(shape, generator=random).to(dtype) for shape in ((4100, 63), (4100,), (rows, 63)))
    q, scales = int8.quantize(weight)
    for used in (None, bias):
        ours = int8.linear(x, int8.pack(weight), used)
        expected = x.double() @ (q.double() * scales[:, None].double()).T + (0 if used is None else used.double())
        assert (ours.dtype, ours.shape) == (dtype, (rows, 4100))
        atol = expected.abs().amax().item() * torch.finfo(dtype).eps * 4 if rows else 0
        torch.testing.assert_close(ours.double(), expected, atol=atol, rtol=0)
