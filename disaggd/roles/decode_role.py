"""The decode role: decides where each prompt is prefilled, grants blocks, resumes what landed, generates the rest.

Everything here runs on the compute thread; frames, transfer events and time come in, frames and transfer commands go
out, so a test can script any order of messages. Knows nothing of sockets, text or NIXL.

What is cached of a sequence that is prefilled elsewhere may be pushed there, if it is wanted there (`PushPrefix`).

A sequence is either the engine's alone (prefilled here, or landed), or QUEUED there with at most one grant out:

    Generate ─► Decided, the engine has it
    Generate ─► NeedPrefill ─► RequestGrant ─► Granted ─► Landed ─► (on a GPU: copied into the pool) ─► the engine has it
                                                  └─► Released: the grant is quarantined, the sequence forgotten
"""

import logging
from collections.abc import Callable, Iterable
from functools import singledispatchmethod

from disaggd.cluster.decision import DecisionRule
from disaggd.cluster.hello import OpenPair, PairAgent, PairReady
from disaggd.cluster.holdings import Holding
from disaggd.cluster.protocol import (
    Abort,
    Cancel,
    Decided,
    Gauges,
    Generate,
    Granted,
    Landed,
    NeedPrefill,
    NoRoom,
    PrefillLost,
    Progress,
    PushPrefix,
    Quiesced,
    Refused,
    Released,
    RequestGrant,
    Room,
    TokenRun,
    Tokens,
    ToNode,
)
from disaggd.engine.engine import Engine, SequenceOutput
from disaggd.engine.scheduler import StepPlan
from disaggd.engine.sequence import SequenceState
from disaggd.errors import InvalidRequest
from disaggd.ids import BlockId, GrantToken, NodeName, SeqId
from disaggd.roles.arrival import read_sequence
from disaggd.roles.compute import LinkId, Outbox
from disaggd.roles.deciding import Decider, measured
from disaggd.roles.gauges import node_gauges
from disaggd.roles.granting import Granting, Placed
from disaggd.roles.local_prefills import LocalPrefills
from disaggd.roles.pair_check import PairCheck
from disaggd.roles.pushing import Pushing
from disaggd.transfer import messages as transfer
from disaggd.transfer.grant import GrantState
from disaggd.transfer.notification import FirstToken

log = logging.getLogger(__name__)

COPY_POLL_S = 200e-6
"""A prompt's KV is copied into a GPU's memory in 0.1 to 20 ms, and CUDA has no event that wakes a thread with an inbox."""


class DecodeRole:
    """One decode node's decisions. `submit` takes commands to the transfer thread; `clock` is monotonic seconds."""

    def __init__(
        self,
        engine: Engine,
        rule: DecisionRule,
        *,
        granting: Granting,
        pushing: Pushing,
        checks: PairCheck,
        layer_groups: tuple[range, ...],
        vocab_size: int,
        outbox: Outbox,
        submit: Callable[[transfer.TransferCommand], None],
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._pool = engine.pool
        self._decider = Decider(rule, engine, max_remote_tokens=granting.max_tokens, bytes_per_token=granting.bytes_per_token)
        self._granting = granting
        self._grants = granting.book
        self._pushing = pushing
        self._checks = checks
        self._layer_groups = layer_groups
        """What one write takes, of a model's layers."""
        self._vocab_size = vocab_size
        self._outbox = outbox
        self._submit = submit
        self._clock = clock
        self._placed: dict[SeqId, Placed] = {}
        self._refused: dict[SeqId, tuple[Placed, NodeName]] = {}
        """Grants that were answered `NoRoom`, the last time that they were asked for."""
        self._thought_full: set[LinkId] = set()
        """Routers that were answered `NoRoom`, and not told `Room` since."""
        self._local_prefills = LocalPrefills(self._decider, outbox, clock)
        self._turn_began = 0.0
        """A step begins right after the tick."""
        self._has_resumed = False
        """The next step is the first of some sequence whose first token came from elsewhere."""

    # ── links ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def link_up(self, link: LinkId) -> None:
        """The router asks for what it needs; `OpenPair` comes next."""
        if (frame := measured(self._engine)) is not None:
            self._outbox.send(link, frame)

    def link_down(self, link: LinkId) -> None:
        """The router is gone, and with it everyone who waits for its sequences."""
        for placed in [p for p in self._placed.values() if p.link == link]:
            self._forget(placed, "its router is lost")
        self._thought_full.discard(link)
        self._decider.link_down(link)
        self._pushing.stop_all(link)
        self._pushing.link_down(link)

    # ── frames ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def on_frame(self, link: LinkId, frame: ToNode) -> None:
        if not self._checks.on_frame(link, frame):
            self._on_frame(frame, link)

    @singledispatchmethod
    def _on_frame(self, frame: ToNode, link: LinkId) -> None:
        if not self._pushing.on_frame(frame):
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
        num_cached = len(self._engine.cache.find(sequence)) * self._pool.block_size
        decision, plain_ttft_s = self._decider.decide(sequence, num_cached, frame, placed.link, self._clock())
        if not decision.remote:
            self._engine.add(sequence)
            self._placed[placed.seq] = placed
            self._local_prefills.arrived(sequence, plain_ttft_s)
            self._outbox.send(placed.link, Decided(frame.seq, frame.attempt, decision.reason, num_cached, decision.predicted))
            return self._decider.told(placed.link, None, len(sequence.tokens))
        grant = None
        if sequence.sampling.max_tokens - sequence.num_outputs > 1:  # else the prefill node samples all there is to sample
            self._engine.park(sequence)
            self._placed[placed.seq] = placed
            grant = self._granting.grant(placed, frame.offer.prefill) if frame.offer is not None and frame.offer.may_grant else None
        self._outbox.send(placed.link, NeedPrefill(frame.seq, frame.attempt, decision.reason, num_cached, grant, decision.predicted))
        return self._decider.told(placed.link, frame.offer, len(sequence.tokens))

    @_on_frame.register
    def _(self, frame: RequestGrant, link: LinkId) -> None:
        placed = self._current(frame.seq, frame.attempt)
        if placed is None or placed.sequence.state is not SequenceState.QUEUED:  # a router of ours asks for none that is computed here
            return self._outbox.send(link, Released(frame.seq, frame.attempt, "no such sequence waits for a grant"))
        if placed.grant is not None:  # given with `NeedPrefill`; that the router asks again says that it forwarded it to nobody
            self._granting.withdraw(placed)
        if not self._granting.can_land(placed):
            return self._release(placed, "the prefix that was cached here is gone, and the whole is more than can be received")
        if (grant := self._granting.grant(placed, frame.prefill)) is not None:
            self._refused.pop(placed.seq, None)
            return self._outbox.send(link, Granted(frame.seq, frame.attempt, grant))
        if frame.earmark:
            self._granting.earmark(placed)
        self._refused[placed.seq] = (placed, frame.prefill)
        self._thought_full.add(link)
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
        elif not self._granting.is_arriving(placed):  # else `Landed` is about to be said
            self._release(placed, "its prefill failed or is lost")

    @_on_frame.register
    def _(self, frame: Progress, link: LinkId) -> None:
        self._grants.renew(frame.tokens)

    @_on_frame.register
    def _(self, frame: Quiesced, link: LinkId) -> None:
        self._granting.free(self._grants.quiesced(frame.token, frame.clean))

    @_on_frame.register
    def _(self, frame: OpenPair, link: LinkId) -> None:
        """A prefill node that was restarted writes no more: what it had under way is placed again at once."""
        agent = self._granting.agents.get(frame.peer)
        if agent is not None and agent.peer_incarnation != frame.peer_incarnation:
            self._give_up_grants_of(agent, "its prefill node was restarted")
        self._submit(transfer.OpenPair(frame.peer, frame.peer_incarnation, frame.num_ranks))

    # ── what is cached here and wanted elsewhere ─────────────────────────────────────────────────────────────────────

    @_on_frame.register
    def _(self, frame: PushPrefix, link: LinkId) -> None:
        """Of the blocks that the sequence's own grant left out, those that the prefill node lacks: all at once, for all are there."""
        placed, grant = self._current(frame.seq, frame.attempt), frame.grant
        prefix = [] if placed is None else placed.prefix
        num_held = len(prefix) * self._pool.block_size
        try:
            num_tokens = self._pushing.end_of(grant)
            if num_tokens > num_held:
                raise InvalidRequest(f"{num_tokens} tokens are wanted and {num_held} held")
            self._pushing.check(grant, num_tokens)
        except InvalidRequest as error:
            log.warning("%s: its prefix is not pushed to %s: %s", frame.seq, grant.target, error.message)
            return self._pushing.refuse(grant, link)
        self._pushing.begin(grant, frame.seq, frame.attempt, link)
        for layers in self._layer_groups:
            self._pushing.write(grant, layers, prefix, range(num_tokens), transfer.at_once)
        return self._pushing.finish(grant.token, None)

    @_on_frame.register
    def _(self, frame: Cancel, link: LinkId) -> None:
        if self._pushing.cancel(frame, link):
            self._pushing.stop(frame.token)

    # ── transfer events ──────────────────────────────────────────────────────────────────────────────────────────────

    def on_event(self, event: transfer.TransferEvent) -> None:
        if not self._checks.on_event(event):
            self._on_event(event)

    @singledispatchmethod
    def _on_event(self, event: transfer.TransferEvent) -> None:
        if not self._pushing.on_event(event):
            raise AssertionError(f"nobody told the transfer thread to send {event!r}")

    @_on_event.register
    def _(self, event: transfer.Landed) -> None:
        self._granting.verified.landed(event)
        if event.first is not None and event.first.token >= self._vocab_size:
            self._give_up(event.token, f"its first token, {event.first.token}, is beyond the vocabulary")
        record = self._grants.landed(event.token)
        if record is None:  # given up meanwhile; but all of it is in, so nothing more will be written
            return self._granting.free(self._grants.quiesced(event.token, clean=True))
        assert event.first is not None, "every grant for a prefill expects one"
        placed = self._placed[record.seq_id]
        blocks = self._granting.land(placed, record, event.first)
        return None if blocks is None else self._resume(placed, blocks, event.first)

    @_on_event.register
    def _(self, event: transfer.LandingFailed) -> None:
        self._granting.verified.failed(event)
        self._give_up(event.token, event.reason)

    @_on_event.register
    def _(self, event: transfer.QuiescedByWire) -> None:
        """The prefill node stopped, and no router had asked it to yet: what has not landed by now never will."""
        if not self._grants.is_written_by(event.token, event.peer):
            return
        self._give_up(event.token, "its prefill node stopped")
        self._granting.free(self._grants.quiesced(event.token, event.clean))

    @_on_event.register
    def _(self, event: transfer.PairOpened) -> None:
        self._granting.agents[event.peer] = event
        self._outbox.broadcast(PairAgent(event.peer, event.peer_incarnation, event.endpoints))

    @_on_event.register
    def _(self, event: transfer.PairProbed) -> None:
        self._outbox.broadcast(PairReady(event.peer, event.agent_id))

    @_on_event.register
    def _(self, event: transfer.Fenced) -> None:
        for record in self._granting.fenced(event.peer, event.agent_id):
            placed = self._placed.get(record.seq_id)
            if placed is not None and placed.grant == record.token:
                self._release(placed, "its prefill node was fenced", is_fenced=True)

    @_on_event.register
    def _(self, event: transfer.PushEnded) -> None:
        """The prefill node learns by itself only of a push that landed."""
        push = self._pushing.ended(event)
        if not (event.clean and event.finished):
            self._outbox.send(push.link, Quiesced(event.token, push.grant.target, event.clean))

    # ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def layers_done(self, plan: StepPlan, layers: range) -> None:
        """Nothing leaves a decode node that it computes just now; prompts begin to be prefilled."""
        self._pushing.renew_leases()
        if not layers.start:
            self._local_prefills.step_began(plan, self._turn_began)

    def deliver(self, outputs: Iterable[SequenceOutput]) -> None:
        """One frame per router, with the new tokens of all its sequences."""
        runs: dict[LinkId, list[TokenRun]] = {}
        for output in outputs:
            placed = self._placed[output.sequence.seq_id]
            self._local_prefills.tokens_came(placed.sequence, placed.link)
            runs.setdefault(placed.link, []).append(
                TokenRun(placed.seq, placed.attempt, output.start, output.tokens, output.logprobs, output.finish_reason)
            )
            if output.finish_reason is not None:
                del self._placed[placed.seq]
        for link, batch in runs.items():
            self._outbox.send(link, Tokens(tuple(batch)))

    def tick(self) -> None:
        """Sequences whose KV is there, leases that ran out, agents to fence, room for those who were refused."""
        self._turn_began = self._clock()
        for placed, blocks, first in self._granting.take_arrivals(lambda placed: self._placed.get(placed.seq) is placed):
            self._resume(placed, blocks, first)
        for record in self._grants.expired():
            self._release(self._placed[record.seq_id], f"no sign of life from {record.peer} for {record.lease_s:g} s")
        for peer, agent_id in self._grants.overdue():
            log.warning("%s did not quiesce: fencing its agent", peer)
            self._submit(transfer.Fence(peer, agent_id))
        self._pushing.tick()
        self._checks.tick()
        for link in self._links_with_room():
            self._thought_full.discard(link)
            self._outbox.send(link, Room())
        self._engine.pace.is_expecting = self._has_resumed or self._granting.is_expecting
        self._has_resumed = False

    def next_deadline(self) -> float | None:
        if self._links_with_room():
            return self._clock()  # a step has freed it, and nothing else may come in
        asked_again = self._clock() + COPY_POLL_S if self._granting.arrivals or self._checks.is_arriving else None
        deadlines = (self._grants.next_deadline(), self._pushing.next_deadline(), self._checks.next_deadline(), asked_again)
        return min((at for at in deadlines if at is not None), default=None)

    @property
    def is_idle(self) -> bool:
        """What others may still write here, for nobody, is of no interest: with the process it ends."""
        return not self._placed and self._pushing.is_idle

    def gauges(self) -> Gauges:
        return node_gauges(
            self._engine,
            self._granting.verified,
            granted=self._granting.blocks_granted + self._checks.blocks_granted,
            quarantined=self._granting.blocks_quarantined + self._checks.blocks_quarantined,
            promised=self._granting.blocks_promised + self._checks.blocks_promised,
            held=self._pushing.num_blocks_held,
        )

    def holdings(self) -> Iterable[Holding]:
        return (*self._granting.holdings(), *self._checks.holdings(), *self._pushing.holdings())

    # ── moves ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _links_with_room(self) -> set[LinkId]:
        """Routers that think this node full, and of which a refused grant could be given now: not always the one they asked for last."""
        if not self._thought_full:
            return set()
        refused, granting = [one for one in self._refused.values() if one[0].link in self._thought_full], self._granting
        return {placed.link for placed, prefill in refused if granting.has_room(placed, prefill) or not granting.can_land(placed)}

    def _resume(self, placed: Placed, blocks: list[BlockId], first: FirstToken) -> None:
        """Its KV is in what was cached and in `blocks`, which become the sequence's: it runs."""
        self._has_resumed = True
        prefix, placed.prefix = placed.prefix, []
        num_cached = len(prefix) * self._pool.block_size
        output = self._engine.resume(placed.sequence, prefix + blocks, first.token, first.logprob, num_cached=num_cached)
        self._outbox.send(placed.link, Landed(placed.seq, placed.attempt))
        self.deliver([output])

    def _release(self, placed: Placed, reason: str, *, is_fenced: bool = False) -> None:
        """Give the attempt up, and tell its router to place the sequence again."""
        self._forget(placed, reason)
        self._outbox.send(placed.link, Released(placed.seq, placed.attempt, reason, is_fenced))

    def _forget(self, placed: Placed, reason: str) -> None:
        """The sequence ends here. Blocks that a prefill node may still write go into quarantine, not back to the pool."""
        del self._placed[placed.seq]
        self._local_prefills.forget(placed.sequence)
        self._refused.pop(placed.seq, None)
        self._engine.abort(placed.sequence)
        if (record := self._granting.give_up(placed, reason)) is not None:
            self._outbox.send(placed.link, Cancel(record.token, record.peer, self._granting.name))

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
