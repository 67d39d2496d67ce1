"""Blocks of a pool in another node's layout, and out of the wire format: byte for byte what `reshape.slices` says."""

import ctypes
from typing import NamedTuple

import numpy as np
import pytest
import torch

from disaggd.engine.kv_repack import KVRepacker, KVUnpacker
from disaggd.engine.stream import DeviceStream
from disaggd.ids import BlockId
from disaggd.kernels import REFERENCE, Ops, cpu_ops, fp8, select
from disaggd.transfer.layout import KVGroup, KVSpec, Span, in_fp8
from disaggd.transfer.messages import IsReady
from disaggd.transfer.reshape import HeadCut, Shard, slices

LAYERS, HEADS, DIM = 3, 5, 6
CUT = range(1, 4)
BLOCKS = tuple(BlockId(block) for block in (6, 0, 3, 5))


def spec(block_size: int, kv_heads: int = HEADS) -> KVSpec:
    group = KVGroup(layers=LAYERS, kv_heads=kv_heads, head_bytes=2 * block_size * DIM * 2)
    return KVSpec(dtype="bfloat16", block_size=block_size, head_dim=DIM, groups=(group,))


class Side(NamedTuple):
    """Where the pool lies, and what it is repacked by. A GPU writes the host's memory by itself, and in its own time."""

    ops: Ops
    where: torch.device


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=["reference", "selected", pytest.param("cuda:0", marks=NEEDS_GPU)])
def side(request: pytest.FixtureRequest) -> Side:
    if request.param == "cuda:0":
        where = torch.device(request.param)
        DeviceStream(where).enter()
        return Side(select(where), where)
    return Side(REFERENCE if request.param == "reference" else cpu_ops(), torch.device("cpu"))


def pool(block_size: int) -> torch.Tensor:
    return torch.randn(LAYERS, 8, HEADS, 2, block_size, DIM, generator=torch.Generator().manual_seed(1)).bfloat16()


def wait(is_done: IsReady) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    assert is_done()


def in_memory(repacker: KVRepacker, offset: int, num_bytes: int) -> np.ndarray:
    region = repacker.region
    return np.ctypeslib.as_array((ctypes.c_uint8 * region.num_bytes).from_address(region.address))[offset : offset + num_bytes]


@pytest.mark.parametrize(("target_size", "start"), [(2, 4), (4, 2), (5, 3), (12, 0)])
def test_a_span_lies_in_the_targets_blocks_as_the_slices_say(side: Side, target_size: int, start: int) -> None:
    kv, target, span = pool(6), spec(target_size), Span(BLOCKS, start, 20)
    repacker = KVRepacker(kv.to(side.where), side.ops, 1 << 16)
    num_blocks, block_bytes = target.blocks_for(span.num_tokens), len(CUT) * target.groups[0].head_bytes
    offset = 2 * block_bytes
    wait(repacker.repack(offset, target, range(1, 3), CUT, span))
    made = in_memory(repacker, offset, 2 * num_blocks * block_bytes).reshape(2, num_blocks, block_bytes)

    # The slices count tokens of both sides from the same one: the span's first token begins a target block, as a grant's does.
    whole = Shard(heads=range(HEADS), block_size=6, head_dim=DIM, itemsize=2)
    part = Shard(heads=CUT, block_size=target_size, head_dim=DIM, itemsize=2)
    first = next(token for token in range(start, 1000, 6) if token % target_size == 0)
    plan = slices(HeadCut(0, 0, CUT), whole, part, first, first + span.num_tokens)
    expected = np.zeros_like(made)
    blocks = kv.view(torch.uint8).view(LAYERS, 8, -1).numpy()
    for source, at, into, to, length in zip(*(getattr(plan, name) for name in plan.__struct_fields__), strict=True):
        one = BLOCKS[source - first // 6]
        expected[:, into - first // target_size, to : to + length] = blocks[1:3, one, at : at + length]
    assert np.array_equal(made, expected)


def test_a_span_in_fp8_is_the_codecs(side: Side) -> None:
    kv, target = pool(6), in_fp8(spec(6))
    repacker = KVRepacker(kv.to(side.where), side.ops, 1 << 16)
    wait(repacker.repack(0, target, range(2), CUT, Span(BLOCKS, 0, 24)))
    expected = fp8.quantize(kv[:2, list(BLOCKS), CUT.start : CUT.stop])
    assert np.array_equal(in_memory(repacker, 0, expected.numel()).reshape(expected.shape), expected.numpy())


def test_what_lands_in_fp8_comes_into_its_blocks_of_the_pool_and_into_no_others(side: Side) -> None:
    kv = torch.full((LAYERS, 8, HEADS, 2, 6, DIM), 7.0, dtype=torch.bfloat16, device=side.where)
    unpacker = KVUnpacker(kv, spec(6), side.ops, 4)
    place, landing = unpacker.place, in_fp8(spec(6))
    assert unpacker.spec == landing and place.num_blocks == 4
    sent = torch.randn(LAYERS, 4, HEADS, 2, 6, DIM)
    memory = (ctypes.c_uint8 * (4 * landing.bytes_per_block)).from_address(place.address)
    wire = fp8.quantize(sent)
    ctypes.memmove(memory, wire.numpy().tobytes(), wire.numel())
    landed, blocks = [BlockId(3), BlockId(1)], [BlockId(0), BlockId(5)]
    wait(unpacker.copy_in(landed, blocks))
    assert torch.equal(kv[:, blocks].cpu(), fp8.dequantize(wire[:, landed], 6, DIM, torch.bfloat16))
    others = [block for block in range(8) if block not in blocks]
    assert (kv[:, others] == 7).all()
