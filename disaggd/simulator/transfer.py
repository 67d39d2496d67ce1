"""KV on the move in virtual time: what stands where the transfer threads and NIXL stand.

Obeys `transfer/messages.py`'s commands and posts its events. Pushes and landings are counted by the real thing (`Push`,
`LandingSet`); only agents, handles and bytes are made up: each pair of nodes has a `Wire`, on which writes and
notifications go one after another, and no byte exists. Nobody dies here, so an agent is lost by a fence alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from disaggd.ids import AgentId, BlockId, GrantToken, HandleId, Incarnation, NodeName
from disaggd.simulator.events import Action, EventLoop
from disaggd.simulator.wire import Wire
from disaggd.transfer import messages as m
from disaggd.transfer.endpoint import Endpoint
from disaggd.transfer.landing import LandingSet
from disaggd.transfer.layout import KVSpec, PoolPlace
from disaggd.transfer.notification import FirstToken, Piece
from disaggd.transfer.push import Push

Post = Callable[[m.TransferEvent], None]
Charge = Callable[[int], None]
"""Called with bytes that have just gone out or come in: they cost the node's processor something."""

_PORT = 1
"""Nobody listens."""
_LEG = m.Leg(0, 0, range(1), "direct")
"""Nodes are of one rank, and heads make no difference."""


@dataclass(slots=True)
class _Inlet:
    """The agent that one peer writes to."""

    incarnation: Incarnation
    agent_id: AgentId


@dataclass(slots=True)
class _Outlet:
    """The agent that we write to one peer with."""

    peer: "SimulatedTransfer"
    agent_id: AgentId
    wire: Wire


class Fabric:
    """All nodes' transfer threads, and the wires between them. `make_wire` is asked once per pair, from sender to receiver."""

    def __init__(self, loop: EventLoop, make_wire: Callable[[NodeName, NodeName], Wire]) -> None:
        self.loop = loop
        self.nodes: dict[NodeName, SimulatedTransfer] = {}
        self._make_wire = make_wire
        self._wires: dict[tuple[NodeName, NodeName], Wire] = {}

    def wire(self, sender: NodeName, receiver: NodeName) -> Wire:
        if (sender, receiver) not in self._wires:
            self._wires[sender, receiver] = self._make_wire(sender, receiver)
        return self._wires[sender, receiver]


@dataclass(slots=True)
class SimulatedTransfer:
    """One node's transfer thread. `clock` is the node's own time, at which `submit` is called."""

    name: NodeName
    fabric: Fabric
    kv: KVSpec
    num_blocks: int
    block_bytes: int
    """What is written to it of a block."""
    post: Post
    clock: Callable[[], float]
    sent: Charge
    received: Charge
    _inlets: dict[NodeName, _Inlet] = field(default_factory=dict)
    _outlets: dict[NodeName, _Outlet] = field(default_factory=dict)
    _landings: dict[GrantToken, tuple[AgentId, LandingSet]] = field(default_factory=dict)
    _pushes: dict[GrantToken, Push] = field(default_factory=dict)
    _num_agents: int = 0

    def __post_init__(self) -> None:
        self.fabric.nodes[self.name] = self

    def submit(self, command: m.TransferCommand) -> None:
        """Obeyed at the time that the node's own clock shows, which may be ahead of the loop's."""
        self.fabric.loop.at(self.clock(), lambda: self._obey(command))

    def _obey(self, command: m.TransferCommand) -> None:
        match command:
            case m.PushBlocks():
                self._push_blocks(command)
            case m.RenewLease(token):
                if push := self._pushes.get(token):
                    push.renew(self._now)
            case m.Expect(token, _, agent_id, num_blocks, brings_token):
                self._landings[token] = (agent_id, LandingSet({0: num_blocks * self.block_bytes}, brings_token))
            case m.Forget(token):
                self._landings.pop(token, None)
            case m.BeginPush():
                self._begin(command)
            case m.FinishPush(token, first):
                self._finish(token, first)
            case m.CancelPush(token):
                if push := self._pushes.get(token):
                    push.drain()
                    self._settle(push)
            case m.QuiesceByWire(token, peer, clean):
                self._quiesce_by_wire(token, peer, clean)
            case m.OpenPair():
                self._open(command)
            case m.ConnectPair():
                self._connect(command)
            case m.Fence():
                self._fence(command)
            case m.ClosePair(peer):
                self._close_outlet(peer)
            case _:
                raise TypeError(f"not a transfer command: {command!r}")

    @property
    def _now(self) -> float:
        return self.fabric.loop.now

    # ── pairs ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _open(self, command: m.OpenPair) -> None:
        inlet = self._inlets.get(command.peer)
        if inlet is not None and inlet.incarnation != command.peer_incarnation:
            self._close_inlet(command.peer)
            inlet = None
        if inlet is None:
            self._new_inlet(command.peer, command.peer_incarnation)
        self._announce(command.peer)

    def _new_inlet(self, peer: NodeName, incarnation: Incarnation) -> None:
        self._num_agents += 1
        self._inlets[peer] = _Inlet(incarnation, AgentId(f"{self.name}<{peer}#{self._num_agents}"))

    def _announce(self, peer: NodeName) -> None:
        inlet = self._inlets[peer]
        self.post(m.PairOpened(peer, inlet.incarnation, (Endpoint(inlet.agent_id, b"", PoolPlace(0, self.num_blocks), _PORT),)))

    def _close_inlet(self, peer: NodeName) -> None:
        """What is on its way to the agent lands nowhere, and its sender finds that out."""
        if (inlet := self._inlets.pop(peer, None)) is None:
            return
        self._landings = {token: landing for token, landing in self._landings.items() if landing[0] != inlet.agent_id}
        self.post(m.Fenced(peer, inlet.agent_id))
        sender = self.fabric.nodes[peer]
        self.fabric.loop.at(sender._path_to(self.name).arrival(self._now), lambda: sender._lose(self.name, inlet.agent_id))

    def _fence(self, command: m.Fence) -> None:
        inlet = self._inlets.get(command.peer)
        if inlet is None or inlet.agent_id != command.agent_id:
            return self.post(m.Fenced(command.peer, command.agent_id))
        self._close_inlet(command.peer)
        self._new_inlet(command.peer, inlet.incarnation)
        return self._announce(command.peer)

    def _connect(self, command: m.ConnectPair) -> None:
        peer, agent_id = self.fabric.nodes[command.peer], command.agent_id
        self._outlets[command.peer] = _Outlet(peer, agent_id, self._path_to(command.peer))
        self.post(m.PairConnected(command.peer, agent_id))
        self._notify(command.peer, lambda: peer._probed(self.name, agent_id))

    def _path_to(self, peer: NodeName) -> Wire:
        return self.fabric.wire(self.name, peer)

    def _notify(self, peer: NodeName, heed: Action) -> None:
        """A notification that rides on no write: behind every byte that was sent before."""
        wire = self._path_to(peer)
        self.fabric.loop.at(wire.arrival(wire.send(0, self._now)), heed)

    def _probed(self, peer: NodeName, agent_id: AgentId) -> None:
        inlet = self._inlets.get(peer)
        if inlet is not None and inlet.agent_id == agent_id:
            self.post(m.PairProbed(peer, agent_id))

    def _lose(self, peer: NodeName, agent_id: AgentId) -> None:
        """The peer has destroyed that agent: whatever is in flight to it ends, not clean."""
        outlet = self._outlets.get(peer)
        if outlet is None or outlet.agent_id != agent_id:
            return
        self._close_outlet(peer)
        self.post(m.PairFailed(peer, agent_id, "its agent was destroyed"))

    def _close_outlet(self, peer: NodeName) -> None:
        """What is in flight there ends when it would have, not clean."""
        if (outlet := self._outlets.pop(peer, None)) is None:
            return
        for push in [push for push in self._pushes.values() if push.agent_id == outlet.agent_id]:
            push.lose_pair()
            self._settle(push)

    # ── sending ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _begin(self, command: m.BeginPush) -> None:
        push = Push(
            token=command.token,
            peer=command.peer,
            agent_id=command.agent_id,
            lease_s=command.lease_s,
            lease_until=self._now + command.lease_s,
        )
        self._pushes[command.token] = push
        if self._outlet(push) is None:
            push.drain()
            self._settle(push)

    def _outlet(self, push: Push) -> _Outlet | None:
        outlet = self._outlets.get(push.peer)
        return outlet if outlet is not None and outlet.agent_id == push.agent_id else None

    def _live(self, token: GrantToken) -> tuple[Push, _Outlet] | None:
        """The push, if it may post now, and its way."""
        push = self._pushes.get(token)
        if push is None:
            return None
        push.expire(self._now)
        self._settle(push)
        outlet = self._outlet(push)
        return (push, outlet) if outlet is not None and push.may_post else None

    def _push_blocks(self, command: m.PushBlocks) -> None:
        live = self._live(command.token)
        if live is None:
            return self.post(m.HandleDone(command.token, command.source.blocks, 0))
        push, outlet = live
        kv_bytes = len(command.target) * outlet.peer.block_bytes * len(command.layers) // self.kv.num_layers
        piece = Piece(command.token, 0, push.number(0), kv_bytes)
        push.posted(_LEG, self._now)
        left_at = outlet.wire.send(kv_bytes, self._now)
        self.fabric.loop.at(outlet.wire.arrival(left_at), lambda: self._written(push, outlet, piece, command.source.blocks))
        return None

    def _written(self, push: Push, outlet: _Outlet, piece: Piece, source: tuple[BlockId, ...]) -> None:
        """The last byte and its notification are there, or the agent that they went to is not."""
        is_done = self._outlet(push) is outlet
        self.sent(piece.kv_bytes)
        if is_done:
            outlet.peer._land(push.agent_id, piece)
        push.ended(_LEG, piece.kv_bytes if is_done else None, self._now)
        self.post(m.HandleDone(push.token, source, piece.kv_bytes if is_done else 0))
        self._settle(push)

    def _finish(self, token: GrantToken, first: FirstToken | None) -> None:
        live = self._live(token)
        if live is None:
            return
        push, outlet = live
        seq = push.number(0)
        last = HandleId(seq)
        push.finish({last})
        piece = Piece(token, 0, seq, 0, total=seq + 1, first=first)
        self._notify(push.peer, lambda: self._last_is_there(push, outlet, piece, last))

    def _last_is_there(self, push: Push, outlet: _Outlet, piece: Piece, last: HandleId) -> None:
        """And with it everything that was sent before it."""
        outlet.peer._land(push.agent_id, piece)
        push.behind.discard(last)
        self._settle(push)

    def _settle(self, push: Push) -> None:
        if not push.settle():
            return
        del self._pushes[push.token]
        self.post(
            m.PushEnded(
                token=push.token,
                clean=push.clean,
                finished=push.finished,
                kv_bytes=push.kv_bytes,
                first_post_at=push.first_post_at,
                last_done_at=push.last_done_at,
            )
        )

    def _quiesce_by_wire(self, token: GrantToken, peer: NodeName, clean: bool) -> None:
        if (outlet := self._outlets.get(peer)) is not None:
            self._notify(peer, lambda: outlet.peer.post(m.QuiescedByWire(token, clean, self.name)))

    # ── receiving ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _land(self, agent_id: AgentId, piece: Piece) -> None:
        """A piece has come in at that agent; nobody may wait for it any more."""
        self.received(piece.kv_bytes)
        landing = self._landings.get(piece.token)
        if landing is None or landing[0] != agent_id or not landing[1].add(piece):
            return
        del self._landings[piece.token]
        self.post(m.Landed(piece.token, landing[1].first, landing[1].kv_bytes))
