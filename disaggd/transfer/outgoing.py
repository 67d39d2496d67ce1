"""`Outgoing`: the agents we write from, and the pushes under way. Runs on the transfer thread.

One local agent per peer node. A pair whose peer is out of reach loses its agent at once: destroying it ends every handle
of it for good (13 ms, and not a byte leaves after), so the source blocks can be used again.

What is pushed waits until it is computed, is loaded (`source.py`), and waits until that is done; then it is written. Pushes wait for
nothing of each other's but room to load to: whoever is told first has it first, and every write that ends makes some.
"""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from disaggd.ids import AgentId, BlockId, GrantToken, HandleId, NodeName
from disaggd.transfer.agent import Agent, NoAgent, PeerLost
from disaggd.transfer.checksum import Memory
from disaggd.transfer.messages import (
    BeginPush,
    ConnectPair,
    FinishPush,
    HandleDone,
    PairConnected,
    PairFailed,
    PushBlocks,
    PushEnded,
    QuiesceByWire,
    TransferEvent,
)
from disaggd.transfer.notification import Checksums, Connect, Piece, WireQuiesced, encode
from disaggd.transfer.pool import Pool
from disaggd.transfer.push import Loaded, Push
from disaggd.transfer.source import Load, Source

MAX_SUMMED_BYTES = 8 << 20
"""Of which checksums are taken in one turn, a write more or less: 4 ms in which nothing is polled. The rest waits for the next."""
PUSH_TIMEOUT_S = 30.0
LOOK_EVERY_S = 0.5
LONGEST_TURN_S = 1.0
"""A turn that took longer does not count as the peers' time: this process was stopped, or its machine slept."""


@dataclass(slots=True)
class _Pair:
    peer: NodeName
    remote_id: AgentId
    remote: Pool
    agent: Agent
    silent_s: float = 0.0
    """For so long no write to it has ended, while some were in flight."""


class _Flight(msgspec.Struct, frozen=True):
    """A posted handle."""

    pair: _Pair
    handle: HandleId
    push: Push
    source: tuple[BlockId, ...]
    load: Load
    kv_bytes: int


class Outgoing:
    """Connects pairs, posts writes and polls them to their ends. Posts to the compute thread.

    A pair with writes in flight of which none ends for `push_timeout_s` is lost: TCP alone holds a small write to a peer that hangs for
    ever, and its pusher would renew its lease as long.
    """

    def __init__(
        self,
        source: Source,
        rank: int,
        open_agent: Callable[[], Agent],
        post: Callable[[TransferEvent], None],
        clock: Callable[[], float],
        push_timeout_s: float = PUSH_TIMEOUT_S,
    ) -> None:
        self._source = source
        self._pool = source.pool
        self._memory = Memory(source.registered)
        self._rank = rank
        self._open_agent = open_agent
        self._post = post
        self._clock = clock
        self._push_timeout_s = push_timeout_s
        self._looked_at = clock()
        self._pairs: dict[NodeName, _Pair] = {}
        self._pushes: dict[GrantToken, Push] = {}
        self._flights: list[_Flight] = []
        self._is_short = False
        """Somebody was refused room to load to: until all have been asked again, in their order, nobody is given any."""
        self._summed_bytes = 0
        """Since the last turn began."""
        self.sent_bytes = 0

    @property
    def num_agents(self) -> int:
        return len(self._pairs)

    @property
    def is_in_flight(self) -> bool:
        return bool(self._flights)

    @property
    def is_waiting(self) -> bool:
        """Whether blocks are to be pushed that are not computed or loaded yet; only `poll` finds out when they are."""
        return any(push.waiting or push.loaded for push in self._pushes.values())

    # ── pairs ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def connect(self, command: ConnectPair) -> None:
        pair = self._pairs.get(command.peer)
        if pair is None or pair.remote_id != command.agent_id:
            self.close(command.peer)
            pair = self._build(command)
        if pair is not None and self._notify(pair, encode(Connect(command.agent_id))):
            self._post(PairConnected(command.peer, command.agent_id))

    def quiesce_by_wire(self, command: QuiesceByWire) -> None:
        if pair := self._pairs.get(command.peer):
            self._notify(pair, encode(WireQuiesced(command.token, command.clean)))

    def close(self, peer: NodeName) -> None:
        """Destroy the pair's agent; its handles end here, unclean, and its pushes with them."""
        pair = self._pairs.pop(peer, None)
        if pair is None:
            return
        pair.agent.destroy()
        pair.agent.port.release()
        ended = [flight for flight in self._flights if flight.pair is pair]
        self._flights = [flight for flight in self._flights if flight.pair is not pair]
        for push in self._pushes_of(pair):
            push.lose_pair()
        for flight in ended:
            self._end(flight, None)
        for push in self._pushes_of(pair):
            self._settle(push)

    def close_all(self) -> None:
        for peer in list(self._pairs):
            self.close(peer)

    def _build(self, command: ConnectPair) -> _Pair | None:
        remote = Pool(command.place, self._pool.kv)
        if not remote.can_be:
            self._post(PairFailed(command.peer, command.agent_id, f"no pool lies at {command.place}"))
            return None
        try:
            agent = self._open_agent()
        except NoAgent as error:
            self._post(PairFailed(command.peer, command.agent_id, str(error)))
            return None
        pair = _Pair(command.peer, command.agent_id, remote, agent)
        self._pairs[command.peer] = pair
        try:
            pair.agent.connect(command.agent_id, command.metadata, remote)
        except PeerLost as error:
            reason = str(error)
        else:
            return pair
        self._lose(pair, reason)
        return None

    def _notify(self, pair: _Pair, message: bytes) -> bool:
        try:
            pair.agent.notify(message)
        except PeerLost as error:
            reason = str(error)
        else:
            return True
        self._lose(pair, reason)
        return False

    def _lose(self, pair: _Pair, reason: str) -> None:
        self.close(pair.peer)
        self._post(PairFailed(pair.peer, pair.remote_id, reason))

    # ── pushes ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, command: BeginPush) -> None:
        push = Push(
            token=command.token,
            peer=command.peer,
            agent_id=command.agent_id,
            lease_s=command.lease_s,
            lease_until=self._clock() + command.lease_s,
            verify=command.verify,
        )
        self._pushes[command.token] = push
        pair = self._pairs.get(command.peer)
        if pair is None or pair.remote_id != command.agent_id:
            push.drain()
            self._settle(push)

    def push_blocks(self, command: PushBlocks) -> None:
        push = self._live(command.token)
        if push is None:
            self._post(HandleDone(command.token, command.source, 0))
            return
        pair = self._pairs[push.peer]
        assert len(command.source) == len(command.target) and self._pool.holds(command.source)
        if not pair.remote.holds(command.target):
            # The target ids came over the wire: a write outside the peer's pool must not be posted.
            self._post(HandleDone(command.token, command.source, 0))
            self.cancel(command.token)
            return
        push.waiting.append(command)
        self._advance(push)

    def finish(self, command: FinishPush) -> None:
        if push := self._live(command.token):
            push.waiting.append(command)
            self._advance(push)

    def renew(self, token: GrantToken) -> None:
        if push := self._pushes.get(token):
            push.renew(self._clock())

    def cancel(self, token: GrantToken) -> None:
        if push := self._pushes.get(token):
            push.drain()
            self._settle(push)

    def poll(self) -> None:
        """Move bytes, end what has ended, and let pushes whose lease has run out drain."""
        for pair in list(self._pairs.values()):
            pair.agent.notifications()  # nobody writes to these agents; the call lets their own messages out
        for flight in list(self._flights):
            self._poll(flight)
        self._lose_silent_pairs()
        self._is_short = False
        self._summed_bytes = 0
        for push in list(self._pushes.values()):
            self._expire(push)
            self._advance(push)

    def _lose_silent_pairs(self) -> None:
        now = self._clock()
        passed_s = now - self._looked_at
        if passed_s < LOOK_EVERY_S:
            return
        self._looked_at = now
        in_flight = {flight.pair.peer for flight in self._flights}
        for pair in list(self._pairs.values()):
            pair.silent_s = pair.silent_s + min(passed_s, LONGEST_TURN_S) if pair.peer in in_flight else 0.0
            if pair.silent_s >= self._push_timeout_s:
                self._lose(pair, f"no write to it has ended for {self._push_timeout_s:g} s")

    def _live(self, token: GrantToken) -> Push | None:
        """The push, if it may post now."""
        push = self._pushes.get(token)
        if push is None:
            return None
        self._expire(push)
        return push if push.may_post else None

    def _expire(self, push: Push) -> None:
        push.expire(self._clock())
        self._settle(push)

    def _advance(self, push: Push) -> None:
        """Obey in order what waits, as far as can be now. Any write may lose the pair, and end the push by that."""
        self._load(push)
        while push.may_post and push.loaded and push.loaded[0].load.is_ready() and self._summed_bytes < MAX_SUMMED_BYTES:
            self._write(push, push.loaded[0])
        if push.waiting and not push.loaded and isinstance(command := push.waiting[0], FinishPush):
            push.expire(self._clock())
            if push.may_post:
                push.waiting.popleft()
                self._send_last(push, command)
        self._settle(push)

    def _load(self, push: Push) -> None:
        """Load what is computed, as far as there is room."""
        while push.waiting and isinstance(command := push.waiting[0], PushBlocks) and not self._is_short and command.is_ready():
            load = self._source.load(command.layers, command.source)
            if load is None:
                self._is_short = True
                return
            push.waiting.popleft()
            push.loaded.append(Loaded(command, load))

    def _send_last(self, push: Push, command: FinishPush) -> None:
        """It travels behind what the pair has in flight, others' bytes too: it has gone out when those have arrived."""
        pair = self._pairs[push.peer]
        seq = push.finish({flight.handle for flight in self._flights if flight.pair is pair})
        piece = Piece(push.token, self._rank, seq, 0, total=seq + 1, first=command.first)
        self._notify(pair, encode(piece))

    def _write(self, push: Push, loaded: Loaded) -> None:
        """Post it, unless the lease has run out by the time that nothing is left to do but that.

        A process that was stopped, or whose machine slept, wakes up anywhere: the later it looks at the clock, the less it may write
        into a grant that was given up meanwhile. What is posted all the same, only the target's fence keeps out.
        """
        command, load = loaded.command, loaded.load
        pair = self._pairs[push.peer]
        kv_bytes = self._pool.bytes_of(command.layers, len(command.source))
        piece = Piece(push.token, self._rank, push.num_pieces, kv_bytes, sums=self._checksums(loaded) if push.verify else None)
        handle = pair.agent.prepare(load.indices, pair.remote.indices(command.layers, command.target), encode(piece))
        flight = _Flight(pair, handle, push, command.source, load, kv_bytes)
        now = self._clock()
        push.expire(now)
        if not push.may_post:
            pair.agent.discard(handle)
            return
        push.posted(now)
        push.loaded.popleft()
        self._flights.append(flight)
        try:
            pair.agent.post(handle)
        except PeerLost as error:
            reason = str(error)
        else:
            return
        self._lose(pair, reason)

    def _checksums(self, loaded: Loaded) -> Checksums:
        """Of what the write will read, where it reads it."""
        command = loaded.command
        self._summed_bytes += self._pool.bytes_of(command.layers, len(command.source))
        crcs = self._memory.checksums(loaded.load.indices, len(command.source))
        return Checksums(command.layers.start, len(command.layers), command.target, crcs)

    def _poll(self, flight: _Flight) -> None:
        if self._pairs.get(flight.pair.peer) is not flight.pair:
            return  # lost in this very turn, and ended with its pair
        try:
            is_done = flight.pair.agent.poll(flight.handle)
        except PeerLost as error:
            reason = str(error)
        else:
            if is_done:
                self._flights.remove(flight)
                self._end(flight, flight.kv_bytes)
            return
        self._lose(flight.pair, reason)

    def _end(self, flight: _Flight, kv_bytes: int | None) -> None:
        flight.pair.silent_s = 0.0
        self._source.unload(flight.load)
        flight.push.ended(kv_bytes, self._clock())
        self.sent_bytes += kv_bytes or 0
        self._post(HandleDone(flight.push.token, flight.source, kv_bytes or 0))
        self._settle(flight.push)
        for push in self._pushes_of(flight.pair):
            if flight.handle in push.behind:
                push.behind.discard(flight.handle)
                self._settle(push)

    def _pushes_of(self, pair: _Pair) -> list[Push]:
        return [push for push in self._pushes.values() if push.agent_id == pair.remote_id]

    def _settle(self, push: Push) -> None:
        if not push.may_post:
            self._give_up_waiting(push)
        if not push.settle():
            return
        del self._pushes[push.token]
        self._post(
            PushEnded(
                token=push.token,
                clean=push.clean,
                finished=push.finished,
                kv_bytes=push.kv_bytes,
                first_post_at=push.first_post_at,
                last_done_at=push.last_done_at,
            )
        )

    def _give_up_waiting(self, push: Push) -> None:
        """Nothing is written of these blocks. What still computes them does so before whatever the same device is asked next; what
        still loads them brings what nobody reads."""
        while push.loaded:
            self._let_go(push.loaded.popleft())
        while push.waiting:
            command = push.waiting.popleft()
            if isinstance(command, PushBlocks):
                self._post(HandleDone(command.token, command.source, 0))

    def _let_go(self, loaded: Loaded) -> None:
        self._source.unload(loaded.load)
        self._post(HandleDone(loaded.command.token, loaded.command.source, 0))
