"""What the router knows of each engine node: its link, its geometry, its credit, its pairs. Runs on the router's loop."""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from disaggd.cluster.protocol import Gauges, NodeHello, PairAgent, ToNode
from disaggd.ids import AgentId, NodeName, SeqId

Send = Callable[[ToNode], None]


class PairState(enum.Enum):
    """A prefill node's way to a decode node."""

    OPENING = "opening"
    """Decode was asked for an agent."""
    PROBING = "probing"
    """Prefill was given the agent and probes it."""
    READY = "ready"
    """Decode received its own agent's id: grants may be given."""
    LOST = "lost"
    """Prefill cannot reach the agent: probed again after a pause."""


@dataclass(slots=True)
class Pair:
    """One prefill node → one decode node, over one decode-side agent."""

    prefill: NodeName
    decode: NodeName
    state: PairState = PairState.OPENING
    agent: PairAgent | None = None
    """The decode node's latest agent for this pair."""
    retry_at: float = 0.0
    """When LOST: the time of the next probe."""

    def is_current(self, agent_id: AgentId) -> bool:
        return self.agent is not None and self.agent.agent_id == agent_id


@dataclass(slots=True)
class PrefillPeer:
    """A prefill node whose link is up. A new link makes a new `PrefillPeer`."""

    name: NodeName
    hello: NodeHello
    send: Send
    gauges: Gauges | None = None
    credit_tokens: int = 0
    """Prompt tokens that this router may have there at once."""
    jobs: dict[tuple[SeqId, int], int] = field(default_factory=dict)
    """Tokens of each job that holds credit, by (sequence, attempt)."""

    def has_credit(self, num_tokens: int) -> bool:
        """One job always fits an idle node; more only within the credit, so that jobs wait in the queue."""
        if self.credit_tokens == 0:
            return False
        return not self.jobs or sum(self.jobs.values()) + num_tokens <= self.credit_tokens


@dataclass(slots=True)
class DecodePeer:
    """A decode node whose link is up. A new link makes a new `DecodePeer`."""

    name: NodeName
    hello: NodeHello
    send: Send
    gauges: Gauges | None = None
    is_full: bool = False
    """It answered `NoRoom`, and no `Room` since."""
    load_tokens: int = 0
    """Context tokens of the sequences placed there."""
