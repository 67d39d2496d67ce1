"""Logits → tokens in plain torch: right on every device; serves on a CPU without the native kernels.

    score[v] = (logit[v] − max logit) / temperature
    keep v   if score[v] ≥ the k-th best, ≥ the one that makes the best ones' share of the kept mass reach p, and ≥ `floor`
    token    = argmax over kept v of score[v] + gumbel(seed, position, v);   temperature 0: argmax of the logits; ties to the lowest id
    gumbel   = −log(−log((word + ½) / 2³²)),   word: lane v & 3 of Philox4x32-10, key = seed, counter = (v >> 2, position, 0, 0)

The filters are one threshold per row on scores relative to the row's best: of equal scores all are kept or none, so that what is kept does
not depend on how a sort breaks ties.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from disaggd.kernels.draws import Draws

_MASK32 = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10

_LANES = 4  # words of one Philox call: the noise of four neighbouring vocabulary entries

_NUCLEUS_WIDTH = 1024  # top-p sorts so many of the best scores first; the whole row only if they do not hold enough


def greedy(logits: Tensor) -> Tensor:
    """int64 [rows]: the best entry of each row of `logits` [rows, vocab_size]; of equals the lowest."""
    return logits.argmax(-1)


def sample(logits: Tensor, draws: Draws) -> Tensor:
    """int64 [rows]: a token for each row of `logits` float32 [rows, vocab_size], which stay as they are."""
    tokens = greedy(logits)
    drawn = draws.temperatures.nonzero()[:, 0]
    if len(drawn):
        tokens[drawn] = _draw(logits if len(drawn) == len(logits) else logits[drawn], draws, drawn)
    return tokens


def top_logprobs(logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(float32 [rows], int64 [rows, count], float32 [rows, count]): of the chosen `tokens` int64 [rows], and the likeliest entries."""
    logprobs = logits.log_softmax(-1)
    values, likeliest = logprobs.topk(min(count, logits.shape[-1]))
    return logprobs.gather(1, tokens[:, None])[:, 0], likeliest, values


# ── filters and the draw ──


def _draw(logits: Tensor, draws: Draws, rows: Tensor) -> Tensor:
    """int64 [len(rows)]: the token of each row by Gumbel-max over what its filters keep; `rows` of `draws`, none of them greedy."""
    scores = (logits - logits.amax(-1, keepdim=True)) / draws.temperatures[rows, None]  # 0 at best: no temperature overflows
    kept = torch.full_like(scores[:, :1], -torch.inf)
    if draws.any_top_k:
        kept = _top_k_threshold(scores, draws.top_k[rows])
    if draws.any_top_p:
        kept = kept.maximum(_top_p_threshold(scores, kept, draws.top_p[rows]))
    scores = scores.masked_fill(scores < kept.maximum(draws.floors[rows, None]), -torch.inf)
    return _gumbel_argmax(scores, draws.seeds[rows], draws.positions[rows])


def _top_k_threshold(scores: Tensor, top_k: Tensor) -> Tensor:
    """[rows, 1]: the k-th best score; −inf where all are kept."""
    threshold = torch.full_like(scores[:, :1], -torch.inf)
    limited = ((top_k > 0) & (top_k < scores.shape[-1])).nonzero()[:, 0]
    if len(limited):
        ks = top_k[limited].long()
        best = scores[limited].topk(int(ks.max())).values
        threshold[limited] = best.gather(1, ks[:, None] - 1)
    return threshold


def _top_p_threshold(scores: Tensor, kept: Tensor, top_p: Tensor) -> Tensor:
    """[rows, 1]: the score of the token that makes the best ones' share of the kept mass reach p; −inf where all are kept."""
    threshold = torch.full_like(kept, -torch.inf)
    limited = (top_p < 1).nonzero()[:, 0]
    if len(limited):
        threshold[limited] = _nucleus_threshold(scores[limited], kept[limited], top_p[limited, None], _NUCLEUS_WIDTH)
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


def _gumbel_argmax(scores: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """int64 [rows]: argmax of `scores` + noise. Noise is made only for groups of four entries with one above −inf."""
    rows, vocab_size = scores.shape
    grouped = F.pad(scores, (0, -vocab_size % _LANES), value=-torch.inf).view(rows, -1, _LANES)
    row, group = (grouped > -torch.inf).any(-1).nonzero(as_tuple=True)
    key = seeds[row] & _MASK32, seeds[row] >> 32 & _MASK32
    nothing = torch.zeros_like(group)
    words = philox((group, positions[row], nothing, nothing), key)
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
