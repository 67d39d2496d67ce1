"""`Endpoint`: what a node that writes must know of one rank of the node that it writes to."""

from typing import Annotated

import msgspec
from msgspec import Meta

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
    port: Annotated[int, Meta(ge=1, lt=2**16)]
    """At which the agent listens; `metadata` says so too, to NIXL alone."""
