"""`Push`: the writes of one grant, as the sending node counts them. Runs on the transfer thread; pure, knows no NIXL.

ACTIVE ─► DONE                  finished, and every handle has ended
ACTIVE ─► DRAINING ─► DONE      cancelled, lease run out or pair lost: nothing more is posted, handles are polled out
"""

import enum
from collections import deque

import msgspec

from disaggd.ids import AgentId, GrantToken, HandleId, NodeName
from disaggd.transfer.messages import FinishPush, Leg, PushBlocks, Sent
from disaggd.transfer.source import Load, Source


class PushState(enum.Enum):
    ACTIVE = "active"
    DRAINING = "draining"
    DONE = "done"


MOVES: dict[PushState, frozenset[PushState]] = {
    PushState.ACTIVE: frozenset({PushState.DRAINING, PushState.DONE}),
    PushState.DRAINING: frozenset({PushState.DONE}),
    PushState.DONE: frozenset(),
}


class Write(msgspec.Struct):
    """A command to write blocks, which is a write to each rank of the peer that has a part in them."""

    command: PushBlocks
    num_parts: int
    """That have not ended."""
    kv_bytes: int = 0
    """Of those that ended DONE."""

    def ended(self, kv_bytes: int) -> bool:
        """A part of it has, DONE with that many bytes, or else with 0: whether it was the last one."""
        self.num_parts -= 1
        self.kv_bytes += kv_bytes
        return not self.num_parts


class Part(msgspec.Struct, frozen=True):
    """What of a command goes to one rank of the peer."""

    write: Write
    lane: int
    """Which of the pair's (`outlet.py`)."""


class Loaded(msgspec.Struct, frozen=True):
    """Blocks on their way to where a write finds them, or there."""

    part: Part
    source: Source
    load: Load

    def unload(self) -> None:
        self.source.unload(self.load)


class Tally(msgspec.Struct):
    """Of a push's handles over one leg."""

    first_post_at: float
    last_done_at: float | None = None
    kv_bytes: int = 0


class Push(msgspec.Struct, kw_only=True):
    """Counts handles from post to end. Times are seconds of one clock, passed in by the caller."""

    token: GrantToken
    peer: NodeName
    agent_id: AgentId
    lease_s: float
    lease_until: float
    verify: bool = False
    """Its pieces have checksums."""
    state: PushState = PushState.ACTIVE
    num_pieces: dict[int, int] = msgspec.field(default_factory=dict)
    """Numbered so far, by the rank of the peer that they go to: posted handles, and the last one that is no write, once finished."""
    num_in_flight: int = 0
    finished: bool = False
    clean: bool = True
    """No handle has ended otherwise than DONE."""
    legs: dict[Leg, Tally] = msgspec.field(default_factory=dict)
    """Over which something was posted."""
    waiting: deque[Part | FinishPush] = msgspec.field(default_factory=deque)
    """Commands in order, the first of which writes blocks that are not computed yet or have nowhere to be loaded to."""
    loaded: deque[Loaded] = msgspec.field(default_factory=deque)
    """Commands before those, to be written in order."""
    behind: set[HandleId] = msgspec.field(default_factory=set)
    """Handles, others' too, that must end before the last piece can arrive. Until then the push is not over, and its lease is renewed:
    on a slow wire that may be long after its own handles have ended."""

    def renew(self, now: float) -> None:
        """The lease starts anew, if it has not run out: an expired one was given up by the receiver too."""
        if now < self.lease_until:
            self.lease_until = now + self.lease_s

    def expire(self, now: float) -> None:
        """Drain if the lease has run out. A finished push posts nothing more, so it needs no lease."""
        if not self.finished and now >= self.lease_until:
            self.drain()

    @property
    def may_post(self) -> bool:
        """Whether a handle may be posted, given that `expire` was asked just now."""
        return self.state is PushState.ACTIVE and not self.finished

    def number(self, rank: int) -> int:
        """Of the next piece that goes to that rank of the peer."""
        seq = self.num_pieces.get(rank, 0)
        self.num_pieces[rank] = seq + 1
        return seq

    @property
    def kv_bytes(self) -> int:
        return sum(tally.kv_bytes for tally in self.legs.values())

    @property
    def first_post_at(self) -> float | None:
        return min((tally.first_post_at for tally in self.legs.values()), default=None)

    @property
    def last_done_at(self) -> float | None:
        return max((tally.last_done_at for tally in self.legs.values() if tally.last_done_at is not None), default=None)

    @property
    def sent(self) -> tuple[Sent, ...]:
        """Over each leg on which a handle ended DONE, in order of the peer's ranks."""
        legs = sorted(self.legs.items(), key=lambda item: item[0].target_rank)
        return tuple(
            Sent(leg, tally.kv_bytes, tally.first_post_at, tally.last_done_at) for leg, tally in legs if tally.last_done_at is not None
        )

    def posted(self, leg: Leg, now: float) -> None:
        """A handle is about to be posted."""
        assert self.may_post and now < self.lease_until
        self.num_in_flight += 1
        self.legs.setdefault(leg, Tally(now))

    def ended(self, leg: Leg, kv_bytes: int | None, now: float) -> None:
        """A posted handle ended: DONE with that many bytes, or with an exception (None)."""
        assert self.num_in_flight > 0
        self.num_in_flight -= 1
        if kv_bytes is None:
            self.clean = False
            return
        tally = self.legs[leg]
        tally.kv_bytes += kv_bytes
        tally.last_done_at = now

    def finish(self, behind: set[HandleId]) -> None:
        """The last pieces are about to be sent, behind those handles. Nothing is posted after them."""
        assert self.may_post
        self.finished = True
        self.behind = behind

    def drain(self) -> None:
        """Post nothing more."""
        if self.state is PushState.ACTIVE:
            self._move(PushState.DRAINING)

    def lose_pair(self) -> None:
        """Nothing more goes out: neither handles nor a last piece that is behind some."""
        self.finished = self.finished and not self.behind
        self.drain()

    def settle(self) -> bool:
        """Whether the push is over with this: nothing is in flight and nothing more will be."""
        has_more = self.state is PushState.ACTIVE and (not self.finished or self.behind)
        if self.num_in_flight or self.state is PushState.DONE or has_more:
            return False
        self._move(PushState.DONE)
        return True

    def _move(self, state: PushState) -> None:
        assert state in MOVES[self.state], f"a push that is {self.state.value} cannot become {state.value}"
        self.state = state
