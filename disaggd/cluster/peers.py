"""What the router knows of each engine node: its link, its geometry, its credit, its pairs. Runs on the router's loop."""

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile

from disaggd.cluster.costs import PrefillFit, TransferFit
from disaggd.cluster.hello import NodeHello, PairAgent
from disaggd.cluster.offer import PrefillCost
from disaggd.cluster.prefill_queue import PrefillQueue
from disaggd.cluster.protocol import Gauges, ToNode
from disaggd.ids import AgentId, NodeName, SeqId

Send = Callable[[ToNode], None]


class Duty(enum.Enum):
    """Whether a node takes what comes."""

    SERVING = "serving"
    DRAINING = "draining"
    """It is about to stop: it finishes what it has, and gets nothing that another node could have."""
    DISMISSED = "dismissed"
    """It was told that it may stop: it gets nothing at all."""


class PairState(enum.Enum):
    """A node's way to another that it writes to."""

    OPENING = "opening"
    """The target was asked for an agent."""
    PROBING = "probing"
    """The writer was given the agent and probes it."""
    CHECKING = "checking"
    """The target received its own agent's id, and a pattern is on its way there."""
    READY = "ready"
    """What was written arrived as it was, or nobody had room to find out: grants may be given."""
    LOST = "lost"
    """The writer cannot reach the agent: probed again after a pause."""
    FAILED = "failed"
    """The pattern did not arrive as it was: checked again after a long pause."""
    REFUSED = "refused"
    """No bytes of the one can become bytes of the other, or the writer's staging memory is too small for them: nothing is tried until one
    of them comes back."""


@dataclass(slots=True)
class Pair:
    """One node → another that it writes to, over one agent of the target."""

    writer: NodeName
    target: NodeName
    state: PairState = PairState.OPENING
    agent: PairAgent | None = None
    """The target's latest agent for this pair."""
    replaced: AgentId | None = None
    """The agent before it."""
    retry_at: float = 0.0
    """When LOST: the time of the next probe; FAILED, or READY without a check: of the next check."""
    reason: str = ""
    """Why it is LOST, FAILED or REFUSED, or READY without a check; while it is probed again, why it was lost."""
    checked: AgentId | None = None
    """The agent at which the pattern arrived."""
    transfers: TransferFit = field(default_factory=TransferFit)

    def is_current(self, agent_id: AgentId) -> bool:
        return self.agent is not None and self.agent.agent_id == agent_id


UNMEASURED = PrefillCost(base_s=0.0, per_token_s=1e-3, per_token_context_s=0.0)
"""Of a prefill node that has told nothing of its speed yet: only the order of jobs and nodes is drawn from it."""


class JobStage(enum.Enum):
    """How far a job is that holds a prefill node's credit."""

    OFFERED = "offered"
    """Its decode node has yet to decide: it may not come."""
    COMING = "coming"
    """It will, once decode has granted blocks for it."""
    SENT = "sent"
    PREFILLED = "prefilled"
    """Only its push is still under way."""


@dataclass(slots=True)
class JobInHand:
    """A job that holds a prefill node's credit."""

    num_tokens: int
    prefill_s: float
    """Predicted when the node was chosen."""
    decode: NodeName
    stage: JobStage = JobStage.COMING


@dataclass(slots=True)
class PrefillPeer:
    """A prefill node whose link is up. A new link makes a new `PrefillPeer`."""

    name: NodeName
    hello: NodeHello
    send: Send
    duty: Duty = Duty.SERVING
    gauges: Gauges | None = None
    credit_tokens: int = 0
    """Prompt tokens that this router may have there at once."""
    jobs: dict[tuple[SeqId, int], JobInHand] = field(default_factory=dict)
    """Those that hold credit, by (sequence, attempt), in the order in which they are computed."""
    busy_since: float = 0.0
    """When it began with the first of the jobs that it has been sent and not prefilled yet."""
    prefills: PrefillFit = field(default_factory=PrefillFit)

    @property
    def prefill_cost(self) -> PrefillCost | None:
        """None until it is measured."""
        return self.prefills.cost

    @property
    def tokens_in_hand(self) -> int:
        return sum(job.num_tokens for job in self.jobs.values())

    def has_credit(self, num_tokens: int) -> bool:
        """One job always fits an idle node; more only within the credit, so that jobs wait in the queue."""
        if self.credit_tokens == 0 or self.duty is not Duty.SERVING:
            return False
        return not self.jobs or self.tokens_in_hand + num_tokens <= self.credit_tokens

    def prefill_s(self, num_uncached: int, num_cached: int) -> float:
        """Predicted, for a prompt of which it holds `num_cached` tokens."""
        return (self.prefill_cost or UNMEASURED).seconds(num_uncached, num_cached)

    def backlog_s(self, now: float, offers: Callable[[NodeName], float] = lambda _: 1.0) -> float:
        """Predicted, until it has prefilled all that it has in hand. What is late is expected any moment.

        `offers` is by how much work counts that has been offered to a decode node: the share of such that it takes up.
        """
        jobs = self.jobs.values()
        offered_s = sum(offers(job.decode) * job.prefill_s for job in jobs if job.stage is JobStage.OFFERED)
        coming_s = sum(job.prefill_s for job in jobs if job.stage is JobStage.COMING)
        sent_s = sum(job.prefill_s for job in jobs if job.stage is JobStage.SENT)
        return offered_s + coming_s + max(0.0, sent_s - (now - self.busy_since))

    def wait_s(self, job: tuple[SeqId, int], now: float) -> float:
        """Predicted, until it comes to the last of its jobs, which is this one."""
        return max(0.0, self.backlog_s(now) - self.jobs[job].prefill_s)


DECISIONS_IN_MIND = 20
"""Of a decode node: what it did before has faded to a third after so many."""


@dataclass(slots=True)
class DecodePeer:
    """A decode node whose link is up. A new link makes a new `DecodePeer`."""

    name: NodeName
    hello: NodeHello
    send: Send
    duty: Duty = Duty.SERVING
    gauges: Gauges | None = None
    is_full: bool = False
    """It answered `NoRoom`, and no `Room` since."""
    load_tokens: int = 0
    """Context tokens of the sequences placed there."""
    step_s: float | None = None
    """What a step of one sequence took when it measured itself; None if it told nothing."""
    earmarks: dict[SeqId, None] = field(default_factory=dict)
    """Sequences that wait for a grant, and for which it keeps what comes free: for the first of them first."""
    num_decisions: int = 0
    """That it has told."""
    remote_share: float = 0.5
    """Of its decisions of late on offers that could be taken up at once, those that did so."""
    breakeven_tokens: int | None = None
    """From so many uncached tokens on a prompt cost less elsewhere when it last decided; None while it cannot tell."""

    def decided(self, *, remote: bool) -> None:
        """It has told a decision."""
        self.num_decisions += 1
        self.remote_share += (remote - self.remote_share) / DECISIONS_IN_MIND

    def has_nothing_for(self, seq: SeqId, waiting: PrefillQueue) -> bool:
        """Whether a grant to the sequence would be refused: there is no room, or what there is is kept for others.

        `waiting`: who has not asked since there is room.
        """
        if self.is_full or not self.earmarks:
            return self.is_full
        return seq not in self.earmarks or any(other in waiting for other in takewhile(lambda other: other != seq, self.earmarks))

    def lacks_room(self, num_tokens: int) -> bool:
        """Whether a sequence of so many tokens had to wait for blocks there: it did a moment ago, or would by the gauges."""
        if self.is_full or self.gauges is None:
            return self.is_full
        return self.gauges.blocks_free + self.gauges.blocks_cached < num_tokens // self.hello.kv.block_size + 1


Peer = PrefillPeer | DecodePeer


def is_any_serving(peers: Mapping[NodeName, PrefillPeer] | Mapping[NodeName, DecodePeer]) -> bool:
    """Whether one of them takes what comes."""
    return any(peer.duty is Duty.SERVING for peer in peers.values())


def able_to_decode(decodes: Mapping[NodeName, DecodePeer]) -> dict[NodeName, DecodePeer]:
    """Who may get a sequence that is under way: those that serve; if none does, those that are draining, for there is nowhere else."""
    by_duty = {duty: {name: peer for name, peer in decodes.items() if peer.duty is duty} for duty in Duty}
    return by_duty[Duty.SERVING] or by_duty[Duty.DRAINING]
