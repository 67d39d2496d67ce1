import pytest
import torch

from disaggd.kernels.silu_mul import silu_mul


@pytest.mark.parametrize("columns", [1, 704, 1024, 2500])
def test_equals_the_formula(columns, dtype, generator, where):
    gate_up = 4 * torch.randn(3, 2 * columns, generator=generator, device=where).to(dtype)
    gate, up = gate_up.double().chunk(2, -1)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(silu_mul(gate_up).double(), gate / (1 + (-gate).exp()) * up, atol=4 * eps, rtol=4 * eps)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's numpy: e²⁰⁰ is meant to be inf
def test_far_from_zero_it_is_the_gate_or_nothing(where):
    gate_up = torch.tensor([[200.0, -200.0, 3.0, 3.0]], device=where)
    assert silu_mul(gate_up).tolist() == [[600.0, 0.0]]


def test_no_rows(where):
    assert silu_mul(torch.zeros(0, 8, device=where)).shape == (0, 4)
