"""`PrefixIntake`: what a prefill node lacks of a prompt's beginning, and decode has and pushes here.

    ask ─► PrefixGrant ─► Landed: registered in the cache, held until the sequence begins ─► begun
                     └─► no room, lease run out, quiesced, fenced: the sequence goes on without

Runs on the compute thread. A sequence is parked while it waits, and unparked whatever comes of it: it then finds in the cache what is
there, and computes the rest. Blocks that decode may still write are quarantined as a decode node's are: only a clean quiesce or a fence
frees them.
"""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from disaggd.cluster.hello import OpenPair, PairAgent, PairReady
from disaggd.cluster.holdings import Holding
from disaggd.cluster.protocol import Cancel, Grant, PrefixEnded, PrefixGrant, PrefixOutcome, PrefixSource
from disaggd.engine.engine import Engine
from disaggd.engine.sequence import Sequence, SequenceState
from disaggd.ids import BlockId, GrantToken, NodeName, SeqId
from disaggd.roles.compute import LinkId, Outbox
from disaggd.roles.gauges import Verified, grant_holdings
from disaggd.transfer import messages as transfer
from disaggd.transfer.grant import GrantBook, GrantRecord, GrantState

log = logging.getLogger(__name__)

Key = tuple[SeqId, int]
"""A sequence and the attempt at it."""


@dataclass(slots=True)
class Prefix:
    """The beginning of a sequence that has not begun."""

    link: LinkId
    sequence: Sequence
    source: NodeName
    asked_at: float
    grant: Grant | None = None
    """Out now; None again once it landed."""
    held: list[BlockId] = field(default_factory=list)
    """Registered blocks, with a reference each: else they could be evicted before the sequence begins behind them."""

    @property
    def key(self) -> Key:
        return self.sequence.seq_id, self.sequence.attempt

    @property
    def num_blocks(self) -> int:
        """Of the sequence's, those that are held or promised."""
        return len(self.held) + (0 if self.grant is None else len(self.grant.block_ids))


class PrefixIntake:
    """One node's prefixes from others. `submit` takes commands to the transfer thread; `clock` is monotonic seconds."""

    def __init__(
        self,
        name: NodeName,
        engine: Engine,
        *,
        lease_s: float,
        quiesce_s: float,
        outbox: Outbox,
        submit: Callable[[transfer.TransferCommand], None],
        clock: Callable[[], float],
        verify: bool = False,
    ) -> None:
        self.verified = Verified()
        self._name = name
        self._engine = engine
        self._pool = engine.pool
        self._lease_s = lease_s
        self._verify = verify
        self._outbox = outbox
        self._submit = submit
        self._clock = clock
        self._book = GrantBook(quiesce_s, clock)
        self.agents: dict[NodeName, transfer.PairOpened] = {}
        """Ours, for each node that may push here."""
        self._prefixes: dict[Key, Prefix] = {}

    # ── a prefix ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def ask(self, link: LinkId, sequence: Sequence, source: PrefixSource) -> None:
        """Grant `source` blocks for what it has and we lack. The sequence is parked; if nothing is to be had, it goes on at once."""
        prefix = Prefix(link, sequence, source.node, self._clock())
        self._prefixes[prefix.key] = prefix
        cached = self._engine.cache.find(sequence)
        num_wanted = min(source.num_tokens, len(sequence.tokens) - 1) // self._pool.block_size - len(cached)
        agent = self.agents.get(source.node)
        if num_wanted <= 0:
            self._go_on(prefix, "cached", "it is cached here by now")
        elif agent is None:
            self._go_on(prefix, "unreachable", "no agent is open for it")
        elif not self._has_room(sequence, cached):
            self._go_on(prefix, "no_room", "no blocks are to be had for it")
        else:
            self._grant(prefix, cached, num_wanted, agent)

    def _grant(self, prefix: Prefix, cached: list[BlockId], count: int, agent: transfer.PairOpened) -> None:
        seq, attempt = prefix.key
        self._pool.take(cached)
        prefix.held = cached
        blocks = self._pool.allocate(count)
        assert blocks is not None, "room was checked"
        token = GrantToken(os.urandom(16))
        self._book.add(token, seq_id=seq, attempt=attempt, peer=agent.peer, agent_id=agent.agent_id, blocks=blocks, lease_s=self._lease_s)
        verify = tuple(blocks) if self._verify else ()
        self._submit(transfer.Expect(token, agent.peer, agent.agent_id, count, brings_token=False, verify=verify))
        first = len(cached) * self._pool.block_size
        prefix.grant = Grant(token, self._name, agent.peer, agent.agent_id, first, tuple(blocks), self._lease_s, self._verify)
        self._outbox.send(prefix.link, PrefixGrant(seq, attempt, prefix.grant))

    def _has_room(self, sequence: Sequence, cached: list[BlockId]) -> bool:
        """Whether every sequence that has not begun would find all its blocks beside those that are promised or held for others.

        Else each might hold what another waits for.
        """
        states = (SequenceState.WAITING, SequenceState.QUEUED)
        waiting = [other for other in self._engine.sequences.values() if other.state in states]
        assert sequence in waiting
        need = sum(self._pool.blocks_for(len(other.tokens)) for other in waiting)
        spoken_for = sum(prefix.num_blocks for prefix in self._prefixes.values())
        return self._pool.num_available - self._pool.num_unheld(cached) >= need - len(cached) - spoken_for

    def begun(self, key: Key) -> None:
        """The sequence has its blocks: nothing need be held for it any more."""
        if (prefix := self._prefixes.pop(key, None)) is not None:
            self._pool.release(prefix.held)

    def drop(self, key: Key, reason: str) -> None:
        """The sequence is about to be aborted."""
        prefix = self._prefixes.get(key)
        if prefix is None:
            return
        if prefix.grant is not None:
            self._give_up(prefix)
            self._report(prefix, "stopped", reason)
        self.begun(key)

    # ── what becomes of a grant ──────────────────────────────────────────────────────────────────────────────────────

    def landed(self, event: transfer.Landed) -> None:
        """All of it is in: only now may anybody find it."""
        self.verified.landed(event)
        record = self._book.landed(event.token)
        if record is None:  # given up meanwhile; but all of it is in, so nothing more will be written
            return self._free(self._book.quiesced(event.token, clean=True))
        prefix = self._prefixes[record.seq_id, record.attempt]
        assert prefix.grant is not None
        first = prefix.grant.first_token_index // self._pool.block_size
        self._engine.cache.keep(prefix.sequence, first, record.blocks)
        found = self._engine.cache.find(prefix.sequence)  # in other blocks than these, if they were computed here meanwhile
        self._pool.take(found)
        self._pool.release((*record.blocks, *prefix.held))
        prefix.grant, prefix.held = None, found
        self._report(prefix, "landed", "", num_tokens=len(record.blocks) * self._pool.block_size, kv_bytes=event.kv_bytes)
        return self._engine.unpark(prefix.sequence)

    def landing_failed(self, event: transfer.LandingFailed) -> None:
        self.verified.failed(event)
        self.failed(event.token, event.reason)

    def failed(self, token: GrantToken, reason: str) -> None:
        """The push comes to nothing; nothing happens if it was given up before."""
        record = self._book.get(token)
        if record is not None and record.state is GrantState.GRANTED:
            self._fail(record, reason)

    def quiesced(self, token: GrantToken, clean: bool) -> None:
        """Decode writes no more. If it was not asked to stop, what has not landed by now never will."""
        self.failed(token, "decode does not push it, or stopped")
        self._free(self._book.quiesced(token, clean))

    def quiesced_by_wire(self, event: transfer.QuiescedByWire) -> None:
        """Decode says so itself, without a router."""
        if self._book.is_written_by(event.token, event.peer):
            self.quiesced(event.token, event.clean)

    def renew(self, tokens: tuple[GrantToken, ...]) -> None:
        self._book.renew(tokens)

    def _fail(self, record: GrantRecord, reason: str) -> None:
        prefix = self._prefixes[record.seq_id, record.attempt]
        self._give_up(prefix)
        self._go_on(prefix, "failed", reason)

    def _give_up(self, prefix: Prefix) -> None:
        """Its blocks go into quarantine, unless they are free already. To be followed by the report, and not the other way round: the
        router answers a `Cancel` by itself once it has heard that all is over."""
        assert prefix.grant is not None
        self._book.quarantine(prefix.grant.token, "given up")
        self._outbox.send(prefix.link, Cancel(prefix.grant.token, prefix.source, self._name))
        prefix.grant = None

    def _go_on(self, prefix: Prefix, outcome: PrefixOutcome, reason: str) -> None:
        self._report(prefix, outcome, reason)
        self.begun(prefix.key)
        self._engine.unpark(prefix.sequence)

    def _report(self, prefix: Prefix, outcome: PrefixOutcome, reason: str, num_tokens: int = 0, kv_bytes: int = 0) -> None:
        if outcome not in ("landed", "cached"):
            log.warning("%s: its prefix is not pushed from %s: %s", prefix.sequence.seq_id, prefix.source, reason)
        took_ms = (self._clock() - prefix.asked_at) * 1e3
        self._outbox.send(prefix.link, PrefixEnded(*prefix.key, outcome, reason, num_tokens, kv_bytes, took_ms))

    def _free(self, record: GrantRecord | None) -> None:
        """The record has left the book: nobody can write its blocks any more."""
        if record is not None:
            self._submit(transfer.Forget(record.token))
            self._pool.release(record.blocks)

    # ── pairs ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def open(self, frame: OpenPair) -> None:
        """A node that was restarted writes no more: what it had under way is given up at once."""
        agent = self.agents.get(frame.peer)
        if agent is not None and agent.peer_incarnation != frame.peer_incarnation:
            for prefix in list(self._prefixes.values()):
                if prefix.grant is not None and prefix.grant.agent_id == agent.agent_id:
                    self.failed(prefix.grant.token, f"{frame.peer} was restarted")
        self._submit(transfer.OpenPair(frame.peer, frame.peer_incarnation, frame.num_ranks))

    def opened(self, event: transfer.PairOpened) -> None:
        self.agents[event.peer] = event
        self._outbox.broadcast(PairAgent(event.peer, event.peer_incarnation, event.endpoints))

    def probed(self, event: transfer.PairProbed) -> None:
        self._outbox.broadcast(PairReady(event.peer, event.agent_id))

    def fenced(self, event: transfer.Fenced) -> None:
        """The agent is destroyed: nobody writes the blocks of its grants any more, and they are free."""
        agent = self.agents.get(event.peer)
        if agent is not None and agent.agent_id == event.agent_id:
            del self.agents[event.peer]
        for record in self._book.fenced(event.peer, event.agent_id):
            self._free(record)
            if record.state is GrantState.GRANTED:
                self._fail(record, f"the KV path from {event.peer} was fenced")

    # ── time and gauges ──────────────────────────────────────────────────────────────────────────────────────────────

    def tick(self) -> None:
        """Leases that ran out, agents to fence, and what nobody can begin for."""
        for record in self._book.expired():
            self._fail(record, f"no sign of life from {record.peer} for {record.lease_s:g} s")
        for peer, agent_id in self._book.overdue():
            log.warning("%s did not quiesce: fencing its agent", peer)
            self._submit(transfer.Fence(peer, agent_id))
        for prefix in self._in_the_way():
            log.warning("%s: its prefix is held no longer: others wait for blocks", prefix.sequence.seq_id)
            self._pool.release(prefix.held)
            prefix.held = []

    def _in_the_way(self) -> list[Prefix]:
        """When nothing runs, and what waits finds no blocks: what is held for others may be what the first one lacks."""
        if not self._engine.is_stalled:
            return []
        return [prefix for prefix in self._prefixes.values() if prefix.held and prefix.grant is None]

    def next_deadline(self) -> float | None:
        return self._clock() if self._in_the_way() else self._book.next_deadline()

    def holdings(self) -> Iterator[Holding]:
        return grant_holdings(self._book, "pool", self._clock())

    @property
    def blocks_granted(self) -> int:
        return self._book.blocks_granted

    @property
    def blocks_quarantined(self) -> int:
        return self._book.blocks_quarantined
