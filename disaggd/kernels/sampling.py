"""Logits → tokens on the device, drawing what `reference_sampling` draws, without waiting for the host.

    score[v] = (logit[v] − max logit) / temperature
    keep v   if score[v] ≥ the k-th best, ≥ the one that makes the best ones' share of the kept mass reach p, and ≥ `floor`
    token    = argmax over kept v of score[v] + gumbel(seed, position, v);   temperature 0: argmax of the logits; ties to the lowest id
    gumbel   = −log(−log((word + ½) / 2³²)),   word: lane v & 3 of Philox4x32-10, key = seed, counter = (v >> 2, position, 0, 0)

A row of logits is shared by many programs, so that one sequence does not wait for one multiprocessor: every pass is a launch, and the
passes add up in integers, which come out alike in any order. A threshold is found by a radix search over the bits of |score|, four at a
time: eight passes count (top-k) or weigh (top-p) the entries that begin with the bits found so far, by their next four.

Against the torch sampler: scores are the same bits (subtraction and division round alike), and so are those that top-k keeps. The noise is
worked out in float64 and rounded to float32 as there; a last-bit difference of the two `log` changes one noise in some 2²⁸. Masses are
float32 exponentials, summed at a resolution of 2⁻⁴⁰, against float64 ones: the nucleus may differ by its last token where the mass up to it
is within 10⁻⁶ of p. Equal sums of score and noise go to the lower id on both sides.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from disaggd.kernels.configurations import COUNT, VOCABULARY
from disaggd.kernels.draws import Draws
from disaggd.kernels.pool import FLOATS

_BITS = tl.constexpr(4)  # a digit of the radix search
_DIGITS = tl.constexpr(8)
_BINS = tl.constexpr(16)
_UNLIMITED = tl.constexpr(0x7FFFFFFF)  # a key beyond all


@triton.jit
def _best(values, ids, logits, vocab_size, stride_logits, SIZE: tl.constexpr):
    """The best logit of every part of a row, and its lowest id."""
    row = tl.program_id(0).to(tl.int64)
    entries = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    x = tl.load(logits + row * stride_logits + entries, mask=entries < vocab_size, other=float("-inf")).to(tl.float32)
    best = tl.max(x, 0)
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(values + at, best)
    tl.store(ids + at, tl.min(tl.where(x == best, entries, vocab_size), 0))


@triton.jit
def _pick(tokens, values, ids, parts, vocab_size, PARTS: tl.constexpr):
    """The best part's entry; of equals the lowest id."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    value = tl.load(values + row * parts + part, mask=part < parts, other=float("-inf"))
    entry = tl.load(ids + row * parts + part, mask=part < parts, other=vocab_size)
    # Of a row of NaNs no entry is the best: it gets the last, not one beyond the vocabulary.
    chosen = tl.min(tl.where((value == tl.max(value, 0)) & (part < parts), entry, vocab_size), 0)
    tl.store(tokens + row, tl.minimum(chosen, vocab_size - 1).to(tl.int64))


@triton.jit
def _best_of_row(values, row, parts, PARTS: tl.constexpr):
    part = tl.arange(0, PARTS)
    return tl.max(tl.load(values + row * parts + part, mask=part < parts, other=float("-inf")), 0)


@triton.jit
def _scores(x, best, temperature):
    """Scores of the logits `x`: 0 at the row's best, as if the temperature were 1 where it is 0."""
    return tl.div_rn(x - best, tl.zeros_like(x) + tl.where(temperature > 0, temperature, 1.0))


@triton.jit
def _keys(scores):
    """Scores ≤ 0 as integers ≥ 0 that rise as scores fall."""
    return tl.abs(scores).to(tl.int32, bitcast=True)


@triton.jit
def _weights(keys, limit, MASS: tl.constexpr):
    """What each entry counts for: 1, or its mass with 40 bits after the point, if it is within `limit`."""
    if MASS:
        weights = (tl.exp(-keys.to(tl.float32, bitcast=True)) * 1099511627776.0).to(tl.int64)
        weights = tl.where(keys <= limit, weights, 0)
    else:
        weights = tl.full(keys.shape, 1, tl.int64)
    return weights


@triton.jit
def _wanted(wanted, sums, row, vocab_size, MASS: tl.constexpr):
    """(how much a row's search is to gather, whether it is limited at all). `sums` holds the first pass's, if there was one."""
    if MASS:
        share = tl.load(wanted + row)
        total = tl.sum(tl.load(sums + tl.arange(0, _BINS)), 0)
        goal = tl.ceil(share.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
        limited = share < 1
    else:
        goal = tl.load(wanted + row).to(tl.int64)
        limited = (goal > 0) & (goal < vocab_size)
    return goal, limited


@triton.jit
def _found(sums, goal, passes):
    """The leading digits of the key at which the sums reach `goal`, by the first `passes` passes.

    Reads what later passes will fill as well, and ignores it: loads that wait for nothing come back together.
    """
    bins = tl.arange(0, _BINS)
    prefix = 0
    for digit in tl.static_range(_DIGITS):
        counts = tl.load(sums + digit * _BINS + bins)
        short = tl.cumsum(counts, 0) < goal
        goal -= tl.sum(tl.where(short, counts, 0), 0)
        digits = prefix * _BINS + tl.minimum(tl.sum(short.to(tl.int32), 0), _BINS - 1)
        prefix = tl.where(digit < passes, digits, prefix)
    return prefix


@triton.jit
def _limit(wanted, sums, row, vocab_size, MASS: tl.constexpr, SEARCHED: tl.constexpr):
    """The greatest key that a finished search keeps."""
    limit = _UNLIMITED
    if SEARCHED:
        sums += row * _DIGITS * _BINS
        goal, limited = _wanted(wanted, sums, row, vocab_size, MASS)
        limit = tl.where(limited, _found(sums, goal, _DIGITS), _UNLIMITED)
    return limit


@triton.jit(do_not_specialize=["number"])
def _count(
    sums,  # int64 [rows, _DIGITS, _BINS], zero at first
    logits,
    values,
    temperatures,
    wanted,  # top_p float32 if MASS, else top_k int32
    top_k,
    top_k_sums,
    parts,
    vocab_size,
    stride_logits,
    number,
    MASS: tl.constexpr,
    WITHIN_TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Pass `number` of the search: weigh the entries that begin with the digits found, by their next digit."""
    row = tl.program_id(0).to(tl.int64)
    own = sums + row * _DIGITS * _BINS
    goal, limited = _wanted(wanted, own, row, vocab_size, MASS)
    if not limited:
        return
    limit = _limit(top_k, top_k_sums, row, vocab_size, False, WITHIN_TOP_K)
    best = _best_of_row(values, row, parts, PARTS)
    temperature = tl.load(temperatures + row)
    prefix = _found(own, goal, number)
    bins = tl.arange(0, _BINS)
    counts = tl.zeros([_BINS], tl.int64)
    first = tl.program_id(1) * SIZE
    for start in range(first, tl.minimum(first + SIZE, vocab_size), CHUNK):
        entries = start + tl.arange(0, CHUNK)
        x = tl.load(logits + row * stride_logits + entries, mask=entries < vocab_size, other=float("-inf")).to(tl.float32)
        keys = _keys(_scores(x, best, temperature))
        digits = keys >> (_BITS * (_DIGITS - 1 - number))
        counted = (entries < vocab_size) & (digits >> _BITS == prefix)
        counted = counted[:, None] & ((digits & (_BINS - 1))[:, None] == bins[None, :])
        counts += tl.sum(tl.where(counted, _weights(keys, limit, MASS)[:, None], 0), 0)
    tl.atomic_add(own + number * _BINS + bins, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _gumbel(seed, position, groups):
    """Noise of entries 4 · groups + (0, 1, 2, 3), one after another, float32."""
    counters = groups.to(tl.uint32)
    nothing = tl.zeros_like(counters)
    w0, w1, w2, w3 = tl.philox(seed, counters, nothing + position.to(tl.uint32), nothing, nothing)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [4 * groups.shape[0]])
    uniform = (words.to(tl.float64) + 0.5) * (1.0 / 4294967296.0)
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def _draw(
    drawn_values,
    drawn_ids,
    logits,
    values,
    temperatures,
    top_k,
    top_k_sums,
    top_p,
    top_p_sums,
    floors,
    seeds,
    positions,
    parts,
    vocab_size,
    stride_logits,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The best score + noise of every part of a row, and its lowest id. No noise is made for parts of which nothing is kept."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * SIZE
    entries = first + tl.arange(0, SIZE)
    temperature = tl.load(temperatures + row)
    x = tl.load(logits + row * stride_logits + entries, mask=entries < vocab_size, other=float("-inf")).to(tl.float32)
    scores = _scores(x, _best_of_row(values, row, parts, PARTS), temperature)
    if temperature > 0:
        limit = tl.minimum(
            _limit(top_k, top_k_sums, row, vocab_size, False, TOP_K), _limit(top_p, top_p_sums, row, vocab_size, True, TOP_P)
        )
        kept = (_keys(scores) <= limit) & (scores >= tl.load(floors + row))
        scores = tl.where(kept, scores, float("-inf"))
        if tl.max(scores, 0) > float("-inf"):
            groups = first // 4 + tl.arange(0, SIZE // 4)
            scores += _gumbel(tl.load(seeds + row), tl.load(positions + row), groups)
    best = tl.max(scores, 0)
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(drawn_values + at, best)
    tl.store(drawn_ids + at, tl.min(tl.where(scores == best, entries, vocab_size), 0))


def greedy(logits: Tensor) -> Tensor:
    """int64 [rows]: the best entry of each row of `logits` [rows, vocab_size]; of equals the lowest."""
    values, ids = _best_of_parts(logits)
    return _pick_of_parts(values, ids, logits.shape[1])


def sample(logits: Tensor, draws: Draws) -> Tensor:
    """int64 [rows]: a token for each row of `logits` [rows, vocab_size], which stay as they are. Waits for nothing."""
    rows, vocab_size = logits.shape
    draws.check(rows)
    values, ids = _best_of_parts(logits)
    if rows == 0:
        return _pick_of_parts(values, ids, vocab_size)
    none = ids  # stands for sums that no search made
    top_k_sums = _search(logits, values, draws, draws.top_k, none, mass=False) if draws.any_top_k else none
    top_p_sums = _search(logits, values, draws, draws.top_p, top_k_sums, mass=True) if draws.any_top_p else none
    drawn_values, drawn_ids = torch.empty_like(values), torch.empty_like(ids)
    _draw[values.shape](
        drawn_values,
        drawn_ids,
        logits,
        values,
        draws.temperatures,
        draws.top_k,
        top_k_sums,
        draws.top_p,
        top_p_sums,
        draws.floors,
        draws.seeds,
        draws.positions,
        values.shape[1],
        vocab_size,
        logits.stride(0),
        TOP_K=draws.any_top_k,
        TOP_P=draws.any_top_p,
        PARTS=triton.next_power_of_2(values.shape[1]),
        SIZE=VOCABULARY.size,
        num_warps=VOCABULARY.warps,
    )
    return _pick_of_parts(drawn_values, drawn_ids, vocab_size)


def _best_of_parts(logits: Tensor) -> tuple[Tensor, Tensor]:
    """float32 and int32 [rows, parts]: the best logit of each part of a row, and its id."""
    (rows, vocab_size), device = logits.shape, logits.device
    assert logits.dtype in FLOATS and logits.stride(1) == 1, f"{logits.dtype}, strides {logits.stride()}"
    parts = triton.cdiv(vocab_size, VOCABULARY.size)
    values = torch.empty((rows, parts), dtype=torch.float32, device=device)
    ids = torch.empty((rows, parts), dtype=torch.int32, device=device)
    if rows:
        _best[(rows, parts)](values, ids, logits, vocab_size, logits.stride(0), SIZE=VOCABULARY.size, num_warps=VOCABULARY.warps)
    return values, ids


def _pick_of_parts(values: Tensor, ids: Tensor, vocab_size: int) -> Tensor:
    rows, parts = values.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=values.device)
    if rows:
        _pick[(rows,)](tokens, values, ids, parts, vocab_size, PARTS=triton.next_power_of_2(parts), num_warps=1)
    return tokens


def _search(logits: Tensor, values: Tensor, draws: Draws, wanted: Tensor, top_k_sums: Tensor, *, mass: bool) -> Tensor:
    """int64 [rows, digits, bins]: the sums by which `_limit` finds each row's threshold."""
    (rows, vocab_size), parts = logits.shape, values.shape[1]
    sums = torch.zeros((rows, _DIGITS.value, _BINS.value), dtype=torch.int64, device=logits.device)
    for number in range(_DIGITS.value):
        _count[(rows, parts)](
            sums,
            logits,
            values,
            draws.temperatures,
            wanted,
            draws.top_k,
            top_k_sums,
            parts,
            vocab_size,
            logits.stride(0),
            number,
            MASS=mass,
            WITHIN_TOP_K=mass and draws.any_top_k,
            PARTS=triton.next_power_of_2(parts),
            SIZE=VOCABULARY.size,
            CHUNK=COUNT.size,
            num_warps=COUNT.warps,
        )
    return sums
