import pytest
import torch

from disaggd.kernels import configurations
from disaggd.kernels.rms_norm import add_rms_norm, rms_norm


def formula(x, weight, eps):
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dim", [1, 100, 1024, 1025, configurations.NORM[-1].size])
def test_equals_the_formula(dim, dtype, generator, where):
    x = 5 * torch.randn(3, dim + 8, generator=generator, device=where).to(dtype)[:, :dim]
    weight = torch.randn(dim, generator=generator, device=where).to(dtype)
    out = rms_norm(x, weight, 1e-3)
    eps = torch.finfo(dtype).eps
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), formula(x, weight, 1e-3), atol=4 * eps, rtol=4 * eps)


def test_adds_the_residual_in_place_first(dtype, generator, where):
    x, residual = torch.randn(2, 4, 72, generator=generator, device=where).to(dtype)
    weight = torch.randn(72, generator=generator, device=where).to(dtype)
    total = x + residual
    out = add_rms_norm(x, residual, weight, 1e-6)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(residual, total, atol=eps, rtol=eps)  # the interpreter cuts off where torch rounds
    torch.testing.assert_close(out.double(), formula(residual, weight, 1e-6), atol=4 * eps, rtol=4 * eps)


def test_no_rows(where):
    assert rms_norm(torch.zeros(0, 8, device=where), torch.zeros(8, device=where), 1e-6).shape == (0, 8)


def test_rows_too_wide_are_refused(where):
    width = configurations.NORM[-1].size + 1
    with pytest.raises(AssertionError, match="wider"):
        rms_norm(torch.zeros(1, width, device=where), torch.zeros(width, device=where), 1e-6)
