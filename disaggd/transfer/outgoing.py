"""`Outgoing`: the agents we write from, and the pushes under way. Runs on the transfer thread.

One local agent per peer node, with a lane to each rank of it that some of our heads go to (`outlet.py`). A pair whose peer is out of reach
loses its agent at once: destroying it ends every handle of it for good (13 ms, and not a byte leaves after), so the source blocks can
be used again.

What is pushed waits until it is computed, is loaded (`source.py`), and waits until that is done; then it is written. Pushes wait for
nothing of each other's but room to load to: whoever is told first has it first, and every write that ends makes some.
"""

from collections.abc import Callable

import msgspec

from disaggd.errors import ConfigError
from disaggd.ids import GrantToken, HandleId, NodeName
from disaggd.pulse import Pulse
from disaggd.transfer.agent import Agent, NoAgent, PeerLost
from disaggd.transfer.connecting import Connections
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
from disaggd.transfer.notification import AnyNotification, Checksums, Connect, FirstToken, Piece, WireQuiesced, encode
from disaggd.transfer.outlet import Lane, Outlet, lanes_to
from disaggd.transfer.push import Loaded, Part, Push, Write
from disaggd.transfer.source import Load, Sources

MAX_WORKED_BYTES = 8 << 20
"""Of which checksums are taken, or blocks made, in one turn, a write more or less: 4 ms in which nothing is polled. The rest waits for the
next, so that what is posted moves meanwhile."""
PUSH_TIMEOUT_S = 30.0
LOOK_EVERY_S = 0.5
LONGEST_TURN_S = 1.0
"""A turn that took longer does not count as the peers' time: this process was stopped, or its machine slept."""


class _Flight(msgspec.Struct, frozen=True):
    """A posted handle."""

    pair: Outlet
    lane: Lane
    handle: HandleId
    push: Push
    write: Write
    load: Load
    kv_bytes: int


class Outgoing:
    """Connects pairs, posts writes and polls them to their ends. Posts to the compute thread.

    A pair with writes in flight to a rank of which none ends for `push_timeout_s` is lost: TCP alone holds a small write to a peer that
    hangs for ever, and its pusher would renew its lease as long.
    """

    def __init__(
        self,
        sources: Sources,
        open_agent: Callable[[], Agent],
        post: Callable[[TransferEvent], None],
        clock: Callable[[], float],
        push_timeout_s: float = PUSH_TIMEOUT_S,
    ) -> None:
        self._sources = sources
        self._pool = sources.pool
        self._rank = sources.share.rank
        self._open_agent = open_agent
        self._post = post
        self._clock = clock
        self._push_timeout_s = push_timeout_s
        self._looked_at = clock()
        self._connections = Connections()
        self._pairs: dict[NodeName, Outlet] = {}
        self._pushes: dict[GrantToken, Push] = {}
        self._flights: list[_Flight] = []
        self._is_short = False
        """Somebody was refused room to load to: until all have been asked again, in their order, nobody is given any."""
        self._worked_bytes = 0
        """Since the last turn began."""
        self.sent_bytes = 0

    @property
    def num_agents(self) -> int:
        return len(self._pairs) + len(self._connections)

    @property
    def connecting_pulse(self) -> Pulse:
        return self._connections.pulse

    @property
    def is_in_flight(self) -> bool:
        return bool(self._flights)

    @property
    def is_waiting(self) -> bool:
        """Whether blocks are to be pushed that are not computed or loaded yet; only `poll` finds out when they are."""
        return any(push.waiting or push.loaded for push in self._pushes.values())

    # ── pairs ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def connect(self, command: ConnectPair) -> None:
        connecting, pair = self._connections.to(command.peer), self._pairs.get(command.peer)
        if connecting is not None and connecting.remote_id == command.agent_id:
            return None  # its end answers this one too
        if pair is not None and pair.remote_id == command.agent_id:
            return self._probe(pair)
        self.close(command.peer)
        return self._build(command)

    def quiesce_by_wire(self, command: QuiesceByWire) -> None:
        """One rank of the peer is told, for all of them."""
        if (pair := self._pairs.get(command.peer)) and pair.lanes:
            self._notify(pair, pair.lanes[0], WireQuiesced(command.token, command.clean))

    def close(self, peer: NodeName) -> None:
        """Destroy the pair's agent; its handles end here, unclean, and its pushes with them. One that is being connected, which has
        neither, is destroyed once it can be."""
        self._connections.abandon(peer)
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
        """Waits for those that are being connected, but not for long (`connecting.py`)."""
        for peer in list(self._pairs):
            self.close(peer)
        self._connections.close()

    def _build(self, command: ConnectPair) -> None:
        try:
            lanes = lanes_to(command, self._sources)
            pair = Outlet(command.peer, command.agent_id, self._open_agent(), lanes)
        except (PeerLost, NoAgent, ConfigError) as error:
            self._post(PairFailed(command.peer, command.agent_id, str(error), for_good=isinstance(error, ConfigError)))
            return
        self._connections.begin(pair)
        self._take_connected()

    def _take_connected(self) -> None:
        """Pairs that are connected by now, or could not be."""
        taken = self._connections.take()
        self._pairs.update({connecting.pair.peer: connecting.pair for connecting in taken})
        for connecting in taken:
            pair = connecting.pair
            if (reason := connecting.why_not()) is None:
                self._probe(pair)
            else:
                self._lose(pair, reason)
        self._connections.destroy_abandoned()

    def _probe(self, pair: Outlet) -> None:
        if all(self._notify(pair, lane, Connect(lane.agent_id, self._rank)) for lane in pair.lanes):
            self._post(PairConnected(pair.peer, pair.remote_id))

    def _notify(self, pair: Outlet, lane: Lane, notification: AnyNotification) -> bool:
        """Whether it went out; else the pair is lost."""
        try:
            pair.agent.notify(lane.agent_id, encode(notification))
        except PeerLost as error:
            reason = str(error)
        else:
            return True
        self._lose(pair, reason)
        return False

    def _lose(self, pair: Outlet, reason: str) -> None:
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
        push = self._pushes.get(command.token)
        if push is not None:
            push.expire(self._clock())
        if push is None or not push.may_post:
            self._post(HandleDone(command.token, command.source.blocks, 0))
            if push is not None:
                self._settle(push)
            return
        pair = self._pairs[push.peer]
        assert self._pool.holds(command.source.blocks)
        if not pair.holds(command.target):
            # The target ids came over the wire: a write outside the peer's pool must not be posted.
            self._post(HandleDone(command.token, command.source.blocks, 0))
            self.cancel(command.token)
            return
        if not pair.lanes:
            self._post(HandleDone(command.token, command.source.blocks, 0))
            return
        write = Write(command, len(pair.lanes))
        push.waiting += [Part(write, lane) for lane in range(len(pair.lanes))]
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
        self._take_connected()
        for pair in list(self._pairs.values()):
            pair.agent.notifications()  # nobody writes to these agents; the call lets their own messages out
        for flight in list(self._flights):
            self._poll(flight)
        self._lose_silent_pairs()
        self._is_short = False
        self._worked_bytes = 0
        for push in list(self._pushes.values()):
            self._expire(push)
            self._advance(push)

    def _lose_silent_pairs(self) -> None:
        now = self._clock()
        passed_s = now - self._looked_at
        if passed_s < LOOK_EVERY_S:
            return
        self._looked_at = now
        in_flight = {flight.lane.agent_id for flight in self._flights}
        for pair in list(self._pairs.values()):
            for lane in pair.lanes:
                lane.silent_s = lane.silent_s + min(passed_s, LONGEST_TURN_S) if lane.agent_id in in_flight else 0.0
            if any(lane.silent_s >= self._push_timeout_s for lane in pair.lanes):
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
        while push.may_post and push.loaded and push.loaded[0].load.is_ready() and (self._has_time or not push.verify):
            self._write(push, push.loaded[0])
        if push.waiting and not push.loaded and isinstance(command := push.waiting[0], FinishPush):
            push.expire(self._clock())
            if push.may_post:
                push.waiting.popleft()
                self._send_last(push, command.first)
        self._settle(push)

    def _load(self, push: Push) -> None:
        """Load what is computed, as far as there is room, and time."""
        while push.waiting and isinstance(part := push.waiting[0], Part) and part.write.command.is_ready():
            if self._is_short or not self._has_time:
                return
            command, source = part.write.command, self._pairs[push.peer].lanes[part.lane].source
            load = source.load(command.layers, command.source)
            if load is None:
                self._is_short = True
                return
            self._worked_bytes += load.made_bytes
            push.waiting.popleft()
            push.loaded.append(Loaded(part, source, load))

    @property
    def _has_time(self) -> bool:
        """To work on bytes in this turn."""
        return self._worked_bytes < MAX_WORKED_BYTES

    def _send_last(self, push: Push, first: FirstToken | None) -> None:
        """To each rank, behind what the pair has in flight, others' bytes too: all have gone out when those have arrived."""
        pair = self._pairs[push.peer]
        push.finish({flight.handle for flight in self._flights if flight.pair is pair})
        for lane in pair.lanes:
            seq = push.number(lane.rank)
            if not self._notify(pair, lane, Piece(push.token, self._rank, seq, 0, total=seq + 1, first=first)):
                return

    def _write(self, push: Push, loaded: Loaded) -> None:
        """Post it, unless the lease has run out by the time that nothing is left to do but that.

        A process that was stopped, or whose machine slept, wakes up anywhere: the later it looks at the clock, the less it may write
        into a grant that was given up meanwhile. What is posted all the same, only the target's fence keeps out.
        """
        write, load = loaded.part.write, loaded.load
        pair = self._pairs[push.peer]
        lane = pair.lanes[loaded.part.lane]
        targets = lane.remote.indices(write.command.layers, write.command.target)
        kv_bytes = len(targets) * lane.targets.length
        sums = self._checksums(lane, loaded) if push.verify else None
        piece = Piece(push.token, self._rank, push.number(lane.rank), kv_bytes, sums=sums)
        handle = pair.agent.prepare(lane.agent_id, load.indices, targets, encode(piece))
        flight = _Flight(pair, lane, handle, push, write, load, kv_bytes)
        now = self._clock()
        push.expire(now)
        if not push.may_post:
            pair.agent.discard(handle)
            return
        push.posted(lane.leg, now)
        push.loaded.popleft()
        self._flights.append(flight)
        try:
            pair.agent.post(handle)
        except PeerLost as error:
            reason = str(error)
        else:
            return
        self._lose(pair, reason)

    def _checksums(self, lane: Lane, loaded: Loaded) -> Checksums:
        """Of what the write will read, where it reads it."""
        command, indices = loaded.part.write.command, loaded.load.indices
        self._worked_bytes += len(indices) * lane.memory.length
        crcs = lane.memory.checksums(indices, len(command.target))
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
        flight.lane.silent_s = 0.0
        flight.lane.source.unload(flight.load)
        flight.push.ended(flight.lane.leg, kv_bytes, self._clock())
        self.sent_bytes += kv_bytes or 0
        self._part_ended(flight.write, kv_bytes or 0)
        self._settle(flight.push)
        for push in self._pushes_of(flight.pair):
            if flight.handle in push.behind:
                push.behind.discard(flight.handle)
                self._settle(push)

    def _part_ended(self, write: Write, kv_bytes: int) -> None:
        if write.ended(kv_bytes):
            self._post(HandleDone(write.command.token, write.command.source.blocks, write.kv_bytes))

    def _pushes_of(self, pair: Outlet) -> list[Push]:
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
                sent=push.sent,
            )
        )

    def _give_up_waiting(self, push: Push) -> None:
        """Nothing is written of these blocks. What still computes them does so before whatever the same device is asked next; what
        still loads them brings what nobody reads."""
        while push.loaded:
            loaded = push.loaded.popleft()
            loaded.unload()
            self._part_ended(loaded.part.write, 0)
        while push.waiting:
            part = push.waiting.popleft()
            if isinstance(part, Part):
                self._part_ended(part.write, 0)
