"""Decode and prefill attention, and the object that joins them, against the formula in float64."""

import math
from itertools import accumulate

import pytest
import torch

from disaggd.kernels import configurations
from disaggd.kernels.decode_attention import decode_attention, num_splits
from disaggd.kernels.paged_attention import PagedAttention
from disaggd.kernels.prefill_attention import prefill_attention

NUM_BLOCKS = 24


class Case:
    """Sequences of `(context length, new tokens)` over a pool of random content, NaN in every slot that none of them holds."""

    def __init__(self, sequences, generator, *, heads=4, kv_heads=2, head_dim=64, block_size=16, window=None, dtype=torch.float32):
        device = generator.device
        self.sequences, self.window = sequences, window
        random = {"generator": generator, "device": device}
        kv = torch.randn(NUM_BLOCKS, kv_heads, 2, block_size, head_dim, **random)
        free = torch.randperm(NUM_BLOCKS, **random).tolist()
        self.tables = [[free.pop() for _ in range(-(-context_len // block_size))] for context_len, _ in sequences]
        held = torch.zeros(NUM_BLOCKS, block_size, dtype=torch.bool, device=device)
        for table, (context_len, _) in zip(self.tables, sequences, strict=True):
            for index, block in enumerate(table):
                held[block, : context_len - index * block_size] = True
        self.kv = kv.masked_fill_(~held[:, None, None, :, None], math.nan).to(dtype)
        self.starts = [0, *accumulate(count for _, count in sequences)]
        # A view of a wider projection: queries have a token stride of their own.
        self.queries = torch.randn(self.starts[-1], heads + 1, head_dim, **random).to(dtype)[:, :heads]
        width = max(1, *(len(table) for table in self.tables))
        int32 = {"dtype": torch.int32, "device": device}
        self.batch = (
            torch.tensor(self.starts, **int32),
            torch.tensor([context_len for context_len, _ in sequences], **int32),
            torch.tensor([table + [0] * (width - len(table)) for table in self.tables], **int32),
        )

    def expected(self, touched):
        """float64 attention of the sequences whose number of new tokens is `touched`; 7 in all other rows."""
        out = torch.full(self.queries.shape, 7.0, dtype=torch.float64, device=self.kv.device)
        for index, (context_len, count) in enumerate(self.sequences):
            if touched(count):
                rows = slice(self.starts[index], self.starts[index + 1])
                out[rows] = naive(self.kv, self.tables[index], context_len, self.queries[rows], self.window)
        return out

    def check(self, attend, touched, tolerance=2e-6):
        out = torch.full_like(self.queries, 7.0, memory_format=torch.contiguous_format)
        attend(out, self.queries, self.kv, *self.batch, window=self.window)
        torch.testing.assert_close(out.double(), self.expected(touched), atol=tolerance, rtol=tolerance)


def naive(kv, blocks, context_len, queries, window):
    num_new, heads, head_dim = queries.shape
    kv_heads = kv.shape[1]
    cached = kv[blocks].double().permute(1, 2, 0, 3, 4).reshape(kv_heads, 2, -1, head_dim)[:, :, :context_len]
    keys, values = cached.repeat_interleave(heads // kv_heads, 0).unbind(1)
    own = torch.arange(context_len - num_new, context_len, device=kv.device)[:, None]
    at = torch.arange(context_len, device=kv.device)
    hidden = (at > own) | (at <= own - (window or context_len + 1))
    scores = torch.einsum("nhd,hpd->hnp", queries.double(), keys) / math.sqrt(head_dim)
    return torch.einsum("hnp,hpd->nhd", scores.masked_fill(hidden, -math.inf).softmax(-1), values)


def decode(*args, window, processors=1):
    decode_attention(*args, window=window, processors=processors)


def one(count):
    return count == 1


def several(count):
    return count > 1


# ── decode ──

RAGGED = [(1, 1), (37, 1), (16, 1), (100, 1)]  # one token, part of a block, a full block, several tiles


@pytest.mark.parametrize("window", [None, 1, 20, 64, 1000])
def test_decode_equals_the_formula(window, generator):
    Case(RAGGED, generator, window=window).check(decode, one)


@pytest.mark.parametrize("window", [None, 45])
def test_decode_in_parts_equals_the_formula(window, generator, monkeypatch):
    monkeypatch.setattr("disaggd.kernels.decode_attention.MIN_SPLIT_KEYS", 32)
    monkeypatch.setattr("disaggd.kernels.decode_attention.COMBINE_SPLITS", 2)  # parts are combined in several rounds
    case = Case(RAGGED, generator, window=window)
    case.check(lambda *args, window: decode(*args, window=window, processors=40), one)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (6, 2), (5, 1), (8, 1), (17, 1)])
def test_decode_packs_any_number_of_heads(heads, kv_heads, generator):
    Case([(21, 1)], generator, heads=heads, kv_heads=kv_heads).check(decode, one)


@pytest.mark.parametrize("head_dim", [16, 80, 96, 128, 256])
@pytest.mark.parametrize("attend, new, touched", [(decode, 1, one), (prefill_attention, 3, several)], ids=["decode", "prefill"])
def test_head_dims(head_dim, attend, new, touched, generator):
    Case([(37, new)], generator, heads=2, kv_heads=1, head_dim=head_dim, block_size=8).check(attend, touched)


@pytest.mark.parametrize("block_size", [1, 8, 48, 64, 128])
@pytest.mark.parametrize("attend, new, touched", [(decode, 1, one), (prefill_attention, 3, several)], ids=["decode", "prefill"])
def test_block_sizes(block_size, attend, new, touched, generator):
    Case([(20, new)], generator, heads=2, kv_heads=1, block_size=block_size).check(attend, touched)


def test_decode_leaves_other_sequences_alone(generator):
    Case([(20, 3), (21, 1), (9, 0), (30, 30), (5, 1)], generator).check(decode, one)


@pytest.mark.parametrize("processors", [1, 40])
def test_an_empty_context_gives_zeros(processors, generator, monkeypatch):
    monkeypatch.setattr("disaggd.kernels.decode_attention.MIN_SPLIT_KEYS", 16)
    case = Case([(33, 1), (0, 1)], generator)  # the second is how a captured batch is padded
    out = torch.full_like(case.queries, 7.0, memory_format=torch.contiguous_format)
    decode(out, case.queries, case.kv, *case.batch, window=None, processors=processors)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    torch.testing.assert_close(out[0].double(), case.expected(one)[0], atol=2e-6, rtol=2e-6)


def test_splits_fill_the_device_and_no_more():
    slots = 264
    assert num_splits(programs=8, max_context=100, slots=slots) == 1  # too short to split
    assert num_splits(programs=8, max_context=1024, slots=slots) == 7  # the context would allow 8, and 85 % of that will do
    assert num_splits(programs=8, max_context=131072, slots=slots) == 29  # 232 of 264 busy
    assert num_splits(programs=264, max_context=131072, slots=slots) == 1
    assert num_splits(programs=300, max_context=131072, slots=slots) == 3  # one part would leave the second round half empty
    assert num_splits(programs=8000, max_context=131072, slots=slots) == 1
    assert num_splits(programs=1, max_context=10**6, slots=slots) == 55  # 64 at most, and 85 % of that will do


# ── prefill ──


@pytest.mark.parametrize("window", [None, 1, 20, 1000])
@pytest.mark.parametrize(
    "sequences",
    [
        [(2, 2)],
        [(40, 40), (35, 3)],  # whole; behind a prefix
        [(30, 1), (21, 6), (9, 0), (12, 12), (2, 1), (100, 37)],
    ],
)
def test_prefill_equals_the_formula(sequences, window, generator):
    Case(sequences, generator, window=window).check(prefill_attention, several)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (6, 2), (5, 1), (7, 1), (8, 1)])
def test_prefill_packs_any_number_of_heads(heads, kv_heads, generator):
    Case([(50, 20)], generator, heads=heads, kv_heads=kv_heads).check(prefill_attention, several)


def test_many_tiles_find_their_sequences(generator, monkeypatch):
    small = {key: configurations.PrefillTile(rows=16, keys=16, warps=4, stages=2) for key in configurations.PREFILL}
    monkeypatch.setattr("disaggd.kernels.prefill_attention.PREFILL", small)
    Case([(3, 2), (17, 17), (8, 0), (1, 1), (25, 9), (16, 16), (20, 1)], generator, heads=2).check(prefill_attention, several)


# ── both ──


@pytest.mark.parametrize("sequences", [[(33, 1), (5, 1)], [(33, 1), (21, 6)], [(7, 7)]])
def test_a_batch_is_attended_to_whole(sequences, generator):
    case = Case(sequences, generator)
    slots = torch.zeros(case.starts[-1], dtype=torch.int64, device=case.kv.device)
    attention = PagedAttention(slots, *case.batch, kv_heads=2, block_size=16, window=None, processors=132)
    out = attention.attend(case.kv, case.queries)
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), case.expected(lambda count: count > 0), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("attend, new, touched", [(decode, 1, one), (prefill_attention, 3, several)], ids=["decode", "prefill"])
def test_dtypes(attend, new, touched, dtype, generator):
    eps = torch.finfo(dtype).eps
    Case([(37, new)], generator, dtype=dtype).check(attend, touched, tolerance=4 * eps if dtype != torch.float32 else 2e-6)


@pytest.mark.parametrize("attend", [decode, prefill_attention])
def test_no_sequences(attend, generator):
    case = Case([(1, 1)], generator)
    starts, lens, tables = case.batch
    attend(case.queries[:0], case.queries[:0], case.kv, starts[:1], lens[:0], tables[:0], window=None)
