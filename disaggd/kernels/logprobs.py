"""Log-probabilities of a few entries of each row of logits.

    logprob[v] = (logit[v] − m) − log Σ exp(logit − m),   m the row's best

A row is summed by many programs, each its part relative to the part's own best, and put together by one: nothing of the size of the
vocabulary is written.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from disaggd.kernels.configurations import LEAST_ENTRIES, VOCABULARY
from disaggd.kernels.pool import FLOATS


@triton.jit
def _sum_parts(values, sums, logits, vocab_size, stride_logits, SIZE: tl.constexpr):
    """Best logit of every part of a row, and Σ exp(logit − it)."""
    row = tl.program_id(0).to(tl.int64)
    entries = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    x = tl.load(logits + row * stride_logits + entries, mask=entries < vocab_size, other=float("-inf")).to(tl.float32)
    best = tl.max(x, 0)
    origin = tl.where(best == float("-inf"), 0.0, best)  # a part may hold nothing but forbidden tokens
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(values + at, best)
    tl.store(sums + at, tl.sum(tl.exp(x - origin), 0))


# What changes from step to step is not specialized on: a new parity of it would compile anew, under a request.
@triton.jit(do_not_specialize=["count"])
def _of_entries(out, logits, entries, values, sums, count, parts, stride_logits, COUNT: tl.constexpr, PARTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    value = tl.load(values + row * parts + part, mask=part < parts, other=float("-inf"))
    best = tl.max(value, 0)
    total = tl.sum(tl.load(sums + row * parts + part, mask=part < parts, other=0.0) * tl.exp(value - best), 0)
    wanted = tl.arange(0, COUNT)
    entry = tl.load(entries + row * count + wanted, mask=wanted < count, other=0)
    x = tl.load(logits + row * stride_logits + entry, mask=wanted < count, other=0.0).to(tl.float32)
    tl.store(out + row * count + wanted, x - best - tl.log(total), mask=wanted < count)


def logprobs(logits: Tensor, entries: Tensor) -> Tensor:
    """float32 [rows, n]: log-probabilities, under each row of `logits` [rows, vocab_size], of its `entries` int64 [rows, n]."""
    (rows, vocab_size), (_, count), device = logits.shape, entries.shape, logits.device
    assert logits.dtype in FLOATS and logits.stride(1) == 1, f"{logits.dtype}, strides {logits.stride()}"
    assert entries.shape[0] == rows and entries.dtype == torch.int64 and entries.is_contiguous()
    out = torch.empty((rows, count), dtype=torch.float32, device=device)
    if out.numel() == 0:
        return out
    parts = triton.cdiv(vocab_size, VOCABULARY.size)
    values, sums = (torch.empty((rows, parts), dtype=torch.float32, device=device) for _ in range(2))
    _sum_parts[(rows, parts)](values, sums, logits, vocab_size, logits.stride(0), SIZE=VOCABULARY.size, num_warps=VOCABULARY.warps)
    _of_entries[(rows,)](
        out,
        logits,
        entries,
        values,
        sums,
        count,
        parts,
        logits.stride(0),
        COUNT=max(LEAST_ENTRIES, triton.next_power_of_2(count)),
        PARTS=triton.next_power_of_2(parts),
        num_warps=1,
    )
    return out


def top_logprobs(logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(float32 [rows], int64 [rows, count], float32 [rows, count]): of the chosen `tokens` int64 [rows], and the likeliest entries."""
    likeliest = logits.topk(min(count, logits.shape[1])).indices  # radix selection; [rows, 0] for none
    found = logprobs(logits, torch.cat((tokens[:, None], likeliest), 1))
    return found[:, 0], likeliest, found[:, 1:]
