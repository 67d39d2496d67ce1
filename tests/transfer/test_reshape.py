"""Any cut of a cache into any other: checked byte by byte against one cache that no rank shares."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggd.transfer.layout import KVGroup, KVSpec
from disaggd.transfer.reshape import HeadCut, Shard, head_cuts, heads_of, shard_of, slices

HEAD_DIM = 2


def spec(kv_heads: int, block_size: int) -> KVSpec:
    group = KVGroup(layers=1, kv_heads=kv_heads, head_bytes=2 * block_size * HEAD_DIM * 2)
    return KVSpec(dtype="bfloat16", block_size=block_size, head_dim=HEAD_DIM, groups=(group,))


def cache(kv_heads: int, num_tokens: int) -> np.ndarray:
    """[kv_heads, 2, tokens, head_dim], no value like another."""
    return np.arange(1, kv_heads * 2 * num_tokens * HEAD_DIM + 1, dtype=np.uint16).reshape(kv_heads, 2, num_tokens, HEAD_DIM)


def held(whole: np.ndarray, shard: Shard, num_blocks: int) -> np.ndarray:
    """The blocks of one rank, as bytes [num_blocks, block_bytes]: zero where there are no tokens."""
    tokens = np.zeros((len(shard.heads), 2, num_blocks * shard.block_size, HEAD_DIM), dtype=np.uint16)
    tokens[:, :, : whole.shape[2]] = whole[shard.heads.start : shard.heads.stop]
    blocks = tokens.reshape(len(shard.heads), 2, num_blocks, shard.block_size, HEAD_DIM).transpose(2, 0, 1, 3, 4)
    return np.ascontiguousarray(blocks).view(np.uint8).reshape(num_blocks, shard.block_bytes)


tp = st.integers(1, 9)
block_sizes = st.sampled_from([1, 2, 3, 4, 8])


@given(kv_heads=st.integers(1, 12), num_ranks=tp)
def test_ranks_share_the_heads_evenly_and_leave_none_out(kv_heads: int, num_ranks: int) -> None:
    ranges = [heads_of(rank, num_ranks, kv_heads) for rank in range(num_ranks)]
    assert {head for one in ranges for head in range(one.start, one.stop)} == set(range(kv_heads))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1
    if num_ranks <= kv_heads:
        assert sum(map(len, ranges)) == kv_heads


@given(kv_heads=st.integers(1, 12), sources=tp, targets=tp)
def test_every_head_of_every_target_comes_once_from_a_rank_that_has_it(kv_heads: int, sources: int, targets: int) -> None:
    cuts = head_cuts(kv_heads, sources, targets)
    assert len({(cut.source_rank, cut.target_rank) for cut in cuts}) == len(cuts)
    for target in range(targets):
        wanted = heads_of(target, targets, kv_heads)
        got = [head for cut in cuts if cut.target_rank == target for head in range(cut.heads.start, cut.heads.stop)]
        assert got == list(range(wanted.start, wanted.stop))
    for cut in cuts:
        has = heads_of(cut.source_rank, sources, kv_heads)
        assert has.start <= cut.heads.start < cut.heads.stop <= has.stop


def test_targets_are_spread_over_the_replicas_of_a_head() -> None:
    cuts = head_cuts(kv_heads=2, num_sources=8, num_targets=4)
    assert [(cut.source_rank, cut.target_rank) for cut in cuts] == [(0, 0), (1, 1), (6, 2), (7, 3)]


@given(
    kv_heads=st.integers(1, 6),
    sources=tp,
    targets=tp,
    source_size=block_sizes,
    target_size=block_sizes,
    data=st.data(),
)
def test_a_cache_is_cut_anew_byte_for_byte(
    kv_heads: int, sources: int, targets: int, source_size: int, target_size: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, 2), "blocks that the target has") * target_size
    last = first + data.draw(st.integers(1, 20), "tokens")
    whole = cache(kv_heads, last)
    source_spec, target_spec = spec(kv_heads, source_size), spec(kv_heads, target_size)
    num_sources, num_targets = source_spec.blocks_for(last), target_spec.blocks_for(last)
    times_written = [np.zeros((num_targets, shard_of(target_spec, t, targets).block_bytes), dtype=int) for t in range(targets)]
    written = [np.zeros_like(one, dtype=np.uint8) for one in times_written]
    for cut in head_cuts(kv_heads, sources, targets):
        source, target = shard_of(source_spec, cut.source_rank, sources), shard_of(target_spec, cut.target_rank, targets)
        memory = held(whole, source, num_sources)
        plan = slices(cut, source, target, first, last)
        for block, offset, to, at, length in zip(
            plan.source_block, plan.source_offset, plan.target_block, plan.target_offset, plan.length, strict=True
        ):
            piece = memory[block, offset : offset + length]
            assert len(piece) == length, "no slice reaches beyond its block"
            written[cut.target_rank][to, at : at + length] = piece
            times_written[cut.target_rank][to, at : at + length] += 1
    for rank in range(targets):
        target = shard_of(target_spec, rank, targets)
        expected = held(whole, target, num_targets)
        is_granted = held(np.where(np.arange(last)[:, None] >= first, np.uint16(0xFFFF), 0) * np.ones_like(whole), target, num_targets) > 0
        if source_size == target_size:
            is_granted[first // target_size :] = True  # whole blocks, with what is behind the last token
        assert (times_written[rank] == is_granted).all()
        assert (written[rank] == np.where(is_granted, expected, 0)).all()


def test_blocks_of_one_size_take_a_slice_each() -> None:
    source, target = shard_of(spec(8, 16), 1, 2), shard_of(spec(8, 16), 3, 4)
    plan = slices(HeadCut(1, 3, range(6, 8)), source, target, 0, 40)
    assert plan.source_block.tolist() == plan.target_block.tolist() == [0, 1, 2]
    assert set(plan.source_offset.tolist()) == {2 * source.head_bytes} and set(plan.target_offset.tolist()) == {0}
    assert plan.num_bytes == 3 * 2 * source.head_bytes


def test_a_cast_is_not_cut_as_bytes() -> None:
    shard = shard_of(spec(1, 4), 0, 1)
    other = Shard(heads=shard.heads, block_size=4, head_dim=HEAD_DIM, itemsize=4)
    with pytest.raises(AssertionError, match="cast"):
        slices(HeadCut(0, 0, shard.heads), shard, other, 0, 4)
