"""Any cut of a cache into any other, by the descriptors that NIXL is given: each byte of the target is written once, none beside it."""

import ctypes
from collections.abc import Iterator

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disaggd.engine.kv_repack import KVRepacker
from disaggd.ids import BlockId
from disaggd.kernels import REFERENCE, Ops, cpu_ops, fp8
from disaggd.model.spec import DTYPE_BYTES
from disaggd.transfer.layout import KVDtype, KVGroup, KVSpec, PoolPlace, Span, in_fp8
from disaggd.transfer.path import Paths, Repacking
from disaggd.transfer.pool import Descriptors, Indices, Pool
from disaggd.transfer.reshape import heads_of
from disaggd.transfer.share import Share
from disaggd.transfer.source import InPlace

LAYERS, HEAD_DIM = 2, 2
UNTOUCHED = 0xAA


def geometry(kv_heads: int, block_size: int, dtype: KVDtype) -> KVSpec:
    head_bytes = 2 * block_size * HEAD_DIM * DTYPE_BYTES.get(dtype, 1)
    spec = KVSpec(
        dtype=dtype, block_size=block_size, head_dim=HEAD_DIM, groups=(KVGroup(layers=LAYERS, kv_heads=kv_heads, head_bytes=head_bytes),)
    )
    return in_fp8(spec) if dtype == "fp8" else spec


def in_blocks(tokens: torch.Tensor, spec: KVSpec) -> torch.Tensor:
    """[layers, heads, 2, tokens, head_dim] → uint8 [layers, blocks, bytes of a block], as a pool of `spec` has them, with zeros behind."""
    num_blocks = spec.blocks_for(tokens.shape[3])
    padded = torch.nn.functional.pad(tokens, (0, 0, 0, num_blocks * spec.block_size - tokens.shape[3]))
    blocks = padded.unflatten(3, (num_blocks, spec.block_size)).permute(0, 3, 1, 2, 4, 5).contiguous()
    held = fp8.quantize(blocks) if spec.dtype == "fp8" else blocks.to(getattr(torch, spec.dtype))
    return held.reshape(len(tokens), num_blocks, -1).view(torch.uint8)


def write(source: Descriptors, sources: Indices, target: Descriptors, targets: Indices, into: np.ndarray, times: np.ndarray) -> None:
    """What NIXL does: run by run. `into` is the memory of the target's region, `times` how often each of its bytes was written."""
    assert len(sources) == len(targets) and source.length == target.length
    assert 0 <= min(sources) <= max(sources) < source.count and 0 <= min(targets) <= max(targets) < target.count
    memory = (ctypes.c_uint8 * source.region.num_bytes).from_address(source.region.address)
    for one, other in zip(sources.tolist(), targets.tolist(), strict=True):
        start, to = source.offset + one * source.stride, target.offset + other * target.stride
        assert start + source.length <= source.region.num_bytes and to + target.length <= target.region.num_bytes
        into[to : to + target.length] = memory[start : start + source.length]
        times[to : to + target.length] += 1


def spans(first: int, last: int, source: KVSpec, target: KVSpec, blocks: list[BlockId], step: int) -> Iterator[tuple[Span, range]]:
    """Writes of `step` target blocks each: of the source, and which of the target's blocks from the `first` token's on."""
    for start in range(first, last, step * target.block_size):
        stop = min(last, start + step * target.block_size)
        held = tuple(blocks[start // source.block_size : source.blocks_for(stop)])
        yield (
            Span(held, start % source.block_size, stop - start),
            range((start - first) // target.block_size, target.blocks_for(stop - first)),
        )


ranks = st.integers(1, 5)
block_sizes = st.sampled_from([1, 2, 3, 4, 8])
floats = st.sampled_from(["float32", "bfloat16", "float16"])


@settings(deadline=None)
@given(
    kv_heads=st.integers(1, 6),
    num_sources=ranks,
    num_targets=ranks,
    sizes=st.tuples(block_sizes, block_sizes) | block_sizes.map(lambda size: (size, size)),
    dtypes=st.tuples(floats, floats | st.just("fp8")) | floats.map(lambda dtype: (dtype, dtype)),
    direct_slice_bytes=st.sampled_from([0, 64, 2**30]),
    ops=st.sampled_from([REFERENCE, cpu_ops()]),
    data=st.data(),
)
def test_every_byte_of_the_target_is_written_once_and_none_beside_it(
    kv_heads: int,
    num_sources: int,
    num_targets: int,
    sizes: tuple[int, int],
    dtypes: tuple[KVDtype, KVDtype],
    direct_slice_bytes: int,
    ops: Ops,
    data: st.DataObject,
) -> None:
    ours, theirs = (geometry(kv_heads, size, dtype) for size, dtype in zip(sizes, dtypes, strict=True))
    first = data.draw(st.integers(0, 3)) * theirs.block_size
    last = first + data.draw(st.integers(1, 20))
    step = data.draw(st.integers(1, 4))
    whole = torch.randn(LAYERS, kv_heads, 2, last, HEAD_DIM, generator=torch.Generator().manual_seed(last)).to(getattr(torch, ours.dtype))
    source_ids = data.draw(st.permutations(range(ours.blocks_for(last) + 2)))
    target_ids = data.draw(st.permutations(range(theirs.blocks_for(last - first) + 2)))
    granted = torch.tensor(target_ids[: theirs.blocks_for(last - first)])

    memories, counts, pools = [], [], []
    for rank in range(num_targets):
        held = Share(theirs, rank, num_targets).held
        memories.append(np.full(len(target_ids) * held.bytes_per_block, UNTOUCHED, dtype=np.uint8))
        counts.append(np.zeros_like(memories[-1]))
        pools.append(Pool(PoolPlace(memories[-1].ctypes.data, len(target_ids)), held))

    for rank in range(num_sources):
        share = Share(ours, rank, num_sources)
        kv = torch.zeros(LAYERS, len(source_ids), len(share.heads), 2, ours.block_size, HEAD_DIM, dtype=whole.dtype)
        blocks = in_blocks(whole[:, share.heads.start : share.heads.stop], share.held)
        kv.view(torch.uint8).view(LAYERS, len(source_ids), -1)[:, torch.tensor(source_ids[: blocks.shape[1]])] = blocks
        direct = InPlace(share, PoolPlace(kv.data_ptr(), len(source_ids)))
        repacker = KVRepacker(kv, ops, 1 << 16)
        repacking = Repacking(repacker=repacker, direct_slice_bytes=direct_slice_bytes, max_layers=LAYERS, max_tokens=32)
        paths = Paths(direct, repacking)
        for cut in share.cuts_to(num_targets):
            target = Share(theirs, cut.target_rank, num_targets)
            source = paths.of(cut, target)
            pool = pools[cut.target_rank]
            for layers in (range(0, 1), range(1, 2)):
                for span, written in spans(first, last, ours, theirs, [BlockId(block) for block in source_ids], step):
                    load = source.load(layers, span)
                    assert load is not None and load.is_ready()
                    indices = pool.indices(layers, [BlockId(target_ids[block]) for block in written])
                    slices = pool.slices(target.local(cut))
                    write(source.registered, load.indices, slices, indices, memories[cut.target_rank], counts[cut.target_rank])
                    source.unload(load)

    for rank in range(num_targets):
        heads = heads_of(rank, num_targets, kv_heads)
        held = Share(theirs, rank, num_targets).held
        shape = (LAYERS, len(target_ids), held.groups[0].block_bytes)
        expected, times = torch.full(shape, UNTOUCHED, dtype=torch.uint8), torch.zeros(shape, dtype=torch.uint8)
        expected[:, granted] = in_blocks(whole[:, heads.start : heads.stop, :, first:], held)
        times[:, granted] = 1
        assert torch.equal(torch.from_numpy(counts[rank]).view(shape), times)
        assert torch.equal(torch.from_numpy(memories[rank]).view(shape), expected)
