"""`PatternIntake`: blocks that are granted for a pattern, and compared with it once it has landed. Runs on the compute thread.

    CheckPair ─► PatternGrant ─► Landed ─► (on a GPU: copied into the pool) ─► compared: PatternRead
             └─► no room                └─► lease run out, quiesced, fenced: PatternRead says so

A pattern's grant is one as any other, for as long as a moment: blocks that the peer may still write are quarantined, and only a clean
quiesce or a fence frees them. It takes none that others wait for.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from disaggd.cluster.check_frames import CheckPair, CheckStep, PatternGrant, PatternRead, RankRead
from disaggd.cluster.holdings import Holding
from disaggd.cluster.protocol import Cancel, Grant
from disaggd.engine.engine import Engine
from disaggd.ids import BlockId, GrantToken, NodeName, SeqId
from disaggd.roles.compute import LinkId, Outbox
from disaggd.roles.gauges import grant_holdings
from disaggd.roles.landing import Copy, Landings
from disaggd.transfer import messages as transfer
from disaggd.transfer.grant import GrantBook, GrantRecord, GrantState
from disaggd.transfer.pattern import Mismatch

log = logging.getLogger(__name__)

NO_ROOM = "no blocks are free for it"


class Patterns(Protocol):
    """The pool's memory, on all ranks: `engine/patterns.py`, or a test's."""

    def fill(self, blocks: Sequence[BlockId], salt: int) -> None:
        """Write the pattern into `blocks`, in their order."""

    def compare(self, blocks: Sequence[BlockId], num_tokens: int, salt: int) -> Sequence[Mismatch | None]:
        """By rank what is not the pattern's first `num_tokens` in `blocks`; None where all is."""


@dataclass(slots=True)
class Expected:
    """A pattern that is to land."""

    link: LinkId
    check: int
    num_tokens: int
    salt: int
    reserved: list[BlockId]
    """Blocks of the pool that wait for it, where it lands elsewhere first."""


class PatternIntake:
    """One node's. `submit` takes commands to the transfer thread; `clock` is monotonic seconds.

    `agents` are ours for each node that may write here; `landings` are the node's own, as for all its grants.
    """

    def __init__(
        self,
        name: NodeName,
        engine: Engine,
        *,
        patterns: Patterns | None,
        landings: Landings,
        agents: Mapping[NodeName, transfer.PairOpened],
        lease_s: float,
        quiesce_s: float,
        outbox: Outbox,
        submit: Callable[[transfer.TransferCommand], None],
        clock: Callable[[], float],
    ) -> None:
        self._name = name
        self._engine = engine
        self._patterns = patterns
        self._landings = landings
        self._agents = agents
        self._lease_s = lease_s
        self._outbox = outbox
        self._submit = submit
        self._clock = clock
        self._book = GrantBook(quiesce_s, clock)
        self._expected: dict[GrantToken, Expected] = {}
        """By grants that are neither landed nor given up."""
        self._arrivals: list[tuple[Expected, Copy]] = []

    def ask(self, link: LinkId, frame: CheckPair) -> None:
        """Grant blocks for a pattern, if that can be."""
        agent = self._agents.get(frame.peer)
        num_blocks = self._engine.pool.blocks_for(frame.num_tokens)
        if self._patterns is None:
            self._report(link, frame.check, "no_room", "this node has no memory that could be looked at")
        elif agent is None or agent.agent_id != frame.agent_id:
            self._report(link, frame.check, "failed", f"{self._name} has another agent for {frame.peer} by now")
        elif not self._has_room(num_blocks):
            self._report(link, frame.check, "no_room", f"{self._name}: {NO_ROOM}")
        else:
            self._grant(link, frame, num_blocks)

    def _has_room(self, num_blocks: int) -> bool:
        return self._engine.pool.room_for_grant(num_blocks, self._engine.num_running) and self._landings.has_room(num_blocks)

    def _grant(self, link: LinkId, frame: CheckPair, num_blocks: int) -> None:
        blocks, reserved = self._landings.reserve(num_blocks, num_blocks)
        token = GrantToken(os.urandom(16))
        self._book.add(
            token,
            seq_id=SeqId(f"check-{frame.check}"),
            attempt=0,
            peer=frame.peer,
            agent_id=frame.agent_id,
            blocks=blocks,
            lease_s=self._lease_s,
        )
        self._expected[token] = Expected(link, frame.check, frame.num_tokens, frame.salt, reserved)
        self._submit(transfer.Expect(token, frame.peer, frame.agent_id, num_blocks, brings_token=False))
        grant = Grant(token, self._name, frame.peer, frame.agent_id, 0, tuple(blocks), self._lease_s)
        self._outbox.send(link, PatternGrant(frame.check, grant))

    # ── what becomes of a grant ──────────────────────────────────────────────────────────────────────────────────────

    def knows(self, token: GrantToken) -> bool:
        """Whether it is a grant for a pattern, out or given up."""
        return self._book.get(token) is not None

    def landed(self, token: GrantToken) -> None:
        """All of it is in: it is compared, once it is in the pool."""
        record = self._book.landed(token)
        if record is None:  # given up meanwhile; but all of it is in, so nothing more will be written
            return self._free(self._book.quiesced(token, clean=True))
        expected = self._expected.pop(token)
        if not self._landings.is_staged:
            return self._compare(expected, list(record.blocks))
        self._arrivals.append((expected, self._landings.copy_in(record.blocks, expected.reserved)))
        return None

    def failed(self, token: GrantToken, reason: str) -> None:
        """The push comes to nothing; nothing happens if it was given up before."""
        record = self._book.get(token)
        if record is not None and record.state is GrantState.GRANTED:
            self._give_up(record, reason)

    def quiesced(self, token: GrantToken, clean: bool) -> None:
        """The writer writes no more. If it was not asked to stop, what has not landed by now never will."""
        self.failed(token, "the writer does not push it, or stopped")
        self._free(self._book.quiesced(token, clean))

    def quiesced_by_wire(self, token: GrantToken, clean: bool, peer: NodeName) -> None:
        """The writer says so itself, without a router."""
        if self._book.is_written_by(token, peer):
            self.quiesced(token, clean)

    def fenced(self, event: transfer.Fenced) -> None:
        """The agent is destroyed: nobody writes the blocks of its grants any more, and they are free."""
        for record in self._book.fenced(event.peer, event.agent_id):
            self._free(record)
            if record.state is GrantState.GRANTED:
                self._end(record, f"the KV path from {event.peer} was fenced")

    def renew(self, tokens: tuple[GrantToken, ...]) -> None:
        self._book.renew(tokens)

    def _compare(self, expected: Expected, blocks: list[BlockId]) -> None:
        assert self._patterns is not None
        found = self._patterns.compare(blocks, expected.num_tokens, expected.salt)
        self._engine.pool.release(blocks)
        reads = (
            RankRead(rank, wrong.heads, str(wrong)) if wrong is not None else RankRead(rank, (), "") for rank, wrong in enumerate(found)
        )
        self._report(expected.link, expected.check, "done", "", tuple(reads))

    def _give_up(self, record: GrantRecord, reason: str) -> None:
        """Its blocks go into quarantine. The `Cancel` first: the router answers one by itself once it has heard that all is over."""
        self._book.quarantine(record.token, reason)
        self._outbox.send(self._expected[record.token].link, Cancel(record.token, record.peer, self._name))
        self._end(record, reason)

    def _end(self, record: GrantRecord, reason: str) -> None:
        expected = self._expected.pop(record.token)
        self._landings.unreserve(expected.reserved)
        self._report(expected.link, expected.check, "failed", reason)

    def _report(self, link: LinkId, check: int, step: CheckStep, reason: str, reads: tuple[RankRead, ...] = ()) -> None:
        self._outbox.send(link, PatternRead(check, step, reason, reads))

    def _free(self, record: GrantRecord | None) -> None:
        """The record has left the book: nobody can write its blocks any more."""
        if record is not None:
            self._submit(transfer.Forget(record.token))
            self._landings.free(record.blocks)

    # ── time and gauges ──────────────────────────────────────────────────────────────────────────────────────────────

    def tick(self) -> None:
        """Patterns that are in the pool by now, leases that ran out, agents to fence."""
        arrivals, self._arrivals = self._arrivals, []
        for expected, copy in arrivals:
            if copy.is_done():
                self._compare(expected, self._landings.copied(copy))
            else:
                self._arrivals.append((expected, copy))
        for record in self._book.expired():
            self._give_up(record, f"no sign of life from {record.peer} for {record.lease_s:g} s")
        for peer, agent_id in self._book.overdue():
            log.warning("%s did not quiesce: fencing its agent", peer)
            self._submit(transfer.Fence(peer, agent_id))

    @property
    def is_arriving(self) -> bool:
        """Whether something is being copied into the pool, of whose end only `tick` learns."""
        return bool(self._arrivals)

    def next_deadline(self) -> float | None:
        return self._book.next_deadline()

    def holdings(self) -> Iterator[Holding]:
        yield from grant_holdings(self._book, "staging" if self._landings.is_staged else "pool", self._clock())

    @property
    def blocks_granted(self) -> int:
        """Of the pool, beside those that `landings` counts."""
        return 0 if self._landings.is_staged else self._book.blocks_granted

    @property
    def blocks_quarantined(self) -> int:
        """Of the memory that peers write."""
        return self._book.blocks_quarantined

    @property
    def blocks_promised(self) -> int:
        """Of the pool, beside those that `landings` counts: neither free nor a sequence's."""
        return 0 if self._landings.is_staged else self._book.blocks_granted + self._book.blocks_quarantined
