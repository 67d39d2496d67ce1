"""`Grant`: what one node tells another of the blocks that it may write. A wire type, and nothing else."""

from typing import Annotated

import msgspec
from msgspec import Meta

from disaggd.ids import AgentId, GrantToken, NodeName
from disaggd.wire import Count, WireBlock


class Grant(msgspec.Struct, frozen=True, array_like=True):
    """Blocks of one node that another may write, until the lease runs out."""

    token: GrantToken
    target: NodeName
    writer: NodeName
    agent_id: AgentId
    """The target's agent for this pair: a push to any other is refused."""
    first_token_index: Count
    """Tokens before this one are cached at the target and left out."""
    block_ids: tuple[WireBlock, ...]
    lease_s: Annotated[float, Meta(gt=0, le=1e9)]
    verify: bool = False
    """The target wants a checksum of every block."""
