"""What an engine node says of blocks that it holds because of other nodes, when it is asked. Wire types, and nothing else."""

from typing import Literal

import msgspec

from disaggd.ids import NodeName, SeqId
from disaggd.wire import Count, Real, WireBlock

HoldingState = Literal["granted", "held", "quarantined"]


class Holding(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """The blocks of one grant at its target, or of one push at its writer."""

    state: HoldingState
    """`granted`: the peer may write them. `held`: only writes to the peer read them. `quarantined`: the peer may still write them."""
    memory: Literal["pool", "staging"]
    """What the ids are of: on a GPU peers write staging memory."""
    blocks: tuple[WireBlock, ...]
    seq: SeqId
    attempt: Count
    peer: NodeName
    age_s: Real
    """Since it came into this state; `held`: since the push began."""
    reason: str
    """Why it is in this state; empty where that is the usual course."""
