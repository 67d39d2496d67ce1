"""Every number of ranks to every other, in every head shape and block size that is promised: the bytes are a single rank's.

All ranks of both nodes are in this process, and push as they do in a cluster: the transfer threads' own `Outgoing`, the kernels that
repack, and descriptors by which memory is copied. `test_any_to_any.py` has what lies between these, and `test_joint.py` real NIXL.
"""

from functools import cache
from math import gcd

import numpy as np
import pytest
import torch

from disaggd.engine.kv_repack import make_repacker
from disaggd.ids import AgentId, BlockId, GrantToken, Incarnation, NodeName
from disaggd.roles.portions import portions, span
from disaggd.transfer import messages as m
from disaggd.transfer.endpoint import Endpoint
from disaggd.transfer.layout import KVGroup, KVSpec, PoolPlace, head_bytes
from disaggd.transfer.notification import FirstToken
from disaggd.transfer.outgoing import Outgoing
from disaggd.transfer.path import Paths, RepackSettings
from disaggd.transfer.share import Share, block_bytes
from disaggd.transfer.source import InPlace
from tests.support.copying_agent import CopyingAgent
from tests.support.endpoints import PORT

LAYERS, HEAD_DIM = 3, 8
LAYER_GROUPS = (range(0, 2), range(2, 3))
GRANTED = range(128, 128 + 333)
"""Tokens of the prompt: the target has those before them, and the last ones fill no block of any size."""
CHUNKS = (range(128, 128 + 256), range(128 + 256, 128 + 333))
"""In which they are computed: the first ends where a block of each size does."""
MAX_TOKENS = 100
"""In a write: no multiple of a block."""
UNTOUCHED = 0xA5
TOKEN, D = GrantToken(bytes(16)), NodeName("d")

TP = (1, 2, 3, 4)
KV_HEADS = (pytest.param(4, id="heads12-4"), pytest.param(8, id="heads16-8"), pytest.param(2, id="heads8-2"))
BLOCK_SIZES = [(source, target) for source in (16, 64) for target in (16, 64, 128)]
ALIKE = [sizes for sizes in BLOCK_SIZES if sizes[0] == sizes[1]]
ALWAYS = 2**30


def kv_of(kv_heads: int, block_size: int) -> KVSpec:
    group = KVGroup(layers=LAYERS, kv_heads=kv_heads, head_bytes=head_bytes("bfloat16", block_size, HEAD_DIM))
    return KVSpec(dtype="bfloat16", block_size=block_size, head_dim=HEAD_DIM, groups=(group,))


def table_of(kv: KVSpec, stride: int) -> list[BlockId]:
    """Blocks of the whole prompt, hardly any two of them neighbours, and the first and the last of the pool not among them."""
    count = kv.blocks_for(GRANTED.stop)
    assert gcd(stride, count) == 1
    return [BlockId(1 + stride * index % count) for index in range(count)]


@cache
def cache_of(kv: KVSpec, stride: int) -> np.ndarray:
    """What a node of one rank holds of the prompt: uint8 [layers, blocks, heads, bytes of a head].

    Token by token, by the definition of the layout. Behind the last token is zero, and blocks beside the table are untouched.
    """
    [group] = kv.groups
    shape = (LAYERS, group.kv_heads, 2, GRANTED.stop, HEAD_DIM)
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    table = table_of(kv, stride)
    held = torch.full((LAYERS, len(table) + 2, group.kv_heads, group.head_bytes), UNTOUCHED, dtype=torch.uint8)
    held[:, torch.tensor(table)] = 0
    tokens = held.view(torch.bfloat16).view(*held.shape[:3], 2, kv.block_size, HEAD_DIM)
    for token in range(GRANTED.stop):
        tokens[:, table[token // kv.block_size], :, :, token % kv.block_size] = whole[:, :, :, token]
    return held.numpy()


class Writer:
    """One rank of the prefill node, with its heads of the cache."""

    def __init__(self, share: Share, whole: np.ndarray, direct_slice_bytes: int) -> None:
        self.held = torch.from_numpy(np.ascontiguousarray(share_of(whole, share)))
        self.agent = CopyingAgent()
        self.events: list[m.TransferEvent] = []
        settings = RepackSettings(staging_bytes=1 << 22, direct_slice_bytes=direct_slice_bytes, max_layers=2, max_tokens=MAX_TOKENS)
        pool = self.held.view(torch.bfloat16).view(*self.held.shape[:3], 2, share.kv.block_size, HEAD_DIM)
        repacking = settings.made(share.held, lambda num_bytes: make_repacker(pool, num_bytes))
        sources = Paths(InPlace(share, PoolPlace(pool.data_ptr(), pool.shape[1])), repacking)
        self.outgoing = Outgoing(sources, lambda: self.agent, self.events.append, lambda: 0.0)  # type: ignore[arg-type, return-value]

    def push(self, writes: list[m.PushBlocks], connect: m.ConnectPair) -> m.PushEnded:
        self.outgoing.connect(connect)
        assert self.events == [m.PairConnected(D, connect.agent_id)]
        self.outgoing.begin(m.BeginPush(TOKEN, D, connect.agent_id, lease_s=5.0))
        for write in writes:
            self.outgoing.push_blocks(write)
        self.outgoing.finish(m.FinishPush(TOKEN, FirstToken(7)))
        while not any(isinstance(event, m.PushEnded) for event in self.events):
            self.outgoing.poll()
        ended = self.events[-1]
        assert isinstance(ended, m.PushEnded) and ended.clean and ended.finished
        return ended


def writes_of(source: list[BlockId], source_size: int, target: list[BlockId], target_size: int) -> list[m.PushBlocks]:
    """As a role has them pushed: chunk by chunk, group by group."""
    return [
        m.PushBlocks(
            TOKEN,
            layers,
            span(source, source_size, tokens),
            tuple(target[tokens.start // target_size : -(-tokens.stop // target_size)]),
        )
        for chunk in CHUNKS
        for layers in LAYER_GROUPS
        for tokens in portions(chunk, target_size, MAX_TOKENS)
    ]


@pytest.mark.parametrize("num_sources", TP)
@pytest.mark.parametrize("num_targets", TP)
@pytest.mark.parametrize("kv_heads", KV_HEADS)
@pytest.mark.parametrize(
    ("sizes", "direct_slice_bytes"), [*((sizes, 0) for sizes in BLOCK_SIZES), *((sizes, ALWAYS) for sizes in ALIKE)], ids=str
)
def test_what_lands_is_a_single_ranks_cache(
    num_sources: int, num_targets: int, kv_heads: int, sizes: tuple[int, int], direct_slice_bytes: int
) -> None:
    ours, theirs = (kv_of(kv_heads, size) for size in sizes)
    source, target = table_of(ours, 3), table_of(theirs, 5)
    first_block = GRANTED.start // theirs.block_size
    reference = cache_of(theirs, 5).copy()
    reference[:, target[:first_block]] = UNTOUCHED

    pools = [np.full_like(share_of(reference, share), UNTOUCHED) for share in shares(theirs, num_targets)]
    agents = [AgentId(f"d{rank}") for rank in range(num_targets)]
    places = [PoolPlace(pool.ctypes.data, pool.shape[1]) for pool in pools]
    endpoints = tuple(Endpoint(agent, b"", place, PORT) for agent, place in zip(agents, places, strict=True))
    writes = writes_of(source, ours.block_size, target, theirs.block_size)
    writers = [Writer(share, cache_of(ours, 3), direct_slice_bytes) for share in shares(ours, num_sources)]
    ends = [writer.push(writes, m.ConnectPair(D, Incarnation("one"), endpoints, theirs)) for writer in writers]

    num_granted = len(target) - first_block
    for share, agent, pool in zip(shares(theirs, num_targets), agents, pools, strict=True):
        assert np.array_equal(pool, share_of(reference, share))
        assert sum(writer.agent.kv_bytes[agent] for writer in writers) == num_granted * share.held.bytes_per_block
    assert sum(end.kv_bytes for end in ends) == num_granted * block_bytes(theirs, num_targets), "as costs are predicted by"
    if direct_slice_bytes == 0:
        way = "direct" if ours == theirs else "repacked"
        assert {sent.leg.path for end in ends for sent in end.sent} == {way}


def shares(kv: KVSpec, num_ranks: int) -> list[Share]:
    return [Share(kv, rank, num_ranks) for rank in range(num_ranks)]


def share_of(held: np.ndarray, share: Share) -> np.ndarray:
    return held[:, :, share.heads.start : share.heads.stop]
