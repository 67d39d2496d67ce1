"""The native sampler, for every instruction set that this CPU has: the tokens of the torch sampler."""

import math

import pytest
import torch
from torch import Tensor

from disaggd import kernels
from disaggd.kernels import native, reference_sampling
from disaggd.kernels.draws import Draws
from disaggd.kernels.native import Isa, Native

LIBRARY = native.library()
BEST = None if LIBRARY is None else native.best_isa(LIBRARY)
UNLIMITED = -26.1  # the floor that the engine gives where there is no min-p

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the native kernels were not built: python setup.py build_ext --inplace")


@pytest.fixture(params=list(Isa), ids=lambda isa: isa.name)
def ops(request) -> Native:
    if request.param > BEST:
        pytest.skip(f"this CPU has no {request.param.name}")
    return Native(LIBRARY, request.param)


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(12)


def draws(rows: int, *, temperature=1.0, top_k=0, top_p=1.0, floor=UNLIMITED, seed=5, first_position=0) -> Draws:
    """`rows` draws that differ in their positions, and in what is given as a list."""

    def column(value, dtype):
        return torch.tensor(value if isinstance(value, list) else [value] * rows, dtype=dtype)

    columns = column(temperature, torch.float32), column(top_k, torch.int32), column(top_p, torch.float32), column(floor, torch.float32)
    positions = torch.arange(first_position, first_position + rows)
    return Draws(*columns, column(seed, torch.int64), positions, bool((columns[1] > 0).any()), bool((columns[2] < 1).any()))


def part(given: Draws, rows: Tensor) -> Draws:
    columns = (given.temperatures, given.top_k, given.top_p, given.floors, given.seeds, given.positions)
    return Draws(*(column[rows] for column in columns), given.any_top_k, given.any_top_p)


def any_draws(rows: int, random: torch.Generator) -> Draws:
    """Every mix of parameters, the extreme ones too."""

    def of(*choices):
        return [choices[i] for i in torch.randint(len(choices), (rows,), generator=random)]

    return draws(
        rows,
        temperature=of(0.0, 1e-30, 1e-6, 0.3, 0.7, 1.0, 1.0, 1.3, 2.0, 100.0),
        top_k=of(0, 0, 1, 2, 7, 50, 900, 10**6),
        top_p=of(1.0, 1.0, 0.0, 1e-9, 0.1, 0.5, 0.8, 0.95, 0.999, 0.99999),
        floor=of(UNLIMITED, UNLIMITED, math.log(0.05), math.log(0.9), 0.0, -math.inf),
        seed=torch.randint(-(2**63), 2**63 - 1, (rows,), generator=random).tolist(),
        first_position=2**31 - rows // 2,
    )


def any_logits(rows: int, vocab_size: int, random: torch.Generator) -> Tensor:
    """Flat and steep rows; a third with many ties, a third with forbidden tokens."""
    logits = torch.randn(rows, vocab_size, generator=random) * 10 ** (torch.rand(rows, 1, generator=random) * 2.5 - 1)
    logits[::3] = (logits[::3] * 2).round() / 2
    logits[1::3, 1:][torch.rand(logits[1::3, 1:].shape, generator=random) < 0.3] = -math.inf
    return logits


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 5, 16, 31, 33, 64, 151, 1003, 2048, 5001])
def test_draws_the_torch_samplers_tokens(ops, vocab_size, random):
    logits, given = any_logits(200, vocab_size, random), any_draws(200, random)
    assert torch.equal(ops.sample(logits, given), reference_sampling.sample(logits, given))
    assert torch.equal(ops.greedy(logits), logits.argmax(-1))


@pytest.mark.parametrize("params", [{}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 12, "top_p": 0.9}, {"floor": math.log(0.2)}], ids=str)
def test_draws_them_again_and_again(ops, params, random):
    logits = torch.randn(1, 61, generator=random).expand(500, -1)
    given = draws(500, temperature=0.9, **params)
    tokens = reference_sampling.sample(logits, given)
    assert len(tokens.unique()) > 3
    assert torch.equal(ops.sample(logits, given), tokens)


@pytest.mark.parametrize("params", [{}, {"top_k": 50}, {"top_p": 0.95}, {"top_k": 140_000, "top_p": 0.9}], ids=str)
def test_a_large_vocabulary(ops, params, random):
    logits, given = 3 * torch.randn(3, 151_936, generator=random), draws(3, **params)
    assert torch.equal(ops.sample(logits, given), reference_sampling.sample(logits, given))


@pytest.mark.parametrize("params", [{"top_k": 2}, {"top_p": 0.7}], ids=str)
def test_equal_logits_at_the_edge_are_all_kept(ops, params):
    logits = torch.full((300, 40), -2.0)
    logits[:, [4, 8, 15, 16]] = 2.5
    logits[:, 23] = 3.0
    assert set(ops.sample(logits, draws(300, **params)).tolist()) == {4, 8, 15, 16, 23}


def test_top_p_is_of_what_top_k_keeps_below_the_floor_too(ops):
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log().expand(300, -1)
    of_three = draws(300, top_k=3, top_p=0.5, floor=math.log(0.7))  # 0.4 of 0.9 is too little: two are kept
    assert set(ops.sample(logits, of_three).tolist()) == {0, 1}
    of_two = draws(300, top_k=2, top_p=0.5, floor=math.log(0.7))  # 0.4 of 0.7 is enough
    assert set(ops.sample(logits, of_two).tolist()) == {0}


def test_of_equally_good_entries_greedy_takes_the_lowest_and_noise_decides_at_a_tiny_temperature(ops):
    logits = torch.zeros(1, 70)
    logits[0, [66, 9, 30]] = 1.0
    assert ops.greedy(logits).tolist() == [9]
    given = draws(100, temperature=1e-30)
    tokens = ops.sample(logits.expand(100, -1), given)
    assert set(tokens.tolist()) == {9, 30, 66}
    assert torch.equal(tokens, reference_sampling.sample(logits.expand(100, -1), given))


@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}], ids=str)
def test_a_broken_row_gets_a_valid_id_and_spoils_no_other(ops, params, random):
    logits = torch.randn(5, 100, generator=random)
    whole = ops.sample(logits, draws(5, **params))
    logits[0] = math.nan
    logits[2, 40] = math.inf
    logits[3] = -math.inf
    tokens = ops.sample(logits, draws(5, **params))
    assert tokens[[0, 2, 3]].tolist() == [0, 40, 0]
    assert torch.equal(tokens[[1, 4]], whole[[1, 4]])
    logits[1, 60] = math.nan
    assert 0 <= ops.sample(logits, draws(5, **params))[1] < 100 and ops.greedy(logits)[1] != 60


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_draws_the_same_alone_in_a_batch_and_on_two_threads(ops, threads, random):
    logits, given = any_logits(40, 4099, random), any_draws(40, random)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        together = ops.sample(logits, given)
        alone = [ops.sample(logits[r : r + 1], part(given, torch.tensor([r]))) for r in range(40)]
        order = torch.randperm(40, generator=random)
        shuffled = ops.sample(logits[order], part(given, order))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat(alone), together)
    assert torch.equal(shuffled, together[order])
    assert torch.equal(together, reference_sampling.sample(logits, given))


def test_rows_of_something_wider(ops, random):
    wide, given = torch.randn(6, 500, generator=random), draws(6)
    assert torch.equal(ops.sample(wide[:, 3:104], given), ops.sample(wide[:, 3:104].contiguous(), given))
    assert torch.equal(ops.greedy(wide[:, 3:104]), wide[:, 3:104].argmax(-1))


def test_what_it_cannot_read_is_refused(ops):
    logits = torch.randn(4, 60)
    for wrong in (logits.T, logits[:, ::2], logits.double(), logits.bfloat16()):
        with pytest.raises(AssertionError):
            ops.greedy(wrong)
    for given in (draws(3), part(draws(8), torch.arange(8)[::2].expand(1, -1))):
        with pytest.raises(AssertionError):
            ops.sample(logits, given)


def test_no_rows(ops):
    assert ops.greedy(torch.zeros(0, 100)).shape == ops.sample(torch.zeros(0, 100), draws(0)).shape == (0,)


def test_no_noise_exceeds_its_bound(ops, random):
    """At the ends, around every power of two from both ends, where the bound's steps are, and anywhere."""
    edges = {word + step for bit in range(33) for word in (2**bit, 2**32 - 2**bit) for step in range(-3, 4)}
    edges = torch.tensor(sorted(word for word in edges if 0 <= word < 2**32))
    words = torch.cat((edges, torch.randint(2**32, (2**18 - len(edges),), generator=random)))
    in_32_bits, (noise, bounds) = words.to(torch.int32), torch.empty(2, len(words))
    LIBRARY.disaggd_noise(ops.isa, in_32_bits.data_ptr(), noise.data_ptr(), bounds.data_ptr(), len(words))
    torch.testing.assert_close(noise, reference_sampling.gumbel(words), rtol=2**-23, atol=0)
    assert (bounds > noise).all()
    near_one = (words > 0.9 * 2**32) & (words < 2**32 - 64)
    assert near_one.sum() > 10_000 and (bounds - noise)[near_one].max() < 0.12  # tight where entries win


def test_it_serves_on_cpus():
    chosen = kernels.select(torch.device("cpu"))
    assert chosen.greedy.__self__ == chosen.sample.__self__ == Native(LIBRARY, BEST)
