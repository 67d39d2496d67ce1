"""`GrantBook`: every grant this node has given out, and what may still be written where. Runs on the compute thread.

Knows nothing of NIXL, links or sequences; time comes from an injected clock. A grant's life:

    GRANTED ─► LANDED                       the whole of it is in: its blocks are the sequence's
    GRANTED ─► FREED                        withdrawn before any prefill heard of it, or its agent was fenced
    GRANTED ─► QUARANTINED ─► FREED         given up: nobody may use the blocks until no late write can reach them

Only a clean quiesce or a fence frees quarantined blocks: neither the peer's death nor a deadline does. Landed and freed
grants leave the book, so late messages about them are harmless.
"""

import enum
from collections.abc import Callable, Iterable, Iterator

import msgspec

from disaggd.ids import AgentId, BlockId, GrantToken, NodeName, SeqId


class GrantState(enum.Enum):
    GRANTED = "granted"
    QUARANTINED = "quarantined"
    LANDED = "landed"
    FREED = "freed"


MOVES: dict[GrantState, frozenset[GrantState]] = {
    GrantState.GRANTED: frozenset({GrantState.LANDED, GrantState.QUARANTINED, GrantState.FREED}),
    GrantState.QUARANTINED: frozenset({GrantState.FREED}),
    GrantState.LANDED: frozenset(),
    GrantState.FREED: frozenset(),
}


class GrantRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One grant as it stands; a move makes a new record."""

    token: GrantToken
    seq_id: SeqId
    attempt: int
    peer: NodeName
    """The prefill node that may write."""
    agent_id: AgentId
    """Our agent at which it writes."""
    blocks: tuple[BlockId, ...]
    lease_s: float
    since: float
    """When it came into its state."""
    deadline: float
    """GRANTED: when the lease runs out. QUARANTINED: when the wait for a quiesce ends."""
    state: GrantState = GrantState.GRANTED
    reason: str | None = None
    """Why it was quarantined."""


class GrantBook:
    """The grants of one decode pool. Times are seconds of `clock`."""

    def __init__(self, quiesce_s: float, clock: Callable[[], float]) -> None:
        self._quiesce_s = quiesce_s
        self._clock = clock
        self._records: dict[GrantToken, GrantRecord] = {}
        self._fencing: set[AgentId] = set()

    def add(
        self,
        token: GrantToken,
        *,
        seq_id: SeqId,
        attempt: int,
        peer: NodeName,
        agent_id: AgentId,
        blocks: Iterable[BlockId],
        lease_s: float,
    ) -> GrantRecord:
        """A grant goes out; its lease starts now."""
        assert token not in self._records, "a grant token is never used twice"
        now = self._clock()
        record = GrantRecord(
            token=token,
            seq_id=seq_id,
            attempt=attempt,
            peer=peer,
            agent_id=agent_id,
            blocks=tuple(blocks),
            lease_s=lease_s,
            since=now,
            deadline=now + lease_s,
        )
        self._records[token] = record
        return record

    def __iter__(self) -> Iterator[GrantRecord]:
        """Those that are GRANTED or QUARANTINED."""
        return iter(self._records.values())

    def get(self, token: GrantToken) -> GrantRecord | None:
        """The grant, while it is GRANTED or QUARANTINED."""
        return self._records.get(token)

    def is_written_by(self, token: GrantToken, peer: NodeName) -> bool:
        """Whether that peer may write the grant: only then is it the peer's to say that nothing more will be written."""
        record = self._records.get(token)
        return record is not None and record.peer == peer

    def landed(self, token: GrantToken) -> GrantRecord | None:
        """The grant is in and leaves the book: its blocks are the sequence's. None if it was given up before."""
        return self._leave(token, GrantState.LANDED) if self._is(token, GrantState.GRANTED) else None

    def withdraw(self, token: GrantToken) -> GrantRecord | None:
        """Take back a grant that no prefill node has heard of; it leaves the book, its blocks are free at once."""
        return self._leave(token, GrantState.FREED) if self._is(token, GrantState.GRANTED) else None

    def renew(self, tokens: Iterable[GrantToken]) -> None:
        """These grants' prefills are alive: their leases start anew. A quarantined grant does not come back."""
        now = self._clock()
        for token in tokens:
            if self._is(token, GrantState.GRANTED):
                record = self._records[token]
                self._records[token] = msgspec.structs.replace(record, deadline=now + record.lease_s)

    def quarantine(self, token: GrantToken, reason: str) -> GrantRecord | None:
        """Give the grant up: its blocks wait for `quiesced` or `fenced`. None if there was nothing (left) to give up."""
        if not self._is(token, GrantState.GRANTED):
            return None
        record = self._moved(token, GrantState.QUARANTINED)
        now = self._clock()
        record = msgspec.structs.replace(record, since=now, deadline=now + self._quiesce_s, reason=reason)
        self._records[token] = record
        return record

    def quiesced(self, token: GrantToken, clean: bool) -> GrantRecord | None:
        """The prefill writes no more. Clean: the grant leaves the book and its blocks are free.

        Not clean: bytes may be under way still, so the agent must be fenced, now (`overdue` names it). Nothing happens
        to a grant that was not given up: `quarantine` it first. Returns the grant if it was freed.
        """
        if not self._is(token, GrantState.QUARANTINED):
            return None
        if clean:
            return self._leave(token, GrantState.FREED)
        self._records[token] = msgspec.structs.replace(self._records[token], deadline=self._clock())
        return None

    def expired(self) -> list[GrantRecord]:
        """Grants whose lease has run out: to be quarantined."""
        now = self._clock()
        return [record for record in self._in(GrantState.GRANTED) if record.deadline <= now]

    def overdue(self) -> list[tuple[NodeName, AgentId]]:
        """Agents to fence, each named once: a quarantined grant of theirs was not quiesced in time, or not clean."""
        now = self._clock()
        agents = {record.agent_id: record.peer for record in self._awaiting_quiesce() if record.deadline <= now}
        self._fencing.update(agents)
        return [(peer, agent_id) for agent_id, peer in agents.items()]

    def fenced(self, peer: NodeName, agent_id: AgentId) -> list[GrantRecord]:
        """The agent is gone, so nothing can land at it: its grants leave the book and their blocks are free.

        The returned records show the state before: GRANTED ones were not given up yet, their sequences need a new try.
        """
        self._fencing.discard(agent_id)
        tokens = [record.token for record in self._records.values() if record.agent_id == agent_id]
        return [self._leave(token, GrantState.FREED) for token in tokens]

    def next_deadline(self) -> float | None:
        """When `expired` or `overdue` will next have something to say."""
        deadlines = [record.deadline for record in (*self._in(GrantState.GRANTED), *self._awaiting_quiesce())]
        return min(deadlines, default=None)

    @property
    def num_granted(self) -> int:
        return len(self._in(GrantState.GRANTED))

    @property
    def blocks_granted(self) -> int:
        return sum(len(record.blocks) for record in self._in(GrantState.GRANTED))

    @property
    def blocks_quarantined(self) -> int:
        return sum(len(record.blocks) for record in self._in(GrantState.QUARANTINED))

    def _in(self, state: GrantState) -> list[GrantRecord]:
        return [record for record in self._records.values() if record.state is state]

    def _awaiting_quiesce(self) -> list[GrantRecord]:
        """Quarantined grants whose agent is not being fenced already."""
        return [record for record in self._in(GrantState.QUARANTINED) if record.agent_id not in self._fencing]

    def _is(self, token: GrantToken, state: GrantState) -> bool:
        record = self._records.get(token)
        return record is not None and record.state is state

    def _moved(self, token: GrantToken, state: GrantState) -> GrantRecord:
        record = self._records[token]
        assert state in MOVES[record.state], f"a {record.state.value} grant cannot become {state.value}"
        return msgspec.structs.replace(record, state=state)

    def _leave(self, token: GrantToken, state: GrantState) -> GrantRecord:
        """The record as it stood before its last move, to LANDED or FREED; the book forgets it."""
        self._moved(token, state)
        return self._records.pop(token)
