"""The device's sampler draws what the reference draws, and its log-probabilities are log_softmax's."""

import math

import pytest
import torch

from disaggd.engine import sampler
from disaggd.engine.sampler import SamplerRow
from disaggd.kernels import reference_sampling
from disaggd.kernels.configurations import VOCABULARY, RowTile
from disaggd.kernels.logprobs import logprobs, top_logprobs
from disaggd.kernels.sampling import greedy, sample
from disaggd.sampling import SamplingParams


@pytest.fixture
def small_tiles(monkeypatch):
    """Rows of a hundred logits in several parts, each of several chunks: what 152k are to the tiles that serve."""
    monkeypatch.setattr("disaggd.kernels.sampling.VOCABULARY", RowTile(64, 1))
    monkeypatch.setattr("disaggd.kernels.sampling.COUNT", RowTile(32, 1))


def row(position, **params):
    return SamplerRow(params=SamplingParams(**params), tokens=[], num_prompt_tokens=0, position=position)


def draws_of(rows, device):
    return sampler._draws(rows, device)


def expected(logits, rows):
    return reference_sampling.sample(logits, draws_of(rows, logits.device)).tolist()


@pytest.mark.parametrize("vocab_size", [1, 50, VOCABULARY.size, VOCABULARY.size + 3])
def test_greedy_is_argmax(vocab_size, generator, where):
    logits = torch.randn(3, vocab_size, generator=generator, device=where)
    assert torch.equal(greedy(logits), logits.argmax(-1))


def test_of_equal_logits_greedy_takes_the_lowest_id(where):
    logits = torch.zeros(1, 2 * VOCABULARY.size, device=where)
    logits[0, [VOCABULARY.size + 1, 9, 70]] = 1.0
    assert greedy(logits).tolist() == [9]


MIXED = [
    row(3, temperature=1.0, seed=1),
    row(2**31 + 5, temperature=0.7, top_k=5, seed=2**64 - 3),
    row(0, temperature=1.3, top_p=0.8, seed=2**63),
    row(9, temperature=0.0, top_k=5, top_p=0.1, seed=4),
    row(10, temperature=1.0, top_k=40, top_p=0.9, min_p=0.05, seed=5),
    row(11, temperature=100.0, min_p=0.9, seed=6),
    row(12, temperature=1e-6, seed=7),
    row(13, temperature=1.0, top_p=1e-9, seed=8),
    row(14, temperature=2.0, top_k=10**6, top_p=0.999, seed=9),
]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("first", [0, 3, 6])
def test_draws_the_torch_samplers_tokens(first, generator, where):
    rows = MIXED[first : first + 3]
    logits = 3 * torch.randn(len(rows), 100, generator=generator, device=where)
    assert sample(logits, draws_of(rows, where)).tolist() == expected(logits, rows)


@pytest.mark.parametrize("params", [{}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 12, "top_p": 0.9}, {"min_p": 0.2}], ids=str)
def test_draws_them_again_and_again(params, generator, where):
    rows = [row(position, seed=11, temperature=0.9, **params) for position in range(4)]
    logits = torch.randn(1, 61, generator=generator, device=where).repeat(len(rows), 1)
    tokens = expected(logits, rows)
    assert len(set(tokens)) > 2
    assert sample(logits, draws_of(rows, where)).tolist() == tokens


@pytest.mark.parametrize("params", [{"top_k": 2}, {"top_p": 0.7}], ids=str)
def test_equal_logits_at_the_edge_are_all_kept(params, where):
    logits = torch.full((6, 40), -2.0, device=where)
    logits[:, [4, 8, 15, 16]] = 2.5
    logits[:, 23] = 3.0
    rows = [row(position, seed=3, **params) for position in range(len(logits))]
    tokens = expected(logits, rows)
    assert set(tokens) <= {4, 8, 15, 16, 23} and len(set(tokens)) > 3
    assert sample(logits, draws_of(rows, where)).tolist() == tokens


def test_forbidden_tokens_are_never_drawn(generator, where):
    logits = torch.randn(2, 300, generator=generator, device=where)
    logits[:, 10:] = -math.inf
    rows = [row(1, temperature=5.0, top_k=200, seed=1), row(2, temperature=5.0, top_p=0.99, seed=2)]
    assert sample(logits, draws_of(rows, where)).tolist() == expected(logits, rows)


def test_logits_may_be_rows_of_something_wider(generator, where):
    logits = torch.randn(3, 200, generator=generator, device=where)[:, :100]
    assert torch.equal(greedy(logits), logits.argmax(-1))


def test_no_rows(where):
    nothing = torch.zeros(0, 100, device=where)
    assert greedy(nothing).shape == (0,)
    assert sample(nothing, draws_of([], where)).shape == (0,)
    assert logprobs(nothing, torch.zeros(0, 2, dtype=torch.int64, device=where)).shape == (0, 2)


@pytest.mark.parametrize("vocab_size", [3, VOCABULARY.size + 100])
def test_logprobs_equal_log_softmax(vocab_size, generator, where):
    logits = 10 * torch.randn(2, vocab_size, generator=generator, device=where)
    entries = torch.tensor([[0, 2, 1], [vocab_size - 1, 1, 1]], device=where)
    expected = logits.double().log_softmax(-1).gather(1, entries)
    torch.testing.assert_close(logprobs(logits, entries).double(), expected, atol=5e-6, rtol=1e-6)


def test_logprobs_with_a_part_of_forbidden_tokens(generator, where):
    logits = torch.randn(1, 2 * VOCABULARY.size, generator=generator, device=where)
    logits[:, VOCABULARY.size :] = -math.inf
    entries = torch.tensor([[5, VOCABULARY.size + 5]], device=where)
    found = logprobs(logits, entries)
    assert found[0, 1] == -math.inf
    torch.testing.assert_close(found[0, 0], logits[0].log_softmax(-1)[5])


@pytest.mark.parametrize("count", [0, 4])
def test_top_logprobs_are_the_likeliest(count, generator, where):
    logits = torch.randn(2, 500, generator=generator, device=where)
    all_of_them = logits.log_softmax(-1)
    tokens = torch.tensor([7, 499], device=where)
    chosen, ids, values = top_logprobs(logits, tokens, count)
    torch.testing.assert_close(chosen, all_of_them.gather(1, tokens[:, None])[:, 0])
    torch.testing.assert_close((values, ids), tuple(all_of_them.topk(count)))
