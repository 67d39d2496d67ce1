"""`Granting`: what a decode node has promised to prefill nodes, and the way from a grant to blocks in the pool.

Runs on the compute thread. Reserves blocks, names them in grants, holds what was given up in quarantine until nobody can write it,
and takes in what has landed. Knows nothing of frames: `DecodeRole` says what to promise, and tells the routers.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from disaggd.cluster.holdings import Holding
from disaggd.cluster.protocol import Grant
from disaggd.engine.engine import Engine
from disaggd.engine.sequence import Sequence
from disaggd.ids import AgentId, BlockId, GrantToken, NodeName, SeqId
from disaggd.roles.compute import LinkId
from disaggd.roles.gauges import Verified, grant_holdings
from disaggd.roles.landing import Copy, Landings
from disaggd.transfer import messages as transfer
from disaggd.transfer.grant import GrantBook, GrantRecord
from disaggd.transfer.landing_memory import LandingMemory
from disaggd.transfer.notification import FirstToken


@dataclass(slots=True)
class Placed:
    """A sequence that a router placed here."""

    link: LinkId
    sequence: Sequence
    grant: GrantToken | None = None
    """Out now; None again once it landed."""
    reserved: list[BlockId] = field(default_factory=list)
    """Blocks of the pool that wait for what the grant brings, where that lands elsewhere first."""
    prefix: list[BlockId] = field(default_factory=list)
    """Cached blocks that the grant leaves out, with a reference each, until the sequence runs in them or is given up."""

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
    peer: NodeName
    first: FirstToken
    copy: Copy
    landed_at: float


class Granting:
    """One decode node's grants. `submit` takes commands to the transfer thread; `clock` is monotonic seconds.

    `staging` is what peers write where they cannot write the engine's pool. `verify`: they have to send checksums.
    """

    def __init__(
        self,
        name: NodeName,
        engine: Engine,
        *,
        lease_s: float,
        quiesce_s: float,
        bytes_per_block: int,
        submit: Callable[[transfer.TransferCommand], None],
        clock: Callable[[], float],
        staging: LandingMemory | None = None,
        verify: bool = False,
    ) -> None:
        self.verified = Verified()
        self.book = GrantBook(quiesce_s, clock)
        self.agents: dict[NodeName, transfer.PairOpened] = {}
        """Our agent for each prefill node."""
        self.arrivals: list[Arrival] = []
        self.name = name
        """The node's."""
        self._engine = engine
        self._pool = engine.pool
        self._lease_s = lease_s
        self._verify = verify
        self._bytes_per_block = bytes_per_block
        self._submit = submit
        self._clock = clock
        self._landings = Landings(engine.pool, staging)
        self._is_staged = staging is not None

    @property
    def landings(self) -> Landings:
        """Where grants land, for who gives some of another kind."""
        return self._landings

    # ── promises ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def bytes_per_token(self) -> float:
        """Of KV."""
        return self._bytes_per_block / self._pool.block_size

    @property
    def max_tokens(self) -> int | None:
        """Tokens whose KV can land at once; None: as many as the pool holds."""
        return self._landings.max_tokens

    def has_room(self, placed: Placed, prefill: NodeName) -> bool:
        """Whether a grant for `prefill` could be given now."""
        return self._has_room(placed.sequence, self._engine.cache.find(placed.sequence), prefill)

    def can_land(self, placed: Placed) -> bool:
        """Whether what is not cached could land, however long one waits: what was cached at the decision may be evicted since."""
        num_missing = self._num_pushed(placed.sequence) - len(self._engine.cache.find(placed.sequence))
        return self.max_tokens is None or num_missing * self._pool.block_size <= self.max_tokens

    def grant(self, placed: Placed, prefill: NodeName) -> Grant | None:
        """Reserve blocks that `prefill` may write, for all that is not cached; None when there is no room, or no agent for it."""
        cached = self._engine.cache.find(placed.sequence)
        if not self._has_room(placed.sequence, cached, prefill):
            return None
        self._pool.take(cached)
        placed.prefix = cached
        agent = self.agents[prefill]
        num_pushed = self._num_pushed(placed.sequence) - len(cached)
        blocks, placed.reserved = self._landings.reserve(self._num_needed(placed.sequence) - len(cached), num_pushed)
        token = GrantToken(os.urandom(16))
        self.book.add(
            token,
            seq_id=placed.seq,
            attempt=placed.attempt,
            peer=prefill,
            agent_id=agent.agent_id,
            blocks=blocks,
            lease_s=self._lease_s,
        )
        placed.grant = token
        self._engine.end_earmark(placed.sequence)
        verify = tuple(blocks[:num_pushed]) if self._verify else ()
        self._submit(transfer.Expect(token, prefill, agent.agent_id, num_pushed, verify=verify))
        num_cached = len(cached) * self._pool.block_size
        return Grant(token, self.name, prefill, agent.agent_id, num_cached, tuple(blocks), self._lease_s, self._verify)

    def _has_room(self, sequence: Sequence, cached: list[BlockId], prefill: NodeName) -> bool:
        """Cached blocks that nobody holds are taken too: they are no room for others any more."""
        landing = self._num_pushed(sequence) - len(cached) + self._engine.blocks_earmarked_before(sequence)
        if prefill not in self.agents or not self._landings.has_room(landing):
            return False
        num_coming = self.book.num_granted + len(self.arrivals)
        need = self._num_needed(sequence) - len(cached) + self._pool.num_unheld(cached)
        return self._engine.room_for_grant(sequence, need, num_coming)

    def earmark(self, placed: Placed) -> None:
        """Its router waits no more: what comes free is kept for it, until it is granted or given up."""
        self._engine.earmark(placed.sequence, self._num_needed(placed.sequence))

    def withdraw(self, placed: Placed) -> None:
        """Take back a grant that nobody was given."""
        assert placed.grant is not None
        self.free(self.book.withdraw(placed.grant))
        self._unreserve(placed)
        placed.grant = None

    def give_up(self, placed: Placed, reason: str) -> GrantRecord | None:
        """The sequence ends here. Blocks that a prefill node may still write go into quarantine, not back to the pool.

        Returns the grant that is to be cancelled there, if one is out.
        """
        self._unreserve(placed)
        return None if placed.grant is None else self.book.quarantine(placed.grant, reason)

    def free(self, record: GrantRecord | None) -> None:
        """The record has left the book: nobody can write its blocks any more."""
        if record is not None:
            self._submit(transfer.Forget(record.token))
            self._landings.free(record.blocks)

    # ── landings ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def land(self, placed: Placed, record: GrantRecord, first: FirstToken) -> list[BlockId] | None:
        """All of the grant is in: its blocks, or None while they are copied into the pool (`take_arrivals`)."""
        placed.grant = None
        if not self._is_staged:
            return list(record.blocks)
        blocks, placed.reserved = placed.reserved, []
        self.arrivals.append(Arrival(placed, record.peer, first, self._landings.copy_in(record.blocks, blocks), self._clock()))
        return None

    def is_arriving(self, placed: Placed) -> bool:
        """It has landed, and is being copied."""
        return any(arrival.placed is placed for arrival in self.arrivals)

    def take_arrivals(self, is_wanted: Callable[[Placed], bool]) -> Iterator[tuple[Placed, list[BlockId], FirstToken]]:
        """What has been copied into the pool since; of what is wanted no more the blocks are free."""
        arrivals, self.arrivals = self.arrivals, []
        for arrival in arrivals:
            if not arrival.copy.is_done():
                self.arrivals.append(arrival)
                continue
            blocks = self._landings.copied(arrival.copy)
            if is_wanted(arrival.placed):
                yield arrival.placed, blocks, arrival.first
            else:
                self._pool.release(blocks)

    # ── pairs and gauges ─────────────────────────────────────────────────────────────────────────────────────────────

    def fenced(self, peer: NodeName, agent_id: AgentId) -> list[GrantRecord]:
        """The agent is destroyed: nobody writes the blocks of these grants any more, and they are free."""
        agent = self.agents.get(peer)
        if agent is not None and agent.agent_id == agent_id:
            del self.agents[peer]  # granted no more; `PairOpened` brings the next
        records = list(self.book.fenced(peer, agent_id))
        for record in records:
            self.free(record)
        return records

    @property
    def is_expecting(self) -> bool:
        """Whether grants are out, or in and being copied."""
        return bool(self.arrivals or self.book.num_granted)

    def holdings(self) -> Iterator[Holding]:
        """By grant; what has landed and is being copied into the pool is granted still."""
        yield from grant_holdings(self.book, "staging" if self._is_staged else "pool", self._clock())
        for arrival in self.arrivals:
            yield Holding(
                state="granted",
                memory="pool",
                blocks=tuple(arrival.copy.blocks),
                seq=arrival.placed.seq,
                attempt=arrival.placed.attempt,
                peer=arrival.peer,
                age_s=self._clock() - arrival.landed_at,
                reason="landed, and being copied into the pool",
            )

    @property
    def blocks_granted(self) -> int:
        """Of the pool."""
        return self._landings.num_reserved if self._is_staged else self.book.blocks_granted

    @property
    def blocks_quarantined(self) -> int:
        """Of the memory that peers write."""
        return self.book.blocks_quarantined

    @property
    def blocks_promised(self) -> int:
        """Of the pool: neither free nor a sequence's."""
        return self._landings.num_reserved if self._is_staged else self.book.blocks_granted + self.book.blocks_quarantined

    def _num_needed(self, sequence: Sequence) -> int:
        """Blocks for its tokens and the first one generated."""
        return self._pool.blocks_for(len(sequence.tokens) + 1)

    def _num_pushed(self, sequence: Sequence) -> int:
        return self._pool.blocks_for(len(sequence.tokens))

    def _unreserve(self, placed: Placed) -> None:
        self._landings.unreserve(placed.reserved)
        self._pool.release(placed.prefix)
        placed.reserved, placed.prefix = [], []
