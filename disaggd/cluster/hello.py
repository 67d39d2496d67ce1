"""The frames by which nodes come to know each other: hello and heartbeat on a link, then the agents that KV will go between.

`protocol.py` has all others, and says who sends what.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from disaggd.ids import AgentId, Incarnation, NodeName
from disaggd.transfer.endpoint import MAX_RANKS, Endpoint
from disaggd.transfer.layout import KVSpec, in_fp8
from disaggd.wire import Count

PROTOCOL_VERSION = 5

NumRanks = Annotated[int, Meta(ge=1, le=MAX_RANKS)]
Endpoints = Annotated[tuple[Endpoint, ...], Meta(min_length=1, max_length=MAX_RANKS)]
"""By rank."""


class Frame(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The base of every frame."""


# ── hello ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class RouterHello(Frame, frozen=True):
    """The first frame on a link, from the router that dialled."""

    version: int
    router: NodeName
    incarnation: Incarnation
    model_id: str
    """What the router serves: `ModelDirectory.served_id`; a node with another refuses."""
    node: NodeName = NodeName("")
    """Whom it means to reach. The defaults are those of routers older than this version, which is told them."""
    nonce: bytes = b""
    """Fresh for every link: the node's proof is about it."""


class Challenge(Frame, frozen=True):
    """The engine node's first answer: what the router's proof must be about."""

    nonce: bytes


class Proof(Frame, frozen=True):
    """The sender knows the cluster's secret and has heard all that was said before: see `handshake.py`."""

    mac: bytes


class NodeHello(Frame, frozen=True):
    """What the engine node is, once the router has proved that it may know; before its own proof."""

    version: int
    name: NodeName
    role: Literal["prefill", "decode"]
    incarnation: Incarnation
    model_id: str
    kv: KVSpec
    num_blocks: Annotated[int, Meta(ge=1, lt=2**31)]
    max_model_len: Count
    shares_prefixes: bool = False
    """It keeps a prefix cache, and pushes what is in it to other nodes, or takes such pushes."""
    num_ranks: NumRanks = 1
    """That compute the model together, and share out the KV heads of `kv`."""
    lands_in_fp8: bool = False
    """What is written to it is to be in fp8, which it makes numbers of `kv`'s dtype again."""

    @property
    def landing_kv(self) -> KVSpec:
        """The geometry of what is written to it."""
        return in_fp8(self.kv) if self.lands_in_fp8 else self.kv


class HelloRejected(Frame, frozen=True):
    """The peer cannot be worked with: `field` differs."""

    field: str
    ours: str
    theirs: str


class Ping(Frame, frozen=True):
    """A heartbeat: sent every second by both ends; three missed close the link."""


# ── pairing: the agent of a node that writes meets that of its target ────────────────────────────────────────────────


class OpenPair(Frame, frozen=True):
    """Router → target: have an agent that `peer` may write to; answer `PairAgent`.

    Idempotent for the same peer incarnation. A new incarnation fences the agent that served the old one.
    """

    peer: NodeName
    peer_incarnation: Incarnation
    num_ranks: NumRanks
    """Of the peer."""


class PairAgent(Frame, frozen=True):
    """Target → router → writer (as `ConnectPair`): the target's agent for `peer`, and where its pool lies, for each of its ranks.

    Also sent unasked when the agent was rebuilt after a fence. The first rank's id is that of the agent as a whole.
    """

    peer: NodeName
    peer_incarnation: Incarnation
    endpoints: Endpoints

    @property
    def agent_id(self) -> AgentId:
        return self.endpoints[0].agent_id


class ConnectPair(Frame, frozen=True):
    """Router → writer: connect to the agent of `peer`, and probe it with a notification of its own id."""

    peer: NodeName
    peer_incarnation: Incarnation
    endpoints: Endpoints
    kv: KVSpec
    """The geometry of what is written there, over all the peer's ranks."""

    @property
    def agent_id(self) -> AgentId:
        return self.endpoints[0].agent_id


class PairReady(Frame, frozen=True):
    """Target → router → writer: that very agent received its own id; writes may begin.

    The target names the writer as `peer`; towards the writer the router names the target.
    """

    peer: NodeName
    agent_id: AgentId


class PairLost(Frame, frozen=True):
    """Writer → router: the agent of `peer` is out of reach; nothing is pushed there until a `ConnectPair`."""

    peer: NodeName
    agent_id: AgentId
    reason: str
    for_good: bool = False
    """The writer has no way from its blocks to the peer's: nothing but another geometry, or more memory, of one of them will help."""
