"""The sampler draws from the right distribution, the same token in any batch, and obeys every parameter exactly."""

import math
from dataclasses import replace

import pytest
import torch

from disaggd.engine.sampler import SamplerRow, draw
from disaggd.kernels import REFERENCE
from disaggd.kernels.reference_sampling import gumbel, philox
from disaggd.sampling import SamplingParams

KNOWN = [  # from the Random123 distribution: counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def row(tokens=(1, 2, 3), num_prompt_tokens=None, **params):
    prompt = len(tokens) if num_prompt_tokens is None else num_prompt_tokens
    return SamplerRow(SamplingParams(**params), list(tokens), prompt, len(tokens))


def sample(logits, rows, *, known=True):
    """What is drawn; unless `known`, the host does not know each sequence's last token yet."""
    last_tokens = torch.tensor([row.tokens[-1] for row in rows], dtype=torch.int64)
    shown = rows if known else [replace(row, tokens=row.tokens[:-1]) for row in rows]
    return draw(REFERENCE, logits, last_tokens, shown).read()


def draws(logits, count, **params):
    """`count` tokens drawn from `logits` [vocab], with the seeds 0, 1, …"""
    rows = [row(seed=seed, **params) for seed in range(count)]
    return [drawn.token for drawn in sample(logits.expand(count, -1), rows)]


def chosen(logits, **kwargs):
    [drawn] = sample(torch.tensor([logits]), [row(**kwargs)])
    assert [drawn] == sample(torch.tensor([logits]), [row(**kwargs)], known=False)
    return drawn.token


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_words(counter, key, words):
    columns = [torch.tensor([word, word]) for word in (*counter, *key)]
    ours = philox(tuple(columns[:4]), tuple(columns[4:]))
    assert [tensor.tolist() for tensor in ours] == [[word, word] for word in words]


def test_gumbel_is_finite_and_monotone_at_the_ends():
    noise = gumbel(torch.tensor([0, 1, 2**31, 2**32 - 2, 2**32 - 1]))
    assert noise.dtype == torch.float32
    assert noise.tolist() == sorted(noise.tolist())
    assert noise[0].item() == pytest.approx(-math.log(33 * math.log(2)))
    assert noise[-1].item() == pytest.approx(33 * math.log(2))


def test_greedy_takes_the_lowest_of_equal_logits():
    assert chosen([0.0, 3.0, 3.0, -1.0], temperature=0.0) == 1


def test_noise_is_the_stated_function_of_seed_position_and_entry():
    logits = torch.linspace(-1, 1, 11)
    seed, position = 0xFEDCBA9876543210, 5
    noise = torch.empty(11)
    for entry in range(11):
        words = philox(*(tuple(torch.tensor([w]) for w in part) for part in ((entry >> 2, position, 0, 0), (0x76543210, 0xFEDCBA98))))
        noise[entry] = gumbel(words[entry & 3])
    expected = (logits - 1 + noise).argmax().item()
    assert chosen(logits.tolist(), tokens=range(5), seed=seed) == expected


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({}, range(8)),
        ({"temperature": 0.6}, range(8)),
        ({"top_k": 3}, (5, 6, 7)),
        ({"top_p": 0.8}, (5, 6, 7)),
        ({"min_p": 0.3}, (6, 7)),
        ({"top_k": 5, "top_p": 0.9, "min_p": 0.1, "temperature": 1.3}, (4, 5, 6, 7)),
    ],
)
def test_draws_follow_the_distribution(params, kept):
    logits = torch.tensor([-3.0, -2.5, -1.0, -0.5, 0.0, 0.4, 1.0, 2.0])
    probabilities = torch.zeros(8)
    probabilities[list(kept)] = (logits[list(kept)] / params.get("temperature", 1.0)).softmax(-1)
    count = 20_000
    observed = torch.tensor(draws(logits, count, **params)).bincount(minlength=8)
    assert observed[probabilities == 0].sum() == 0
    expected = probabilities[list(kept)] * count
    chi_square = ((observed[list(kept)] - expected) ** 2 / expected).sum().item()
    assert chi_square < {2: 10.83, 3: 13.82, 4: 16.27, 8: 24.32}[len(kept)]  # 99.9 %, of fixed seeds: passes always or never


def test_positions_draw_independently():
    logits = torch.zeros(1, 2)
    tokens = [sample(logits, [SamplerRow(SamplingParams(seed=9), [1], 1, position)])[0].token for position in range(400)]
    pairs = torch.tensor(tokens[:-1]) * 2 + torch.tensor(tokens[1:])
    assert (pairs.bincount(minlength=4) > 70).all()


def test_a_row_draws_the_same_in_any_batch():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(24, 1003, generator=generator) * 3
    choices = [{}, {"top_k": 7}, {"top_p": 0.7}, {"min_p": 0.05}, {"temperature": 0.0}, {"top_k": 50, "top_p": 0.9, "temperature": 1.7}]
    choices += [{"repetition_penalty": 1.3, "top_p": 0.99}, {"top_p": 0.999, "temperature": 3.0}]
    rows = [row(tokens=range(index + 1), num_prompt_tokens=1, seed=index, **choices[index % len(choices)]) for index in range(24)]
    together = [drawn.token for drawn in sample(logits, rows)]
    assert together == [sample(logits[index : index + 1], [rows[index]])[0].token for index in range(24)]
    order = torch.randperm(24, generator=generator).tolist()
    assert [together[index] for index in order] == [drawn.token for drawn in sample(logits[order], [rows[index] for index in order])]


def test_top_k_keeps_all_that_tie_with_the_kth():
    logits = torch.tensor([1.0, 0.0, 1.0, 2.0, 1.0])
    assert set(draws(logits, 300, top_k=2)) == {0, 2, 3, 4}
    assert set(draws(logits, 100, top_k=1)) == {3}
    assert set(draws(logits, 300, top_k=9)) == {0, 1, 2, 3, 4}


def test_top_p_keeps_the_token_that_crosses():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(draws(logits, 400, top_p=0.6)) == {0, 1}
    assert set(draws(logits, 400, top_p=0.45)) == {0}
    assert set(draws(logits, 400, top_p=0.81)) == {0, 1, 2}
    assert set(draws(logits, 50, top_p=0.0)) == {0}


def test_top_p_is_of_the_mass_that_top_k_keeps():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert set(draws(logits, 400, top_p=0.5)) == {0, 1}
    assert set(draws(logits, 400, top_p=0.5, top_k=2)) == {0}


def test_top_p_finds_a_nucleus_wider_than_its_first_look():
    logits = torch.zeros(5000)
    logits[3000:] = -1.0  # p = 0.5 needs about 1,868 of the first 3,000, which tie: all of them are kept
    tokens = set(draws(logits, 200, top_p=0.5))
    assert max(tokens) < 3000
    assert max(tokens) > 2000


def test_min_p_is_relative_to_the_best():
    logits = torch.tensor([0.6, 0.31, 0.29, 0.05]).log()
    assert set(draws(logits, 400, min_p=0.5)) == {0, 1}
    assert set(draws(logits, 50, min_p=1.0)) == {0}


def test_tiny_temperature_is_greedy_and_finite():
    assert set(draws(torch.tensor([50.0, 49.0, 80.0, 79.9]), 50, temperature=1e-30)) == {2}


def test_penalties_and_bias():
    # Prompt 0, 1; output 2, 2, 3.
    sequence = {"tokens": (0, 1, 2, 2, 3), "num_prompt_tokens": 2, "temperature": 0.0}
    assert chosen([0.0, 0.0, 1.0, 0.9, 0.5], **sequence) == 2
    assert chosen([0.0, 0.0, 1.0, 0.9, 0.5], frequency_penalty=0.3, **sequence) == 3  # 1 − 2·0.3 < 0.9 − 0.3
    assert chosen([0.0, 0.0, 1.0, 0.9, 0.5], presence_penalty=0.6, **sequence) == 4  # the prompt's tokens are not penalized
    assert chosen([0.7, 0.0, 1.0, 0.9, 0.5], presence_penalty=0.6, **sequence) == 0
    assert chosen([2.0, 0.0, 1.9, 1.8, 1.1], repetition_penalty=2.0, **sequence) == 4  # but repeat by `repetition_penalty`
    assert chosen([-1.0, -1.0, -1.0, -1.0, -1.5], repetition_penalty=2.0, **sequence) == 4  # a negative logit is multiplied
    assert chosen([0.0, 0.0, 1.0, 0.9, 0.5], logit_bias={1: 5.0, 2: -100.0}, **sequence) == 1
    repeating = sequence | {"tokens": (0, 1, 2, 3, 2)}  # the last token again: once more than the host may know
    assert chosen([0.0, 0.0, 1.0, 0.9, 0.5], frequency_penalty=0.3, **repeating) == 3
    assert chosen([2.0, 0.0, 1.9, 1.8, 1.1], repetition_penalty=2.0, **repeating) == 4
    assert chosen([0.0, 0.0, 1.0, 0.9, 0.5], presence_penalty=0.6, **(sequence | {"tokens": (0, 1)})) == 2  # no output yet


def test_bias_comes_before_penalties_and_leaves_the_logits_alone():
    logits = torch.tensor([[1.0, 0.0, 1.6]])
    # (1 + 2) / 2 = 1.5 < 1.6; the other order would give 1 / 2 + 2 = 2.5.
    [drawn] = sample(logits, [row(tokens=[0], temperature=0.0, repetition_penalty=2.0, logit_bias={0: 2.0})])
    assert drawn.token == 2
    assert logits.tolist() == [[1.0, 0.0, pytest.approx(1.6)]]


def test_logprobs_are_of_the_raw_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    raw = logits[0].log_softmax(-1).tolist()
    rows = [row(temperature=0.0, top_logprobs=2, logit_bias={0: 9.0}), row(temperature=0.0), row(top_k=1, temperature=9.0, top_logprobs=0)]
    first, second, third = sample(logits, rows)
    assert (first.token, second.token, third.token) == (0, 2, 2)
    assert first.logprob.logprob == pytest.approx(raw[0])
    assert first.logprob.top == ((2, pytest.approx(raw[2])), (1, pytest.approx(raw[1])))
    assert second.logprob is None
    assert (third.logprob.logprob, third.logprob.top) == (pytest.approx(raw[2]), ())


def test_no_rows_draw_nothing():
    assert sample(torch.empty(0, 7), []) == []
