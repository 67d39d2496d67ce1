"""Packed weights give what plain ones give."""

import pytest
import torch
import torch.nn.functional as F

from disaggd.kernels import onednn

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}  # of outputs of magnitude 4


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [0, 1, 7, 300])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_of_a_packed_weight(dtype, rows, with_bias):
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, 48), (151, 48), (151,)))
    weight /= 7
    used = bias if with_bias else None
    ours = onednn.linear(x, onednn.pack(weight), used)
    assert (ours.dtype, ours.shape) == (dtype, (rows, 151))
    expected = F.linear(x.double(), weight.double(), None if used is None else used.double())
    torch.testing.assert_close(ours.double(), expected, atol=TOLERANCE[dtype], rtol=0)


def test_an_unsupported_dtype_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(onednn, "_has_kernel", lambda dtype: False)
    weight = torch.randn(4, 3)
    assert onednn.pack(weight) is weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 1024, 1040, 2048])
def test_a_row_is_the_same_alone_and_in_a_batch(dtype, width):
    if not onednn._has_kernel(dtype):
        pytest.skip(f"this CPU has no oneDNN kernel for {dtype}")
    generator = torch.Generator().manual_seed(2)
    packed = onednn.pack(torch.randn(96, width, generator=generator).to(dtype))
    x = torch.randn(64, width, generator=generator).to(dtype)
    together = onednn.linear(x, packed, None)
    for count in (1, 2, 8, 33):
        parts = [onednn.linear(part, packed, None) for part in x.split(count)]
        assert torch.equal(torch.cat(parts), together)
