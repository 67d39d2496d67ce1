"""What the compute thread and the transfer thread say to each other: frozen commands one way, frozen events the other.

A node of several ranks has a transfer thread in each, and one that speaks for them all (`joint.py`): the agent of such a node is an
agent of each rank, and has the first one's id.

Each `Expect` is answered by one `Landed` or `LandingFailed`, unless `Forget` or a fence of its agent comes first; each
`PushBlocks` by one `HandleDone`; each `BeginPush` by one `PushEnded`, after the `HandleDone` of all its handles.
"""

from collections.abc import Callable

import msgspec

from disaggd.ids import AgentId, BlockId, GrantToken, Incarnation, NodeName
from disaggd.transfer.endpoint import Endpoint
from disaggd.transfer.layout import KVPath, KVSpec, Span
from disaggd.transfer.notification import FirstToken


class TransferCommand(msgspec.Struct, frozen=True):
    """Compute thread → transfer thread."""


class TransferEvent(msgspec.Struct, frozen=True):
    """Transfer thread → compute thread."""


# ── receiving ────────────────────────────────────────────────────────────────────────────────────────────────────────


class OpenPair(TransferCommand, frozen=True):
    """Have an agent for `peer` to write to; answered `PairOpened`, again if it is open already.

    A new incarnation fences the agent that served the old one: `Fenced`, then `PairOpened`.
    """

    peer: NodeName
    peer_incarnation: Incarnation
    num_ranks: int
    """Of the peer."""


class Expect(TransferCommand, frozen=True):
    """A grant goes out: so many blocks will land whole at the agent `agent_id`, each rank of the peer bringing its part.

    To be submitted before the grant leaves this node; then no notification can come too early.
    """

    token: GrantToken
    peer: NodeName
    agent_id: AgentId
    num_blocks: int
    brings_token: bool = True
    """The first token is one of its pieces; it fails without."""
    verify: tuple[BlockId, ...] = ()
    """The grant's blocks, if their checksums are to be compared when they are there; it fails if one differs, or is not sent."""


class Forget(TransferCommand, frozen=True):
    """The grant is over: its later notifications are counted and dropped."""

    token: GrantToken


class Fence(TransferCommand, frozen=True):
    """Destroy that agent, after which nothing the peer still sends can land: `Fenced`, then `PairOpened` of a new one.

    Only `Fenced` if that agent is gone already.
    """

    peer: NodeName
    agent_id: AgentId


class PairOpened(TransferEvent, frozen=True):
    """The agent that `peer` shall write to, and where the blocks lie that grants name: by rank."""

    peer: NodeName
    peer_incarnation: Incarnation
    endpoints: tuple[Endpoint, ...]

    @property
    def agent_id(self) -> AgentId:
        return self.endpoints[0].agent_id


class PairProbed(TransferEvent, frozen=True):
    """That very agent received its own id from every rank of the peer that has something for it: writes may begin."""

    peer: NodeName
    agent_id: AgentId


class Landed(TransferEvent, frozen=True):
    """The whole grant is in: notifications {0 … total−1} of every rank, and the bytes add up."""

    token: GrantToken
    first: FirstToken | None
    """None only where none was expected."""
    kv_bytes: int
    num_verified: int = 0
    """Blocks whose checksums were right, in all layers."""


class LandingFailed(TransferEvent, frozen=True):
    """The grant's notifications contradict each other, the grant, or what has landed. It is forgotten here; its blocks are not safe."""

    token: GrantToken
    reason: str
    num_corrupt: int = 0
    """Blocks whose checksums were wrong."""


class Fenced(TransferEvent, frozen=True):
    """That agent is destroyed: its grants' blocks may be used again."""

    peer: NodeName
    agent_id: AgentId


class QuiescedByWire(TransferEvent, frozen=True):
    """The peer says, without a router, that nothing more will be written for this grant."""

    token: GrantToken
    clean: bool
    peer: NodeName


# ── sending ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class ConnectPair(TransferCommand, frozen=True):
    """Reach the agent of `peer` and send it the probe; answered `PairConnected` or `PairFailed`.

    A pair that was connected to another agent is torn down first, which ends its pushes (not clean if handles were in
    flight). Writes may begin once the peer has confirmed the probe: the caller sees to that.
    """

    peer: NodeName
    peer_incarnation: Incarnation
    endpoints: tuple[Endpoint, ...]
    """By rank of the peer."""
    kv: KVSpec
    """The peer's geometry, over all its ranks."""

    @property
    def agent_id(self) -> AgentId:
        return self.endpoints[0].agent_id


class BeginPush(TransferCommand, frozen=True):
    """A push into a grant begins; nothing is posted later than `lease_s` after this or the last `RenewLease`."""

    token: GrantToken
    peer: NodeName
    agent_id: AgentId
    lease_s: float
    verify: bool = False
    """Send the checksums of what is written."""


IsReady = Callable[[], bool]
"""Whether what was to be computed is; asked from any thread, waits for nothing, and once true it stays true."""


def at_once() -> bool:
    """`IsReady` of a CPU, where what a call computes is there when it returns."""
    return True


def never() -> bool:
    """`IsReady` of blocks whose push is cancelled next."""
    return False


class PushBlocks(TransferCommand, frozen=True):
    """Write the given layers of `source` into the `target` blocks, which its first token begins: one handle.

    Posted once `is_ready`, for a GPU may not have computed them yet, and once they are where NIXL can read them. What the same
    push is told later waits behind it. The caller holds a reference on each source block until `HandleDone`.
    """

    token: GrantToken
    layers: range
    source: Span
    target: tuple[BlockId, ...]
    """Written whole: what is behind the last token of `source` in the last of them may be anything."""
    is_ready: IsReady = at_once


class FinishPush(TransferCommand, frozen=True):
    """All blocks are submitted; as soon as they are posted the push's last piece goes out, which says so.

    It carries the first token; None where the target expects none.
    """

    token: GrantToken
    first: FirstToken | None


class RenewLease(TransferCommand, frozen=True):
    """The grant's lease starts anew, now."""

    token: GrantToken


class CancelPush(TransferCommand, frozen=True):
    """Post nothing more; poll the posted handles to their end. A token that is not being pushed is ignored."""

    token: GrantToken


class QuiesceByWire(TransferCommand, frozen=True):
    """Tell `peer` over NIXL, as well as can be, that nothing more will be written for this grant."""

    token: GrantToken
    peer: NodeName
    clean: bool


class ClosePair(TransferCommand, frozen=True):
    """Nothing more is written to `peer`: destroy our agent for that and free its port. Posts what that ends.

    What `peer` may write here has an agent of its own, which is fenced, never closed.
    """

    peer: NodeName


class PairConnected(TransferEvent, frozen=True):
    """The probe is on its way to that agent."""

    peer: NodeName
    agent_id: AgentId


class PairFailed(TransferEvent, frozen=True):
    """That agent is out of reach; until a new `ConnectPair`, pushes to it end at once. Sent once per connection."""

    peer: NodeName
    agent_id: AgentId
    reason: str
    for_good: bool = False
    """There is no way from our blocks to the peer's: a new `ConnectPair` will not help."""


class HandleDone(TransferEvent, frozen=True):
    """The references on these source blocks may go. `kv_bytes` of what was written of them ended DONE."""

    token: GrantToken
    source: tuple[BlockId, ...]
    kv_bytes: int


class Leg(msgspec.Struct, frozen=True):
    """From one of our ranks to one of the peer's."""

    rank: int
    target_rank: int
    heads: range
    """What goes there, of the KV heads of the whole cache."""
    path: KVPath


class Sent(msgspec.Struct, frozen=True):
    """What one push has brought over a leg. Times are of the thread's clock."""

    leg: Leg
    kv_bytes: int
    first_post_at: float
    last_done_at: float


class PushEnded(TransferEvent, frozen=True):
    """Nothing more is or will be in flight for this grant. Times are of the thread's clock, None if nothing was posted."""

    token: GrantToken
    clean: bool
    """Every posted handle ended DONE; so also when none was posted."""
    finished: bool
    """The last piece went out before the push was cancelled, its lease ran out, or its pair was lost: if clean too, it lands."""
    kv_bytes: int
    """Sum of the descriptor lengths of the handles that ended DONE."""
    first_post_at: float | None
    last_done_at: float | None
    sent: tuple[Sent, ...] = ()
    """Over each leg on which a handle ended DONE; in order of our ranks, and of the peer's."""


# ── both ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Stop(TransferCommand, frozen=True):
    """End the thread, and with it all agents; what is in flight is lost."""


class TransferFailed(TransferEvent, frozen=True):
    """The transfer thread has ended on this error (no port left, NIXL not to be had): the node must end too."""

    error: Exception
