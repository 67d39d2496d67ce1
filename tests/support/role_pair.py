"""A router's dispatcher, a prefill node `p0` and a decode node `d0`, all real, and scripted everything between them.

Frames wait in queues until the test delivers them, writes until it ends them, and what a transfer thread says until it is heard. Nobody
writes bytes; what is kept is which blocks may still be written, and by which agent.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from disaggd.cluster.dispatcher import Dispatcher
from disaggd.cluster.moves import DispatchRules
from disaggd.cluster.peers import DecodePeer, PrefillPeer
from disaggd.cluster.protocol import ToNode, ToRouter
from disaggd.cluster.request import Request
from disaggd.ids import AgentId, BlockId, GrantToken, Incarnation, NodeName
from disaggd.roles.decode_role import DecodeRole
from disaggd.roles.prefill_role import PrefillRole
from disaggd.sampling import SamplingParams
from disaggd.transfer import messages as transfer
from disaggd.transfer.layout import PoolPlace
from disaggd.transfer.notification import FirstToken
from tests.support.decode_scripts import make_decode_node
from tests.support.endpoints import endpoint
from tests.support.prefill_scripts import make_prefill_node
from tests.support.role_nodes import BLOCK, LINK, RoleNode, hasher_of, kv_of
from tests.support.routing import D0, P0, Client, hello

NODES = (P0, D0)


@dataclass
class Handle:
    """A posted write: its source may be read and its target written until it ends."""

    writer: NodeName
    agent: AgentId
    token: GrantToken
    source: tuple[BlockId, ...]
    target: tuple[BlockId, ...]


@dataclass
class Outlet:
    """A push under way."""

    agent: AgentId
    is_drained: bool = False
    is_finished: bool = False
    is_clean: bool = True
    first: FirstToken | None = None


@dataclass
class Node:
    """One of the two, and what is on its way to it."""

    name: NodeName
    peer: NodeName
    node: RoleNode[PrefillRole] | RoleNode[DecodeRole]
    frames: deque[ToNode] = field(default_factory=deque)
    answers: deque[ToRouter] = field(default_factory=deque)
    events: deque[transfer.TransferEvent] = field(default_factory=deque)
    agent: AgentId | None = None
    """What the peer may write to."""
    num_agents: int = 0
    remote: AgentId | None = None
    """What this one is connected to at the peer."""
    expected: set[GrantToken] = field(default_factory=set)
    pushes: dict[GrantToken, Outlet] = field(default_factory=dict)


class RolePair:
    """Each node has a prefix cache, and `num_blocks` of its own size.

    `check_pairs`: a pattern goes over each way before anything else does; it always arrives as it was.
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        prefill_size: int = BLOCK,
        decode_size: int = BLOCK,
        max_step_tokens: int = 16,
        check_pairs: bool = False,
    ) -> None:
        self.now = 1000.0
        self.dispatcher = Dispatcher(
            Incarnation("r"),
            DispatchRules(check_pairs=check_pairs, prefix_push="always", request_timeout_s=1e6, max_retries=1, max_prefill_queue=1000),
            lambda: self.now,
            lambda record: None,
        )
        self.nodes = {
            P0: Node(P0, D0, make_prefill_node(num_blocks, max_step_tokens, hasher=hasher_of(prefill_size), block_size=prefill_size)),
            D0: Node(
                D0,
                P0,
                make_decode_node(num_blocks, hasher=hasher_of(decode_size), block_size=decode_size, max_step_tokens=max_step_tokens),
            ),
        }
        self.handles: list[Handle] = []
        self.lost: list[Handle] = []
        """That ended not clean: bytes of theirs may be under way until the target's agent is destroyed."""
        self.clients: list[tuple[Client, list[int], int]] = []
        """With prompt and how many tokens were asked for."""
        sizes = {P0: prefill_size, D0: decode_size}
        shares = {
            name: msgspec.structs.replace(hello(name, "first"), kv=kv_of(sizes[name]), num_blocks=num_blocks, shares_prefixes=True)
            for name in NODES
        }
        self.dispatcher.prefill_up(PrefillPeer(P0, shares[P0], self.nodes[P0].frames.append))
        self.dispatcher.decode_up(DecodePeer(D0, shares[D0], self.nodes[D0].frames.append))
        self.nodes[P0].node.link_up(LINK)  # its credit was said before anybody listened
        self.settle()

    # ── what may happen ──

    def submit(self, tokens: list[int], max_tokens: int, override: str) -> None:
        client = Client()
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        request = Request(id=str(len(self.clients)), prompt=tuple(tokens), sampling=sampling, override=override)
        client.seq = self.dispatcher.submit(request, client)
        self.clients.append((client, tokens, max_tokens))
        self.settle()

    def deliver(self, name: NodeName) -> bool:
        """One frame from the router to a node."""
        return self._take(self.nodes[name].frames, self.nodes[name].node.say)

    def answer(self, name: NodeName) -> bool:
        """One frame from a node to the router."""
        return self._take(self.nodes[name].answers, lambda frame: self.dispatcher.on_frame(name, frame))

    def hear(self, name: NodeName) -> bool:
        """One event of a node's transfer thread."""
        return self._take(self.nodes[name].events, self.nodes[name].node.event)

    def step(self, name: NodeName) -> None:
        self.nodes[name].node.step()
        self.settle()

    def after(self, seconds: float) -> None:
        self.now += seconds
        for node in self.nodes.values():
            node.node.now = self.now
            node.node.after(0.0)
        self.dispatcher.tick()
        self.settle()

    def end_handle(self, handle: Handle) -> None:
        self.handles.remove(handle)
        writer = self.nodes[handle.writer]
        writer.events.append(transfer.HandleDone(handle.token, handle.source, 10))
        self._end_if_over(writer, handle.token)
        self.settle()

    def lose_pair(self, name: NodeName) -> None:
        """Writes of `name` fail, all of them."""
        node = self.nodes[name]
        if node.remote is not None:
            node.events.append(transfer.PairFailed(node.peer, node.remote, "connection reset"))
            self._disconnect(node)
        self.settle()

    def settle(self) -> None:
        """Take in what the nodes have said."""
        while any(node.node.commands or node.node.sent for node in self.nodes.values()):
            for node in self.nodes.values():
                commands, frames = list(node.node.commands), [frame for _, frame in node.node.sent]
                node.node.clear()
                node.answers.extend(frames)
                for command in commands:
                    self._obey(node, command)
        self.check()

    def check(self) -> None:
        """Whatever may still be written is promised or in quarantine: nobody computes in it, nobody finds it."""
        for handle in self.handles + self.lost:
            target = self.nodes[self.nodes[handle.writer].peer]
            if handle.agent != target.agent:
                continue  # fenced: its bytes reach nobody
            pool = target.node.pool
            assert all(pool.references(block) for block in handle.target), "free while it is written"
            assert not target.node.running_blocks & set(handle.target), "computed in while it is written"
            assert not pool._digests.keys() & set(handle.target), "found while it is written"

    # ── the transfer threads ──

    def _obey(self, node: Node, command: transfer.TransferCommand) -> None:
        match command:
            case transfer.OpenPair():
                self._open(node)
            case transfer.ConnectPair():
                self._connect(node, command.agent_id)
            case transfer.Expect(token):
                node.expected.add(token)
            case transfer.Forget(token):
                node.expected.discard(token)
            case transfer.Fence(_, agent_id):
                if node.agent == agent_id:
                    node.agent = None
                    node.expected.clear()
                node.events.append(transfer.Fenced(node.peer, agent_id))
                self._open(node)
            case transfer.BeginPush(token, _, agent_id):
                node.pushes[token] = Outlet(agent_id, is_drained=node.remote != agent_id)
                self._end_if_over(node, token)
            case transfer.PushBlocks(token, _, source, target):
                self._post(node, token, source.blocks, target)
            case transfer.FinishPush(token, first):
                if (push := node.pushes.get(token)) is not None and not push.is_drained:
                    push.is_finished, push.first = True, first
                    self._end_if_over(node, token)
            case transfer.CancelPush(token):
                if (push := node.pushes.get(token)) is not None:
                    push.is_drained = True
                    self._end_if_over(node, token)
            case transfer.QuiesceByWire(token, _, clean):
                self._tell_by_wire(node, transfer.QuiescedByWire(token, clean, node.name))
            case transfer.ClosePair():
                self._disconnect(node)
            case transfer.RenewLease():
                pass
            case _:
                raise AssertionError(command)

    def _open(self, node: Node) -> None:
        if node.agent is None:
            node.num_agents += 1
            node.agent = AgentId(f"{node.name}-{node.num_agents}")
        node.events.append(transfer.PairOpened(node.peer, Incarnation(f"{node.peer}-first"), endpoint(node.agent, b"", PoolPlace(0, 64))))

    def _connect(self, node: Node, agent_id: AgentId) -> None:
        if node.remote != agent_id:
            self._disconnect(node)
            node.remote = agent_id
        node.events.append(transfer.PairConnected(node.peer, agent_id))
        self._tell_by_wire(node, transfer.PairProbed(node.name, agent_id))

    def _tell_by_wire(self, node: Node, event: transfer.TransferEvent) -> None:
        peer = self.nodes[node.peer]
        if node.remote is not None and peer.agent == node.remote:
            peer.events.append(event)

    def _post(self, node: Node, token: GrantToken, source: tuple[BlockId, ...], target: tuple[BlockId, ...]) -> None:
        push = node.pushes.get(token)
        if push is None or push.is_drained or push.is_finished:
            node.events.append(transfer.HandleDone(token, source, 0))
        else:
            self.handles.append(Handle(node.name, push.agent, token, source, target))

    def _disconnect(self, node: Node) -> None:
        """Our agent is destroyed: its handles have ended, not clean."""
        node.remote = None
        for handle in [handle for handle in self.handles if handle.writer == node.name]:
            self.handles.remove(handle)
            self.lost.append(handle)
            node.events.append(transfer.HandleDone(handle.token, handle.source, 0))
            node.pushes[handle.token].is_clean = False
        for token, push in list(node.pushes.items()):
            push.is_drained = True
            self._end_if_over(node, token)

    def _end_if_over(self, node: Node, token: GrantToken) -> None:
        push = node.pushes.get(token)
        if push is None or not (push.is_drained or push.is_finished) or any(handle.token == token for handle in self.handles):
            return
        del node.pushes[token]
        peer = self.nodes[node.peer]
        if push.is_finished and push.is_clean and token in peer.expected and push.agent == peer.agent:
            peer.expected.discard(token)
            peer.events.append(transfer.Landed(token, push.first, 10))
        sent = transfer.Sent(transfer.Leg(0, 0, range(1), "direct"), 10, self.now, self.now)
        node.events.append(transfer.PushEnded(token, push.is_clean, push.is_finished, 10, self.now, self.now, (sent,)))

    def _take(self, queue: "deque[object]", use: object) -> bool:
        if not queue:
            return False
        use(queue.popleft())  # type: ignore[operator]
        self.settle()
        return True

    # ── to the end ──

    def come_to_rest(self) -> None:
        """Everything is delivered, computed and written, and time passes, until nothing is left to be done."""
        for _ in range(40):
            while self._moves():
                pass
            self.after(3.0)

    def _moves(self) -> bool:
        return any([*self._deliveries(), *self._writes(), *self._steps()])

    def _deliveries(self) -> Iterator[bool]:
        for name in NODES:
            yield from (self.deliver(name), self.answer(name), self.hear(name))

    def _writes(self) -> Iterator[bool]:
        for handle in list(self.handles):
            if handle in self.handles:
                self.end_handle(handle)
                yield True

    def _steps(self) -> Iterator[bool]:
        for name in NODES:
            if self.nodes[name].node.engine.has_work:
                self.step(name)
                yield True
