"""One layer of a pool beyond 2³¹ elements, stored to and attended to at its far end. Wants a GPU with 6 GB free."""

import pytest
import torch

from disaggd.kernels.block_copy import gather_blocks, scatter_blocks
from disaggd.kernels.paged_attention import PagedAttention

HEADS, KV_HEADS, BLOCK_SIZE, HEAD_DIM = 32, 8, 64, 128
NUM_BLOCKS = 2**31 // (KV_HEADS * 2 * BLOCK_SIZE * HEAD_DIM) + 16
LAST = [NUM_BLOCKS - 1, NUM_BLOCKS - 9, NUM_BLOCKS - 4]


@pytest.fixture(scope="module")
def kv(where: torch.device) -> torch.Tensor:
    if where.type != "cuda":
        pytest.skip("4.3 GB of a GPU's memory")
    return torch.zeros(NUM_BLOCKS, KV_HEADS, 2, BLOCK_SIZE, HEAD_DIM, dtype=torch.bfloat16, device=where)


@pytest.mark.parametrize("num_new", [1, 70])
def test_attention_at_the_far_end(num_new: int, kv: torch.Tensor, where: torch.device, generator: torch.Generator) -> None:
    context = 150
    keys, values = torch.randn(2, context, KV_HEADS, HEAD_DIM, generator=generator, device=where).to(kv.dtype)
    queries = torch.randn(num_new, HEADS, HEAD_DIM, generator=generator, device=where).to(kv.dtype)
    table = torch.tensor([LAST], dtype=torch.int32, device=where)
    positions = torch.arange(context, device=where)
    slots = table[0, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
    starts, lens = (torch.tensor(entries, dtype=torch.int32, device=where) for entries in ([0, num_new], [context]))
    attention = PagedAttention(slots, starts, lens, table, kv_heads=KV_HEADS, block_size=BLOCK_SIZE, window=None, processors=132)
    attention.store(kv, keys, values)
    ours = attention.attend(kv, queries)

    every = [part.double().repeat_interleave(HEADS // KV_HEADS, 1) for part in (keys, values)]
    scores = torch.einsum("nhd,phd->hnp", queries.double(), every[0]) / HEAD_DIM**0.5
    own = torch.arange(context - num_new, context, device=where)[:, None]
    expected = torch.einsum("hnp,phd->nhd", scores.masked_fill(positions > own, -torch.inf).softmax(-1), every[1])
    torch.testing.assert_close(ours.double(), expected, atol=0.02, rtol=0.02)
    assert kv.flatten()[2**31 :].count_nonzero() > 0


def test_blocks_are_copied_from_and_to_the_far_end(kv: torch.Tensor, where: torch.device, generator: torch.Generator) -> None:
    ids = torch.tensor(LAST, dtype=torch.int32, device=where)
    wanted = torch.randn(1, len(LAST), KV_HEADS, 2, BLOCK_SIZE, HEAD_DIM, generator=generator, device=where).to(kv.dtype)
    scatter_blocks(kv[None], wanted, ids, layers=range(1), heads=range(KV_HEADS))
    assert torch.equal(kv[LAST], wanted[0])
    staging = torch.zeros_like(wanted)
    gather_blocks(staging, kv[None], ids, layers=range(1), heads=range(KV_HEADS))
    assert torch.equal(staging, wanted)
