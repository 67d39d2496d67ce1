"""The frames of a check: a pattern goes over a pair, by the very way that KV takes, and is compared where it has landed.

```
router ── CheckPair ──────► target      it grants blocks, if some are free
router ◄─── PatternGrant ── target
router ── PushPattern ────► writer      it fills blocks, if some are free, and pushes them into the grant
router ◄── PatternPushed ── writer
router ◄──── PatternRead ── target      the pattern was compared, or will not be
```

Each `CheckPair` is answered by one `PatternRead`, each `PushPattern` by one `PatternPushed`. The grant in between is one as any other, with
`Progress`, `Cancel` and `Quiesced` (`protocol.py`).
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from disaggd.cluster.grant import Grant
from disaggd.cluster.hello import Frame
from disaggd.ids import AgentId, NodeName
from disaggd.transfer.layout import KVPath
from disaggd.wire import Cost, Count, SmallCount

NumTokens = Annotated[int, Meta(ge=1, lt=2**31)]


class CheckPair(Frame, frozen=True):
    """Router → target: have `peer` write a pattern of so many tokens at your agent for it; answered `PatternGrant`, then `PatternRead`."""

    check: Count
    """Counted by the router; all frames of a check name it."""
    peer: NodeName
    agent_id: AgentId
    num_tokens: NumTokens
    salt: Count
    """Of the pattern: fresh for each, or what an earlier one left would look right."""


class PatternGrant(Frame, frozen=True):
    """Target → router → writer (as `PushPattern`): blocks for the pattern."""

    check: Count
    grant: Grant


class PushPattern(Frame, frozen=True):
    """Router → writer: fill blocks of yours with the pattern and push them into `grant`."""

    check: Count
    grant: Grant
    num_tokens: NumTokens
    salt: Count


class RankPush(msgspec.Struct, frozen=True, array_like=True):
    """What one rank of the writer has written into one rank of the target."""

    writer_rank: SmallCount
    target_rank: SmallCount
    first_head: SmallCount
    """Of the whole cache's KV heads it wrote those from this one on."""
    num_heads: SmallCount
    path: KVPath
    kv_bytes: Count
    seconds: Cost
    """From its first post to the end of its last write, on the writer's clock."""


class RankRead(msgspec.Struct, frozen=True, array_like=True):
    """What one rank of the target has found."""

    rank: SmallCount
    wrong_heads: tuple[SmallCount, ...]
    """KV heads in which it is not the pattern; of the whole cache's."""
    what: str
    """Of these, how much differs and where the first of it; else empty."""


CheckStep = Literal["done", "no_room", "failed"]


class PatternPushed(Frame, frozen=True):
    """Writer → router, once per `PushPattern`: nothing of it is in flight any more. `no_room`: no blocks were free to be filled."""

    check: Count
    step: CheckStep
    reason: str
    """Why it is not done; else empty."""
    transport: str
    """What carried it: UCX's transports, and the network devices that they may use."""
    pushes: tuple[RankPush, ...]


class PatternRead(Frame, frozen=True):
    """Target → router, once per `CheckPair`: nothing is awaited of the writer any more. `no_room`: no blocks were free to be granted."""

    check: Count
    step: CheckStep
    """`done`: compared, whatever was found."""
    reason: str
    reads: tuple[RankRead, ...]
