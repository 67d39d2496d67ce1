"""Projections of a few rows against float64."""

import pytest
import torch

from disaggd.kernels.configurations import MOST_ROWS, LinearTile
from disaggd.kernels.linear import linear, linear_silu_mul


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Shapes of a hundred take several programs and several steps, as those of thousands do of the tiles that serve."""
    small = {
        "LINEAR_ROW": LinearTile(outputs=16, depth=32, warps=1),
        "LINEAR_ROWS": dict.fromkeys((2, 4), LinearTile(outputs=64, depth=32, warps=4, stages=3)),
        "LINEAR_ROWS_WIDE": dict.fromkeys((2, 4), LinearTile(outputs=128, depth=16, warps=4, stages=3)),
        "LINEAR_ROW_GATED": LinearTile(outputs=8, depth=32, warps=1),
        "LINEAR_ROWS_GATED": dict.fromkeys((2, 4), LinearTile(outputs=64, depth=32, warps=4, stages=3)),
        "_ENOUGH_PROGRAMS": 3,
        "_WIDE": 200,
    }
    for name, value in small.items():
        monkeypatch.setattr(f"disaggd.kernels.linear.{name}", value)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("rows", [1, 2, 7, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 128), (128, 64), (256, 64), (70, 100), (9, 33), (203, 17)])
def test_linear_equals_float64(rows, outputs, inputs, bias, generator, where):
    wider = torch.randn(rows, inputs + 8, generator=generator, device=where)
    x, weight = wider[:, :inputs], torch.randn(outputs, inputs, generator=generator, device=where)
    offset = torch.randn(outputs, generator=generator, device=where) if bias else None
    expected = x.double() @ weight.double().T + (0 if offset is None else offset.double())
    torch.testing.assert_close(linear(x, weight, offset).double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("rows", [1, 3, MOST_ROWS + 1])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (70, 50), (5, 33)])
def test_linear_silu_mul_equals_float64(rows, outputs, inputs, bias, generator, where):
    x, weight = (torch.randn(count, inputs, generator=generator, device=where) for count in (rows, 2 * outputs))
    offset = torch.randn(2 * outputs, generator=generator, device=where) if bias else None
    gate, up = (x.double() @ weight.double().T + (0 if offset is None else offset.double())).chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(linear_silu_mul(x, weight, offset).double(), expected, atol=1e-4, rtol=2e-5)


@pytest.mark.parametrize("rows", [1, 5])
def test_dtypes(rows, dtype, generator, where):
    x, weight = (torch.randn(count, 96, generator=generator, device=where).to(dtype) for count in (rows, 80))
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(
        linear(x, weight, None).double(), expected, atol=40 * torch.finfo(dtype).eps, rtol=2 * torch.finfo(dtype).eps
    )


def test_no_rows(where):
    assert linear(torch.zeros(0, 16, device=where), torch.zeros(8, 16, device=where), None).shape == (0, 8)
