"""`Endpoint`: what a node that writes must know of one rank of the node that it writes to."""

import msgspec

from disaggd.ids import AgentId
from disaggd.transfer.layout import PoolPlace

MAX_RANKS = 64
"""Of one node: more than any has, and no work for those who are told of so many."""


class Endpoint(msgspec.Struct, frozen=True, array_like=True):
    """A rank's agent, and where the memory lies that grants name the blocks of."""

    agent_id: AgentId
    metadata: bytes
    """NIXL's own agent metadata."""
    place: PoolPlace
