"""The decode role: decides where each prompt is prefilled, grants blocks, resumes what landed, generates the rest.

Everything here runs on the compute thread; frames, transfer events and time come in, frames and transfer commands go
out, so a test can script any order of messages. Knows nothing of sockets, text or NIXL.

A sequence is either the engine's alone (prefilled here, or landed), or QUEUED there with at most one grant out:

    Generate ─► Decided, the engine has it
    Generate ─► NeedPrefill ─► RequestGrant ─► Granted ─► Landed ─► (on a GPU: copied into the pool) ─► the engine has it
                                                  └─► Released: the grant is quarantined, the sequence forgotten
"""

import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import singledispatchmethod

import uvloop

from disaggd.cluster.decision import DecisionRule, decide
from disaggd.cluster.protocol import (
    Abort,
    Cancel,
    Decided,
    Gauges,
    Generate,
    Grant,
    Granted,
    Landed,
    NeedPrefill,
    NoRoom,
    OpenPair,
    PairAgent,
    PairReady,
    PrefillLost,
    Progress,
    Quiesced,
    Refused,
    Released,
    RequestGrant,
    Room,
    TokenRun,
    Tokens,
    ToNode,
)
from disaggd.config import Config, NodeConfig
from disaggd.engine.build import LoadedEngine
from disaggd.engine.engine import Engine, SequenceOutput
from disaggd.engine.kv_staging import KVStaging
from disaggd.engine.scheduler import StepPlan
from disaggd.engine.sequence import Sequence, SequenceState
from disaggd.errors import InvalidRequest
from disaggd.ids import BlockId, GrantToken, NodeName, SeqId
from disaggd.roles.arrival import read_sequence
from disaggd.roles.compute import LinkId, Outbox
from disaggd.roles.landing import Copy, LandingMemory, Landings
from disaggd.roles.node import run_engine_node
from disaggd.transfer import messages as transfer
from disaggd.transfer.grant import GrantBook, GrantRecord, GrantState
from disaggd.transfer.notification import FirstToken

log = logging.getLogger(__name__)

COPY_POLL_S = 200e-6
"""A prompt's KV is copied into a GPU's memory in 0.1 to 20 ms, and CUDA has no event that wakes a thread with an inbox."""


@dataclass(slots=True)
class Placed:
    """A sequence that a router placed here."""

    link: LinkId
    sequence: Sequence
    grant: GrantToken | None = None
    """Out now; None again once it landed."""
    reserved: list[BlockId] = field(default_factory=list)
    """Blocks of the pool that wait for what the grant brings, where that lands elsewhere first."""

    @property
    def seq(self) -> SeqId:
        return self.sequence.seq_id

    @property
    def attempt(self) -> int:
        return self.sequence.attempt


@dataclass(frozen=True, slots=True)
class Arrival:
    """A grant that has landed, until it is in the pool; its sequence may have been given up meanwhile."""

    placed: Placed
    first: FirstToken
    copy: Copy


class DecodeRole:
    """One decode node's decisions. `submit` takes commands to the transfer thread; `clock` is monotonic seconds.

    `staging` is what peers write where they cannot write the engine's pool.
    """

    def __init__(
        self,
        name: NodeName,
        engine: Engine,
        rule: DecisionRule,
        *,
        lease_s: float,
        quiesce_s: float,
        bytes_per_block: int,
        vocab_size: int,
        outbox: Outbox,
        submit: Callable[[transfer.TransferCommand], None],
        clock: Callable[[], float],
        staging: LandingMemory | None = None,
    ) -> None:
        self._name = name
        self._engine = engine
        self._pool = engine.pool
        self._rule = rule
        self._lease_s = lease_s
        self._bytes_per_block = bytes_per_block
        self._vocab_size = vocab_size
        self._outbox = outbox
        self._submit = submit
        self._clock = clock
        self._grants = GrantBook(quiesce_s, clock)
        self._landings = Landings(engine.pool, staging)
        self._is_staged = staging is not None
        self._arrivals: list[Arrival] = []
        self._placed: dict[SeqId, Placed] = {}
        self._agents: dict[NodeName, transfer.PairOpened] = {}
        """Our agent for each prefill node."""
        self._refused: list[tuple[Placed, NodeName]] = []
        """Grants that were answered `NoRoom`, to whoever has not been told `Room` since."""

    # ── links ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def link_up(self, link: LinkId) -> None:
        """The router asks for what it needs; `OpenPair` comes next."""

    def link_down(self, link: LinkId) -> None:
        """The router is gone, and with it everyone who waits for its sequences."""
        for placed in [p for p in self._placed.values() if p.link == link]:
            self._forget(placed, "its router is lost")

    # ── frames ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def on_frame(self, link: LinkId, frame: ToNode) -> None:
        self._on_frame(frame, link)

    @singledispatchmethod
    def _on_frame(self, frame: object, link: LinkId) -> None:
        log.warning("a decode node has no use for %s", type(frame).__name__)

    @_on_frame.register
    def _(self, frame: Generate, link: LinkId) -> None:
        if (old := self._placed.get(frame.seq)) is not None:
            if old.attempt >= frame.attempt:
                return
            self._forget(old, "another attempt began")
        try:
            self._place(Placed(link, read_sequence(frame, self._vocab_size)), frame)
        except InvalidRequest as error:
            self._outbox.send(link, Refused(frame.seq, frame.attempt, error.code or "", error.message))

    def _place(self, placed: Placed, frame: Generate) -> None:
        """Decide. Raises InvalidRequest when the pool could never hold the sequence."""
        sequence = placed.sequence
        num_uncached = len(sequence.tokens)
        verdict = decide(
            self._rule,
            num_uncached,
            prefill_nodes=frame.prefill_nodes,
            queue_depth=frame.queue_depth,
            override=frame.policy,
            max_remote_tokens=self._landings.max_tokens,
        )
        if not verdict.remote:
            self._engine.add(sequence)
            self._placed[placed.seq] = placed
            self._outbox.send(placed.link, Decided(frame.seq, frame.attempt, verdict.reason, 0))
            return
        grant = None
        if sequence.sampling.max_tokens - sequence.num_outputs > 1:  # else the prefill node samples all there is to sample
            self._engine.park(sequence)
            self._placed[placed.seq] = placed
            grant = self._grant(placed, frame.grant_for) if frame.grant_for is not None else None
        self._outbox.send(placed.link, NeedPrefill(frame.seq, frame.attempt, verdict.reason, 0, grant))

    @_on_frame.register
    def _(self, frame: RequestGrant, link: LinkId) -> None:
        placed = self._current(frame.seq, frame.attempt)
        if placed is None:
            return self._outbox.send(link, Released(frame.seq, frame.attempt, "unknown sequence"))
        if placed.grant is not None:  # given with `NeedPrefill`; that the router asks again says that it forwarded it to nobody
            self._free(self._grants.withdraw(placed.grant))
            self._unreserve(placed)
            placed.grant = None
        if (grant := self._grant(placed, frame.prefill)) is not None:
            return self._outbox.send(link, Granted(frame.seq, frame.attempt, grant))
        self._refused.append((placed, frame.prefill))
        return self._outbox.send(link, NoRoom(frame.seq, frame.attempt))

    @_on_frame.register
    def _(self, frame: Abort, link: LinkId) -> None:
        if (placed := self._current(frame.seq, frame.attempt)) is not None:
            self._forget(placed, "aborted")

    @_on_frame.register
    def _(self, frame: PrefillLost, link: LinkId) -> None:
        """The arbiter's answer: landed is kept, anything else is given up here before it is tried elsewhere."""
        placed = self._current(frame.seq, frame.attempt)
        if placed is None:
            self._outbox.send(link, Released(frame.seq, frame.attempt, "unknown sequence"))
        elif placed.sequence.state is not SequenceState.QUEUED:
            self._outbox.send(link, Landed(frame.seq, frame.attempt))
        elif not any(arrival.placed is placed for arrival in self._arrivals):  # else `Landed` is about to be said
            self._release(placed, "its prefill failed or is lost")

    @_on_frame.register
    def _(self, frame: Progress, link: LinkId) -> None:
        self._grants.renew(frame.tokens)

    @_on_frame.register
    def _(self, frame: Quiesced, link: LinkId) -> None:
        self._free(self._grants.quiesced(frame.token, frame.clean))

    @_on_frame.register
    def _(self, frame: OpenPair, link: LinkId) -> None:
        """A prefill node that was restarted writes no more: what it had under way is placed again at once."""
        agent = self._agents.get(frame.peer)
        if agent is not None and agent.peer_incarnation != frame.peer_incarnation:
            self._give_up_grants_of(agent, "its prefill node was restarted")
        self._submit(transfer.OpenPair(frame.peer, frame.peer_incarnation))

    # ── transfer events ──────────────────────────────────────────────────────────────────────────────────────────────

    def on_event(self, event: transfer.TransferEvent) -> None:
        self._on_event(event)

    @singledispatchmethod
    def _on_event(self, event: object) -> None:
        raise AssertionError(f"a decode node pushes nothing, and got {event!r}")

    @_on_event.register
    def _(self, event: transfer.Landed) -> None:
        record = self._grants.landed(event.token)
        if record is None:  # given up meanwhile; but all of it is in, so nothing more will be written
            return self._free(self._grants.quiesced(event.token, clean=True))
        placed = self._placed[record.seq_id]
        placed.grant = None
        if not self._is_staged:
            return self._resume(placed, list(record.blocks), event.first)
        blocks, placed.reserved = placed.reserved, []
        self._arrivals.append(Arrival(placed, event.first, self._landings.copy_in(record.blocks, blocks)))
        return None

    @_on_event.register
    def _(self, event: transfer.LandingFailed) -> None:
        self._give_up(event.token, event.reason)

    @_on_event.register
    def _(self, event: transfer.QuiescedByWire) -> None:
        """The prefill node stopped, and no router had asked it to yet: what has not landed by now never will."""
        self._give_up(event.token, "its prefill node stopped")
        self._free(self._grants.quiesced(event.token, event.clean))

    @_on_event.register
    def _(self, event: transfer.PairOpened) -> None:
        self._agents[event.peer] = event
        self._outbox.broadcast(PairAgent(event.peer, event.peer_incarnation, event.agent_id, event.metadata, event.place))

    @_on_event.register
    def _(self, event: transfer.PairProbed) -> None:
        self._outbox.broadcast(PairReady(event.peer, event.agent_id))

    @_on_event.register
    def _(self, event: transfer.Fenced) -> None:
        agent = self._agents.get(event.peer)
        if agent is not None and agent.agent_id == event.agent_id:
            del self._agents[event.peer]  # granted no more; `PairOpened` brings the next
        for record in self._grants.fenced(event.peer, event.agent_id):
            self._free(record)
            placed = self._placed.get(record.seq_id)
            if placed is not None and placed.grant == record.token:
                self._release(placed, "its prefill node was fenced")

    # ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def layers_done(self, plan: StepPlan, layers: range) -> None:
        """Nothing leaves a decode node."""

    def deliver(self, outputs: Iterable[SequenceOutput]) -> None:
        """One frame per router, with the new tokens of all its sequences."""
        runs: dict[LinkId, list[TokenRun]] = {}
        for output in outputs:
            placed = self._placed[output.sequence.seq_id]
            runs.setdefault(placed.link, []).append(
                TokenRun(placed.seq, placed.attempt, output.start, output.tokens, output.logprobs, output.finish_reason)
            )
            if output.finish_reason is not None:
                del self._placed[placed.seq]
        for link, batch in runs.items():
            self._outbox.send(link, Tokens(tuple(batch)))

    def tick(self) -> None:
        """Sequences whose KV is there, leases that ran out, agents to fence, room for those who were refused."""
        self._take_arrivals()
        for record in self._grants.expired():
            self._release(self._placed[record.seq_id], f"no sign of life from {record.peer} for {record.lease_s:g} s")
        for peer, agent_id in self._grants.overdue():
            log.warning("%s did not quiesce: fencing its agent", peer)
            self._submit(transfer.Fence(peer, agent_id))
        for link in self._links_with_room():
            self._refused = [(placed, prefill) for placed, prefill in self._refused if placed.link != link]
            self._outbox.send(link, Room())

    def next_deadline(self) -> float | None:
        if self._links_with_room():
            return self._clock()  # a step has freed it, and nothing else may come in
        deadline = self._grants.next_deadline()
        if not self._arrivals:
            return deadline
        asked_again = self._clock() + COPY_POLL_S
        return asked_again if deadline is None else min(asked_again, deadline)

    def gauges(self) -> Gauges:
        granted, quarantined = self._grants.blocks_granted, self._grants.blocks_quarantined
        engine, free = self._engine.gauges(), self._pool.num_free
        promised = granted + quarantined
        if self._is_staged:  # what is quarantined is not the pool's
            granted = promised = self._landings.num_reserved
        return Gauges(
            waiting=engine.waiting,
            running=engine.running,
            queued=engine.queued,
            blocks_free=free,
            blocks_cached=0,
            blocks_used=self._pool.num_blocks - free - promised,
            blocks_granted=granted,
            blocks_held=0,
            blocks_quarantined=quarantined,
            preemptions=engine.preemptions,
        )

    # ── grants ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _blocks_needed(self, sequence: Sequence) -> int:
        """For its tokens and the first one generated."""
        return self._pool.blocks_for(len(sequence.tokens) + 1)

    def _blocks_pushed(self, sequence: Sequence) -> int:
        return self._pool.blocks_for(len(sequence.tokens))

    def _has_room(self, placed: Placed, prefill: NodeName) -> bool:
        """Whether a grant for `prefill` could be given now."""
        if prefill not in self._agents or not self._landings.has_room(self._blocks_pushed(placed.sequence)):
            return False
        num_coming = self._grants.num_granted + len(self._arrivals)
        return self._engine.room_for_grant(placed.sequence, self._blocks_needed(placed.sequence), num_coming)

    def _links_with_room(self) -> set[LinkId]:
        """Routers of which a refused grant could be given now."""
        self._refused = [(placed, prefill) for placed, prefill in self._refused if self._placed.get(placed.seq) is placed]
        return {placed.link for placed, prefill in self._refused if self._has_room(placed, prefill)}

    def _grant(self, placed: Placed, prefill: NodeName) -> Grant | None:
        """Reserve blocks that `prefill` may write; None when there is no room, or no agent for it."""
        if not self._has_room(placed, prefill):
            return None
        agent = self._agents[prefill]
        num_pushed = self._blocks_pushed(placed.sequence)
        blocks, placed.reserved = self._landings.reserve(self._blocks_needed(placed.sequence), num_pushed)
        token = GrantToken(os.urandom(16))
        self._grants.add(
            token,
            seq_id=placed.seq,
            attempt=placed.attempt,
            peer=prefill,
            agent_id=agent.agent_id,
            blocks=blocks,
            lease_s=self._lease_s,
        )
        placed.grant = token
        self._submit(transfer.Expect(token, prefill, agent.agent_id, num_pushed * self._bytes_per_block))
        return Grant(token, self._name, prefill, agent.agent_id, 0, tuple(blocks), self._lease_s)

    def _free(self, record: GrantRecord | None) -> None:
        """The record has left the book: nobody can write its blocks any more."""
        if record is not None:
            self._submit(transfer.Forget(record.token))
            self._landings.free(record.blocks)

    def _unreserve(self, placed: Placed) -> None:
        self._landings.unreserve(placed.reserved)
        placed.reserved = []

    def _take_arrivals(self) -> None:
        """Resume what has been copied into the pool; of what was given up meanwhile the blocks are free."""
        arrivals, self._arrivals = self._arrivals, []
        for arrival in arrivals:
            placed = arrival.placed
            if not arrival.copy.is_done():
                self._arrivals.append(arrival)
                continue
            blocks = self._landings.copied(arrival.copy)
            if self._placed.get(placed.seq) is placed:
                self._resume(placed, blocks, arrival.first)
            else:
                self._pool.release(blocks)

    def _resume(self, placed: Placed, blocks: list[BlockId], first: FirstToken) -> None:
        """Its KV is in `blocks`, which become the sequence's: it runs."""
        output = self._engine.resume(placed.sequence, blocks, first.token, first.logprob)
        self._outbox.send(placed.link, Landed(placed.seq, placed.attempt))
        self.deliver([output])

    def _release(self, placed: Placed, reason: str) -> None:
        """Give the attempt up, and tell its router to place the sequence again."""
        self._forget(placed, reason)
        self._outbox.send(placed.link, Released(placed.seq, placed.attempt, reason))

    def _forget(self, placed: Placed, reason: str) -> None:
        """The sequence ends here. Blocks that a prefill node may still write go into quarantine, not back to the pool."""
        del self._placed[placed.seq]
        self._engine.abort(placed.sequence)
        self._unreserve(placed)
        if placed.grant is not None and (record := self._grants.quarantine(placed.grant, reason)) is not None:
            self._outbox.send(placed.link, Cancel(record.token, record.peer, self._name))

    def _give_up(self, token: GrantToken, reason: str) -> None:
        """Release the sequence that waits for this grant; nothing if the grant was given up before."""
        record = self._grants.get(token)
        if record is not None and record.state is GrantState.GRANTED:
            self._release(self._placed[record.seq_id], reason)

    def _give_up_grants_of(self, agent: transfer.PairOpened, reason: str) -> None:
        for placed in list(self._placed.values()):
            record = self._grants.get(placed.grant) if placed.grant is not None else None
            if record is not None and record.agent_id == agent.agent_id:
                self._release(placed, reason)

    def _current(self, seq: SeqId, attempt: int) -> Placed | None:
        placed = self._placed.get(seq)
        return placed if placed is not None and placed.attempt == attempt else None


def run(config: Config, node: NodeConfig) -> None:
    """Serve a decode node until SIGTERM or SIGINT. Raises DisaggdError."""
    rules = config.disaggregation
    rule = DecisionRule(
        policy=rules.policy, max_local_prefill_tokens=rules.max_local_prefill_tokens, max_prefill_queue=rules.max_prefill_queue
    )

    def make_role(
        loaded: LoadedEngine, staging: KVStaging | None, outbox: Outbox, submit: Callable[[transfer.TransferCommand], None]
    ) -> DecodeRole:
        return DecodeRole(
            node.name,
            loaded.engine,
            rule,
            lease_s=config.transfer.lease_s,
            quiesce_s=config.transfer.quiesce_s,
            bytes_per_block=loaded.kv_spec.bytes_per_block,
            vocab_size=loaded.spec.vocab_size,
            outbox=outbox,
            submit=submit,
            clock=time.monotonic,
            staging=staging,
        )

    uvloop.run(run_engine_node(config, node, make_role))
