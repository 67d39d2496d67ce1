"""KV in 8 bits: how far it may be off, and what becomes of numbers that are none, that are huge, or next to nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disaggd.kernels import fp8

SIZE, DIM = 4, 6


def there_and_back(heads: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return fp8.dequantize(fp8.quantize(heads), *heads.shape[-2:], dtype)


def scales(heads: torch.Tensor) -> torch.Tensor:
    """[..., 2]: of the keys and of the values."""
    return fp8.quantize(heads)[..., : fp8.HEADER_BYTES].contiguous().view(torch.float32)[..., :2]


def heads_of(values: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).to(dtype).view(2, SIZE, DIM)


# Of every magnitude that a float32 has, and of the few that numbers of one head have.
any_float = st.floats(width=32, allow_nan=False, allow_infinity=False)
near = st.floats(-8, 8, width=32)


@given(
    st.lists(any_float, min_size=2 * SIZE * DIM, max_size=2 * SIZE * DIM) | st.lists(near, min_size=2 * SIZE * DIM, max_size=2 * SIZE * DIM)
)
def test_a_value_is_off_by_at_most_a_16th_of_itself_or_a_1024th_of_the_scale(values: list[float]) -> None:
    heads = heads_of(values)
    error = (there_and_back(heads).double() - heads.double()).abs()
    scale = scales(heads).double()[..., None, None]
    # The scale and its reciprocal are rounded, and so is their product with a code: three units in the last place.
    allowed = torch.maximum(heads.double().abs() / 16, scale * 2**-10) * (1 + 2**-20)
    assert (error <= allowed).all()
    assert torch.equal(there_and_back(heads).sign() * heads.sign(), there_and_back(heads).sign().abs()), "no sign changes"


@given(st.lists(near, min_size=2 * SIZE * DIM, max_size=2 * SIZE * DIM))
def test_what_came_through_comes_through_again_unchanged(values: list[float]) -> None:
    """So a prefix that is handed on twice loses nothing more, but for the rounding of the scale."""
    once = there_and_back(heads_of(values))
    torch.testing.assert_close(there_and_back(once), once, rtol=2**-22, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_largest_is_hit_exactly_and_zeros_stay_zeros(dtype: torch.dtype) -> None:
    heads = torch.zeros(2, SIZE, DIM, dtype=dtype)
    heads[0, 1, 2], heads[0, 3, 0] = -7.0, 3.5
    assert torch.equal(there_and_back(heads, dtype), heads)


def test_keys_and_values_have_scales_of_their_own() -> None:
    heads = torch.ones(3, 2, SIZE, DIM)
    heads[1, 0] = 448
    heads[2, 1] = 896
    assert scales(heads).tolist() == [
        [torch.tensor(1 / 448).item()] * 2,
        [1.0, torch.tensor(1 / 448).item()],
        [torch.tensor(1 / 448).item(), 2.0],
    ]


def test_a_single_huge_value_takes_the_bits_of_the_others_and_no_more() -> None:
    heads = torch.full((2, SIZE, DIM), 1.0)
    heads[0, 0, 0] = torch.finfo(torch.float32).max
    back = there_and_back(heads)
    assert back[0, 0, 0] == heads[0, 0, 0] and (back[0].flatten()[1:] == 0).all()
    assert torch.equal(back[1], heads[1])


def test_what_is_no_finite_number_becomes_none_and_changes_no_other() -> None:
    clean = torch.linspace(-3, 5, 2 * SIZE * DIM).view(2, SIZE, DIM)
    heads = clean.clone()
    heads[0, 0, 1], heads[0, 2, 2], heads[1, 1, 1] = torch.inf, -torch.inf, torch.nan
    back = there_and_back(heads)
    is_none = ~heads.isfinite()
    assert torch.equal(back.isnan(), is_none)
    assert torch.equal(back[~is_none], there_and_back(clean)[~is_none])


def test_heads_of_nothing_but_nan_are_nan() -> None:
    assert there_and_back(torch.full((2, SIZE, DIM), torch.nan)).isnan().all()


def test_what_is_next_to_nothing_keeps_its_bits_down_to_the_least_scale() -> None:
    least = torch.full((2, SIZE, DIM), fp8.LEAST_SCALE * 448)
    assert torch.equal(there_and_back(least), least)
    subnormal = torch.full((2, SIZE, DIM), 2.0**-149)
    assert (there_and_back(subnormal) == 0).all()


def test_a_block_of_bfloat16_is_halved_but_for_its_header() -> None:
    assert fp8.head_bytes(64, 128) == 64 * 128 * 2 + fp8.HEADER_BYTES
    assert fp8.quantize(torch.zeros(5, 3, 2, SIZE, DIM)).shape == (5, 3, fp8.head_bytes(SIZE, DIM))
