"""Logits → tokens. Runs on the compute thread and keeps nothing between calls.

A token is the argmax of score + Gumbel noise, and the noise of a vocabulary entry is a pure function of (seed, position, entry): the same
sequence draws the same token on any node, in any batch, after any failure. The order of work is

    bias and penalties → (greedy: argmax) → temperature → top-k → top-p → min-p → Gumbel-max

and the last four filters are one threshold per row on scores relative to the row's best: of equal scores all are kept or none, so that
what is kept does not depend on how a sort breaks ties.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from disaggd.sampling import SamplingParams, TokenLogprob

_MASK32 = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10

_LANES = 4  # words of one Philox call: the noise of four neighbouring vocabulary entries

# u lies in [2⁻³³, 1 − 2⁻³³], so noise lies in [−3.14, 22.88]: an entry further below the best than the difference can never win.
_HOPELESS = -26.1

_NUCLEUS_WIDTH = 1024  # top-p sorts so many of the best scores first; the whole row only if they do not hold enough


@dataclass(frozen=True, slots=True)
class SamplerRow:
    """What the sampler needs to know of the sequence behind one row of logits."""

    params: SamplingParams
    tokens: Sequence[int]
    """Prompt, then output so far."""
    num_prompt_tokens: int
    position: int
    """Index in the sequence, prompt included, of the token that is drawn now."""


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The drawn token; `logprob` if its request asked for logprobs."""

    token: int
    logprob: TokenLogprob | None = None


def sample(logits: Tensor, rows: Sequence[SamplerRow]) -> list[SampledToken]:
    """Draw one token for each of `logits` float32 [len(rows), vocab]; `logits` stay as they are.

    Log-probabilities are of the model's own distribution, before bias, penalties and temperature.
    """
    assert len(logits) == len(rows)
    if not rows:
        return []
    adjusted = _adjust(logits, rows)
    tokens = adjusted.argmax(-1)  # of equal logits the first: the lowest id
    drawn = [index for index, row in enumerate(rows) if row.params.temperature > 0]
    if drawn:
        chosen = adjusted if len(drawn) == len(rows) else adjusted[drawn]
        tokens[drawn] = _draw(chosen, [rows[index] for index in drawn])
    ids = tokens.tolist()
    logprobs = _logprobs(logits, ids, rows)
    return [SampledToken(token, logprobs.get(index)) for index, token in enumerate(ids)]


# ── bias and penalties ──


def _adjust(logits: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
    """Logits with each row's bias and penalties; `logits` itself when no row has any."""
    special = [index for index, row in enumerate(rows) if _is_adjusted(row.params)]
    if not special:
        return logits
    adjusted = logits.clone()
    for index in special:
        _adjust_row(adjusted[index], rows[index])
    return adjusted


def _is_adjusted(params: SamplingParams) -> bool:
    return bool(params.logit_bias or params.presence_penalty or params.frequency_penalty) or params.repetition_penalty != 1.0


def _adjust_row(logits: Tensor, row: SamplerRow) -> None:
    params = row.params
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype, device=logits.device)
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(list(set(row.tokens)), device=logits.device)
        of_seen = logits[seen]
        logits[seen] = torch.where(of_seen > 0, of_seen / params.repetition_penalty, of_seen * params.repetition_penalty)
    counts = Counter(row.tokens[row.num_prompt_tokens :])
    if counts and (params.frequency_penalty or params.presence_penalty):
        ids = torch.tensor(list(counts), device=logits.device)
        times = torch.tensor(list(counts.values()), device=logits.device)
        logits[ids] -= params.frequency_penalty * times + params.presence_penalty


# ── temperature, filters, and the draw ──


def _draw(logits: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
    """int64 [len(rows)]: the token of each row by Gumbel-max over what its filters keep."""
    temperatures = _column([row.params.temperature for row in rows], logits)
    scores = (logits - logits.amax(-1, keepdim=True)) / temperatures  # 0 at best: no temperature, however small, overflows
    kept = _top_k_threshold(scores, [row.params.top_k for row in rows])
    kept = kept.maximum(_top_p_threshold(scores, kept, [row.params.top_p for row in rows]))
    kept = kept.maximum(_min_p_threshold(scores, [row.params.min_p for row in rows]))
    scores = scores.masked_fill(scores < kept.clamp(min=_HOPELESS), -torch.inf)
    return _gumbel_argmax(scores, [row.params.seed for row in rows], [row.position for row in rows])


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _top_k_threshold(scores: Tensor, top_k: list[int]) -> Tensor:
    """[rows, 1]: the k-th best score; −inf where all are kept."""
    vocab_size = scores.shape[-1]
    threshold = torch.full_like(scores[:, :1], -torch.inf)
    limited = [index for index, k in enumerate(top_k) if 0 < k < vocab_size]
    if limited:
        ks = torch.tensor([top_k[index] for index in limited], device=scores.device)
        best = scores[limited].topk(int(ks.max())).values
        threshold[limited] = best.gather(1, ks[:, None] - 1)
    return threshold


def _top_p_threshold(scores: Tensor, kept: Tensor, top_p: list[float]) -> Tensor:
    """[rows, 1]: the score of the token that makes the best ones' share of the kept mass reach p; −inf where all are kept."""
    threshold = torch.full_like(kept, -torch.inf)
    limited = [index for index, p in enumerate(top_p) if p < 1]
    if limited:
        shares = _column([top_p[index] for index in limited], scores)
        threshold[limited] = _nucleus_threshold(scores[limited], kept[limited], shares, _NUCLEUS_WIDTH)
    return threshold


def _nucleus_threshold(scores: Tensor, kept: Tensor, shares: Tensor, width: int) -> Tensor:
    vocab_size = scores.shape[-1]
    width = min(width, vocab_size)
    best = scores.topk(width).values
    wanted = shares * _mass(scores, kept).sum(-1, keepdim=True)
    crossing = (_mass(best, kept).cumsum(-1) < wanted).sum(-1, keepdim=True)
    threshold = best.gather(1, crossing.clamp(max=width - 1))
    beyond = (crossing[:, 0] == width).nonzero()[:, 0]
    if len(beyond) and width < vocab_size:
        threshold[beyond] = _nucleus_threshold(scores[beyond], kept[beyond], shares[beyond], vocab_size)
    return threshold


def _mass(scores: Tensor, kept: Tensor) -> Tensor:
    """Unnormalized probabilities of the kept scores, in float64: sums come out alike whatever the batch's shape."""
    return scores.double().exp().masked_fill(scores < kept, 0)


def _min_p_threshold(scores: Tensor, min_p: list[float]) -> Tensor:
    return _column([math.log(p) if p > 0 else -math.inf for p in min_p], scores)


def _gumbel_argmax(scores: Tensor, seeds: list[int], positions: list[int]) -> Tensor:
    """int64 [rows]: argmax of `scores` + noise. Noise is made only for groups of four entries with one above −inf."""
    rows, vocab_size = scores.shape
    grouped = F.pad(scores, (0, -vocab_size % _LANES), value=-torch.inf).view(rows, -1, _LANES)
    row, group = (grouped > -torch.inf).any(-1).nonzero(as_tuple=True)
    of_row = [[seed & _MASK32, seed >> 32, position] for seed, position in zip(seeds, positions, strict=True)]
    key_low, key_high, position = torch.tensor(of_row, device=scores.device)[row].unbind(-1)
    nothing = torch.zeros_like(group)
    words = philox((group, position, nothing, nothing), (key_low, key_high))
    grouped[row, group] += gumbel(torch.stack(words, -1))
    return grouped.flatten(1).argmax(-1)


# ── noise ──


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011): four random words for each counter. Words are 32 bits, held in int64 tensors of one shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        high0, low0 = _multiply(c0, _PHILOX_MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _PHILOX_KEY_STEPS[0]) & _MASK32, (k1 + _PHILOX_KEY_STEPS[1]) & _MASK32
    return c0, c1, c2, c3


def _multiply(words: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of the 64-bit products. int64 wraps, so the bits are right; the mask undoes the sign's shifting in."""
    product = words * factor
    return (product >> 32) & _MASK32, product & _MASK32


def gumbel(words: Tensor) -> Tensor:
    """Random words → standard Gumbel noise, float32; worked out in float64, where u = (word + ½) / 2³² is exact."""
    uniform = (words.double() + 0.5) / 2**32
    return -(-uniform.log()).log().float()


# ── log-probabilities ──


def _logprobs(logits: Tensor, tokens: list[int], rows: Sequence[SamplerRow]) -> dict[int, TokenLogprob]:
    """Those of the rows that ask for them, by row."""
    wanted = {index: row.params.top_logprobs for index, row in enumerate(rows) if row.params.top_logprobs is not None}
    if not wanted:
        return {}
    logprobs = logits[list(wanted)].log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor([[tokens[index]] for index in wanted], device=logits.device))[:, 0].tolist()
    best = logprobs.topk(min(max(wanted.values()), logits.shape[-1]))
    listed = [list(zip(ids, values, strict=True)) for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return {index: TokenLogprob(chosen[i], tuple(listed[i][:count])) for i, (index, count) in enumerate(wanted.items())}
