"""Endpoints, spans and geometries as tests of transfers need them: of nodes of one rank, and of pools whose blocks are just bytes."""

from disaggd.ids import AgentId, BlockId
from disaggd.transfer.endpoint import Endpoint
from disaggd.transfer.layout import KVGroup, KVSpec, PoolPlace, Span, whole_blocks

SOMEWHERE = PoolPlace(0, 64)
PORT = 18500

BLOCK = 4
"""Tokens: those of the scripted roles (`role_nodes.py`)."""


def endpoint(agent_id: AgentId, metadata: bytes = b"", place: PoolPlace = SOMEWHERE) -> tuple[Endpoint, ...]:
    """Of a node's only rank."""
    return (Endpoint(agent_id, metadata, place, PORT),)


def span(blocks: tuple[BlockId, ...], block_size: int = BLOCK) -> Span:
    return whole_blocks(blocks, block_size)


def plain_kv(layers: int, block_bytes: int, kv_heads: int = 1) -> KVSpec:
    """Blocks of so many bytes, whatever these mean."""
    group = KVGroup(layers=layers, kv_heads=kv_heads, head_bytes=block_bytes // kv_heads)
    return KVSpec(dtype="float32", block_size=BLOCK, head_dim=1, groups=(group,))
