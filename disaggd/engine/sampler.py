"""Logits → tokens, as each sequence's request wants them. Runs on the compute thread, waits for no device, and keeps nothing between calls.

A token is the argmax of score + Gumbel noise, and the noise of a vocabulary entry is a pure function of (seed, position, entry): the same
sequence draws the same token on any node, in any batch, after any failure. The order of work is

    bias and penalties → (greedy: argmax) → temperature → top-k → top-p → min-p → Gumbel-max

of which the first is done here and the rest by `Ops.sample`; `kernels/reference_sampling.py` has the formulas.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from disaggd.engine.staging import download, upload
from disaggd.kernels import Ops
from disaggd.kernels.draws import Draws
from disaggd.sampling import SamplingParams, TokenLogprob

# u lies in [2⁻³³, 1 − 2⁻³³], so noise lies in [−3.14, 22.88]: an entry further below the best than the difference can never win.
_HOPELESS = -26.1


@dataclass(frozen=True, slots=True)
class SamplerRow:
    """What the sampler needs to know of the sequence behind one row of logits."""

    params: SamplingParams
    tokens: Sequence[int]
    """Prompt, then output so far, as far as the host knows it: all but perhaps the last."""
    num_prompt_tokens: int
    position: int
    """Index in the sequence, prompt included, of the token that is drawn now."""


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The drawn token; `logprob` if its request asked for logprobs."""

    token: int
    logprob: TokenLogprob | None = None


class Drawn:
    """The tokens of one step: on the device at once, on the host when they are asked for."""

    def __init__(self, ops: Ops, logits: Tensor, tokens: Tensor, rows: Sequence[SamplerRow]) -> None:
        self.tokens = tokens
        """int64 [rows], on the device."""
        self._num_logprobs = {index: row.params.top_logprobs for index, row in enumerate(rows) if row.params.top_logprobs is not None}
        self._read = download([tokens, *self._logprobs(ops, logits)])

    def read(self) -> list[SampledToken]:
        """Waits for the device."""
        tokens, *logprobs = (tensor.tolist() for tensor in self._read())
        if not self._num_logprobs:
            return [SampledToken(token) for token in tokens]
        of_row = {
            index: TokenLogprob(chosen, tuple(zip(ids[:count], values[:count], strict=True)))
            for (index, count), chosen, ids, values in zip(self._num_logprobs.items(), *logprobs, strict=True)
        }
        return [SampledToken(token, of_row.get(index)) for index, token in enumerate(tokens)]

    def _logprobs(self, ops: Ops, logits: Tensor) -> tuple[Tensor, ...]:
        """Of the rows that ask for them, under the model's own distribution: before bias, penalties and temperature."""
        if not self._num_logprobs:
            return ()
        [wanted] = upload([np.array(list(self._num_logprobs))], logits.device)
        return ops.top_logprobs(logits[wanted], self.tokens[wanted], max(self._num_logprobs.values()))


def draw(ops: Ops, logits: Tensor, last_tokens: Tensor, rows: Sequence[SamplerRow]) -> Drawn:
    """One token for each of `logits` float32 [len(rows), vocab]; `logits` stay as they are.

    `last_tokens` int64 [len(rows)], on the device: the token at `position - 1` of each, which the host may not know yet.
    """
    assert len(logits) == len(rows)
    adjusted = _adjust(logits, last_tokens, rows)
    if all(row.params.temperature == 0 for row in rows):
        return Drawn(ops, logits, ops.greedy(adjusted), rows)
    return Drawn(ops, logits, ops.sample(adjusted, _draws(rows, logits.device)), rows)


def _draws(rows: Sequence[SamplerRow], where: torch.device) -> Draws:
    params = [row.params for row in rows]
    temperatures, top_k, top_p, floors, seeds, positions = upload(
        [
            np.array([p.temperature for p in params], np.float32),
            np.array([p.top_k for p in params], np.int32),
            np.array([p.top_p for p in params], np.float32),
            np.array([max(math.log(p.min_p), _HOPELESS) if p.min_p > 0 else _HOPELESS for p in params], np.float32),
            np.array([p.seed for p in params], np.uint64).view(np.int64),
            np.array([row.position for row in rows], np.int64),
        ],
        where,
    )
    any_top_k, any_top_p = any(p.top_k > 0 for p in params), any(p.top_p < 1 for p in params)
    return Draws(temperatures, top_k, top_p, floors, seeds, positions, any_top_k, any_top_p)


# ── bias and penalties ──


def _adjust(logits: Tensor, last_tokens: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
    """Logits with each row's bias and penalties; `logits` itself when no row has any."""
    special = [index for index, row in enumerate(rows) if _is_adjusted(row.params)]
    if not special:
        return logits
    adjusted = logits.clone()
    for index in special:
        _adjust_row(adjusted[index], last_tokens[index : index + 1], rows[index])
    return adjusted


def _is_adjusted(params: SamplingParams) -> bool:
    return bool(params.logit_bias or params.presence_penalty or params.frequency_penalty) or params.repetition_penalty != 1.0


def _adjust_row(logits: Tensor, last_token: Tensor, row: SamplerRow) -> None:
    """`last_token` int64 [1] may repeat an id of the tokens before it: then both entries of that id are given the same value."""
    params, before = row.params, row.tokens[: row.position - 1]
    if params.logit_bias:
        ids, values = upload([_ids(params.logit_bias), np.array(list(params.logit_bias.values()), np.float32)], logits.device)
        logits[ids] += values
    if params.repetition_penalty != 1.0:
        seen = torch.cat((*upload([_ids(set(before))], logits.device), last_token))
        of_seen = logits[seen]
        logits[seen] = torch.where(of_seen > 0, of_seen / params.repetition_penalty, of_seen * params.repetition_penalty)
    if row.position > row.num_prompt_tokens and (params.frequency_penalty or params.presence_penalty):
        counts = Counter(before[row.num_prompt_tokens :])
        ids, times = upload([_ids(counts), _ids(counts.values())], logits.device)
        again = ids == last_token
        ids, times = torch.cat((ids, last_token)), torch.cat((times + again, 1 + (times * again).sum(0, keepdim=True)))
        logits[ids] -= params.frequency_penalty * times + params.presence_penalty


def _ids(values: Iterable[int]) -> NDArray[np.int64]:
    return np.fromiter(values, np.int64)
