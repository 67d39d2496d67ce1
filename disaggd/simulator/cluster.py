"""`SimulatedCluster`: the real dispatcher, the real roles and engines, and the requests of a trace, in virtual time.

One router; links that only delay; nothing is drawn at random and no clock is read, so that the same input has the same
outcome, to the last digit.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Literal

import msgspec

from disaggd.cluster.dispatcher import Dispatcher
from disaggd.cluster.hello import PROTOCOL_VERSION, NodeHello
from disaggd.cluster.peers import DecodePeer, PrefillPeer, Send
from disaggd.cluster.protocol import ToNode
from disaggd.cluster.request import Request, RoutedSequence
from disaggd.config import Config, NodeConfig
from disaggd.engine.blocks import BlockPool
from disaggd.engine.engine import Engine
from disaggd.engine.scheduler import Limits
from disaggd.engine.self_measurement import measure_steps
from disaggd.engine.step_cost import StepPace
from disaggd.errors import ConfigError, Overloaded, RequestError
from disaggd.ids import Incarnation, NodeName
from disaggd.model.spec import ModelSpec
from disaggd.prefix import PrefixHasher
from disaggd.roles.assembly import decode_role, dispatch_rules, prefill_role
from disaggd.roles.compute import Batch, FrameIn, LinkUp, Outbox, Role
from disaggd.roles.pushing import layer_groups
from disaggd.sampling import FinishReason, SamplingParams, TokenLogprob
from disaggd.simulator.costs import Costs
from disaggd.simulator.events import EventLoop
from disaggd.simulator.node import LINK, NodeClock, SimulatedNode, SimulatedRunner
from disaggd.simulator.traces import Lengths
from disaggd.simulator.transfer import Fabric, SimulatedTransfer
from disaggd.simulator.wire import Rate, Wire
from disaggd.transfer.layout import KVSpec, kv_spec
from disaggd.transfer.messages import at_once
from disaggd.transfer.share import block_bytes

TICK_S = 0.1
"""The router's."""

VOCAB_SIZE = 2**31
"""Prompts are made of numbers that name what they have in common, and no model looks at them."""

MODEL_ID = "simulated"

START_S = 10.0
"""The first request comes when every node is linked and paired, and long after."""

MakeRole = Callable[[NodeConfig, Engine, Outbox, SimulatedTransfer], Role]


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What is simulated."""

    config: Config
    spec: ModelSpec
    costs: Costs
    block: int
    """Tokens of a prompt that one id of `Lengths.blocks` stands for."""
    rate_changes: tuple[Rate, ...] = ()
    """Of every wire, in seconds after the first request."""


class Client:
    """Whoever waits for one request: when its tokens came, and what became of it."""

    def __init__(self, row: Lengths, arrived_at: float, clock: Callable[[], float]) -> None:
        self.row = row
        self.arrived_at = arrived_at
        self.tokens_at: list[float] = []
        self.error: RequestError | None = None
        self.record: RoutedSequence | None = None
        """The router's, once it is over; None if it was never placed."""
        self.is_over = False
        self._clock = clock

    def deliver(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob] | None, finish: FinishReason | None) -> None:
        assert not self.is_over
        self.tokens_at += [self._clock()] * len(tokens)
        self.is_over = finish is not None

    def fail(self, error: RequestError) -> None:
        assert not self.is_over
        self.error = error
        self.is_over = True


class SimulatedCluster:
    """A cluster with nothing to do, until `replay`. Raises ConfigError for a node that cannot be simulated."""

    def __init__(self, setup: Setup) -> None:
        self.loop = EventLoop()
        self._setup = setup
        self._config = setup.config
        self._clients: dict[str, Client] = {}
        self._frame_s = setup.costs.link.frame_ms / 1e3
        self._num_open = 0
        self.fabric = Fabric(self.loop, lambda *_: self._make_wire())
        self.dispatcher = Dispatcher(
            Incarnation("simulated"),
            replace(dispatch_rules(self._config, VOCAB_SIZE), check_pairs=False),  # there are no bytes to compare
            clock=lambda: self.loop.now,
            on_update=self._on_update,
        )
        self.nodes = self._make_nodes()
        self._link_all()

    def replay(self, rows: Iterable[Lengths]) -> list[Client]:
        """Each request at its time, until the last has ended and the cluster has come to rest."""
        self.loop.run()
        assert self.loop.now < START_S, "the cluster takes longer to come up than was thought"
        start, clients = START_S, []
        for index, row in enumerate(rows):
            client = Client(row, start + row.arrival_s, lambda: self.loop.now)
            clients.append(client)
            self.loop.at(client.arrived_at, self._arrival(index, client))
        self._num_open = len(clients)
        self.loop.at(start, self._tick)
        self.loop.run()
        return clients

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _arrival(self, index: int, client: Client) -> Callable[[], None]:
        def arrive() -> None:
            name = str(index)
            self._clients[name] = client
            sampling = SamplingParams(temperature=0.0, max_tokens=client.row.num_output, ignore_eos=True)
            try:
                if len(self.dispatcher.sequences) >= (most := self._config.router.max_requests):
                    raise Overloaded(f"{most} sequences are in flight already ([router] max_requests)")
                self.dispatcher.submit(Request(id=name, prompt=prompt(index, client.row, self._setup.block), sampling=sampling), client)
            except RequestError as error:
                client.fail(error)
                self._num_open -= 1

        return arrive

    def _on_update(self, record: RoutedSequence) -> None:
        client = self._clients[record.request.id]
        if client.record is None:
            self._num_open -= 1
        client.record = record

    def _tick(self) -> None:
        self.dispatcher.tick()
        if self._num_open:
            self.loop.after(TICK_S, self._tick)

    # ── nodes ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _make_wire(self) -> Wire:
        link = self._setup.costs.link
        changes = (msgspec.structs.replace(rate, since_s=START_S + rate.since_s) for rate in self._setup.rate_changes)
        return Wire([Rate(0.0, link.kv_mbit_per_s * 1e6 / 8), *changes], link.kv_latency_ms / 1e3)

    def _make_nodes(self) -> dict[NodeName, SimulatedNode]:
        prefills = {node.name: self._make_node(node, self._prefill_role) for node in self._config.nodes_of("prefill")}
        decodes = {node.name: self._make_node(node, self._decode_role) for node in self._config.nodes_of("decode")}
        return prefills | decodes

    def _make_node(self, node: NodeConfig, make: MakeRole) -> SimulatedNode:
        kv, costs, clock = kv_spec(self._setup.spec, node.block_size), self._setup.costs.of(node), NodeClock(self.loop)
        engine = self._engine(node, kv, SimulatedRunner(costs, self._layer_groups, clock), clock)
        transfer = SimulatedTransfer(
            name=node.name,
            fabric=self.fabric,
            kv=kv,
            num_blocks=engine.pool.num_blocks,
            block_bytes=block_bytes(kv, node.tp),
            post=lambda event: self.nodes[node.name].receive(event),
            clock=clock,
            sent=lambda num_bytes: clock.owe(num_bytes * costs.per_sent_mb_ms * 1e-9),
            received=lambda num_bytes: clock.owe(num_bytes * costs.per_received_mb_ms * 1e-9),
        )

        def send(batch: Batch) -> None:
            self.loop.at(clock() + self._frame_s, lambda: self._heed(node.name, batch))

        outbox = Outbox(send)
        return SimulatedNode(self.loop, clock, engine, make(node, engine, outbox, transfer), outbox)

    @property
    def _layer_groups(self) -> tuple[range, ...]:
        return layer_groups(self._setup.spec.num_layers, self._config.transfer.layer_group)

    def _engine(self, node: NodeConfig, kv: KVSpec, runner: SimulatedRunner, clock: NodeClock) -> Engine:
        if node.kv_cache_bytes is None:
            raise ConfigError(f"node {node.name!r}: only its GPU knows how much memory is free: set kv_cache")
        num_bytes = block_bytes(kv, node.tp)
        if not (num_blocks := node.kv_cache_bytes // num_bytes):
            raise ConfigError(f"node {node.name!r}: kv_cache is less than one block of {num_bytes:,} bytes")
        limit = self._setup.spec.max_position_embeddings
        limits = Limits(node.max_step_tokens, node.max_sequences, min(self._config.model.max_model_len or limit, limit))
        hasher = PrefixHasher(MODEL_ID, kv.dtype, node.block_size) if node.prefix_cache else None
        itl_target_ms = self._config.disaggregation.itl_target_ms
        pace = StepPace(None if itl_target_ms is None else itl_target_ms / 1e3, clock)
        engine = Engine(runner, BlockPool(num_blocks, node.block_size, hasher), limits, pace=pace)
        if self._config.disaggregation.self_measurement:
            measure_steps(engine, clock)
        return engine

    def _prefill_role(self, node: NodeConfig, engine: Engine, outbox: Outbox, transfer: SimulatedTransfer) -> Role:
        return prefill_role(
            self._config,
            node,
            engine,
            kv=transfer.kv,
            vocab_size=VOCAB_SIZE,
            outbox=outbox,
            submit=transfer.submit,
            mark=lambda: at_once,
            clock=transfer.clock,
        )

    def _decode_role(self, node: NodeConfig, engine: Engine, outbox: Outbox, transfer: SimulatedTransfer) -> Role:
        return decode_role(
            self._config,
            node,
            engine,
            kv=transfer.kv,
            vocab_size=VOCAB_SIZE,
            outbox=outbox,
            submit=transfer.submit,
            clock=transfer.clock,
        )

    # ── links ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _link_all(self) -> None:
        """The router's links to all nodes, which have just come up."""
        for node in self._config.nodes_of("decode"):
            self.nodes[node.name].receive(LinkUp(LINK))
            self.dispatcher.decode_up(DecodePeer(node.name, self._hello(node, "decode"), self._sender(node.name)))
        for node in self._config.nodes_of("prefill"):
            self.nodes[node.name].receive(LinkUp(LINK))
            self.dispatcher.prefill_up(PrefillPeer(node.name, self._hello(node, "prefill"), self._sender(node.name)))

    def _hello(self, node: NodeConfig, role: Literal["prefill", "decode"]) -> NodeHello:
        engine, kv = self.nodes[node.name].engine, kv_spec(self._setup.spec, node.block_size)
        incarnation = Incarnation(node.name)
        return NodeHello(
            PROTOCOL_VERSION,
            node.name,
            role,
            incarnation,
            MODEL_ID,
            kv,
            engine.pool.num_blocks,
            engine.limits.max_model_len,
            self._config.pushes_prefixes(node),
        )

    def _heed(self, name: NodeName, batch: Batch) -> None:
        """What a node has sent in one go."""
        for _, frame in batch:
            self.dispatcher.on_frame(name, frame)

    def _sender(self, name: NodeName) -> Send:
        def send(frame: ToNode) -> None:
            self.loop.after(self._frame_s, lambda: self.nodes[name].receive(FrameIn(LINK, frame)))

        return send


def prompt(index: int, row: Lengths, block: int) -> tuple[int, ...]:
    """Tokens that are the same where prefix ids are, and nobody else's where there are none."""
    tokens: list[int] = []
    for shared in row.blocks:
        tokens += [2 * shared + 2] * block
    own = row.num_input - len(tokens)
    return tuple((tokens + [2 * index + 3] * max(0, own))[: row.num_input])
