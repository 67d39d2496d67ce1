"""The router role: HTTP on one side, links to every engine node on the other, the dispatcher between them.

One asyncio thread, no torch. `RouterBackend` is what the gateway sees of the cluster; the dispatcher decides, this
module carries: frames to links, tokens to the coroutines that stream them, what happened to receipts and metrics.
"""

import asyncio
import gc
import logging
import os
import time
import uuid
from collections.abc import AsyncGenerator, Iterator

import msgspec
import uvloop
from prometheus_client import CollectorRegistry, ProcessCollector

import disaggd
from disaggd.api_keys import KeyFile
from disaggd.cluster.dispatcher import Dispatcher
from disaggd.cluster.hello import PROTOCOL_VERSION, NodeHello, RouterHello
from disaggd.cluster.link import RouterLink, dial
from disaggd.cluster.link_settings import LinkSettings, link_settings
from disaggd.cluster.moves import DECODE_PATIENCE_S
from disaggd.cluster.peers import DecodePeer, Duty, PairState, PrefillPeer
from disaggd.cluster.protocol import BlockList, Gauges, RefusedLinks, SlowThread, ToRouter
from disaggd.cluster.request import Request, RoutedSequence
from disaggd.config import Config, NodeConfig
from disaggd.errors import ConfigError, HelloRefused, Overloaded, Unavailable
from disaggd.gateway.access import Access
from disaggd.gateway.app import create_app
from disaggd.gateway.backend import Deltas, GenerationRequest
from disaggd.gateway.cuts import Cuts
from disaggd.gateway.limits import GatewayLimits
from disaggd.gateway.tokenizer import read_tokenizer
from disaggd.ids import Incarnation, NodeName, SeqId
from disaggd.model.directory import ModelDirectory, open_directory
from disaggd.model.spec import ModelSpec
from disaggd.observe.metrics import Metrics
from disaggd.observe.receipts import Receipt
from disaggd.roles.assembly import dispatch_rules
from disaggd.roles.block_survey import BlockSurvey, shown
from disaggd.roles.checkups import Checkups
from disaggd.roles.http_server import HttpServer, bind, http_server
from disaggd.roles.observer import Observer, block_counts
from disaggd.roles.stopping import StopSignals
from disaggd.roles.unread import DeltaQueue, Unread, UnreadLimits
from disaggd.transfer.layout import kv_spec

log = logging.getLogger(__name__)

TICK_S = 0.1
GC_THRESHOLD = 50_000
"""Allocations between two collections: at 40,000 tokens a second the default of 700 collects every few milliseconds."""
STARTING_S = 20.0
"""A router that has just started is not ready until every node of the file is linked and paired, or this has passed."""
KEY_FILE_POLL_S = 1.0
LAST_WORDS_S = 1
"""The same after a second signal, when each stream's last event is an error."""
STOPPING = "the router is stopping"


class RouterBackend:
    """The cluster, as the gateway sees it."""

    def __init__(self, config: Config, node: NodeConfig, spec: ModelSpec, metrics: Metrics) -> None:
        self._config = config
        self._name = node.name
        self._spec = spec
        self.incarnation = Incarnation(uuid.uuid4().hex[:16])
        self.dispatcher = Dispatcher(
            self.incarnation,
            dispatch_rules(config, spec.vocab_size),
            time.monotonic,
            self._on_update,
        )
        self._observer = Observer(self.model_name, node.name, config.router, metrics, time.monotonic, time.time)
        self._survey = BlockSurvey()
        self.checkups = Checkups(config, node.name, self.dispatcher)
        self._cuts = Cuts(metrics)
        self._unread = Unread(UnreadLimits(stream=config.router.max_unread_tokens, together=config.router.max_unread_tokens_in_all))
        self._running: dict[tuple[str, str | None], SeqId] = {}
        """The latest of each request id and API key: clients may use one twice at a time."""
        self._sequence_of: dict[int, SeqId] = {}
        """By `id()` of the GenerationRequest, which `generate` keeps alive."""
        self._starting_until = time.monotonic() + STARTING_S
        self._draining_since: float | None = None

    # ── the gateway's side ───────────────────────────────────────────────────────────────────────────────────────────

    @property
    def model_name(self) -> str:
        return self._config.model.served_name

    @property
    def max_model_len(self) -> int:
        return min(self._config.model.max_model_len or self._spec.max_position_embeddings, self._spec.max_position_embeddings)

    @property
    def vocab_size(self) -> int:
        return self._spec.vocab_size

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Deltas, None]:
        """See `Backend.generate`."""
        if self._draining_since is not None:
            raise Unavailable(STOPPING)
        if len(self.dispatcher.sequences) >= self._config.router.max_requests:
            raise Overloaded(f"{self._config.router.max_requests} sequences are in flight already ([router] max_requests)")
        deltas = DeltaQueue(self._unread, lambda why: self._give_up(seq, request.id, why))
        seq = self.dispatcher.submit(_asked(request), deltas)
        self._running[request.id, request.key] = seq
        self._sequence_of[id(request)] = seq
        try:
            while True:
                taken = await deltas.take()
                yield taken
                if taken[-1].finish_reason is not None:
                    return
        finally:
            self.dispatcher.end(seq, "abort")
            deltas.close()
            del self._sequence_of[id(request)]
            if self._running.get((request.id, request.key)) == seq:
                del self._running[request.id, request.key]

    def _give_up(self, seq: SeqId, request_id: str, why: str) -> None:
        """Its client leaves too much unread: nobody computes for it any more."""
        self._cuts.slow("unread", request_id, time.monotonic())
        self.dispatcher.end(seq, "abort", why)

    def stopped(self, request: GenerationRequest) -> None:
        """See `Backend.stopped`."""
        if (seq := self._sequence_of.get(id(request))) is not None:
            self.dispatcher.end(seq, "stop")

    def cut(self, request: GenerationRequest, why: str) -> None:
        """See `Backend.cut`."""
        if (seq := self._sequence_of.get(id(request))) is not None:
            self.dispatcher.end(seq, "abort", why)

    def receipt(self, request_id: str, key: str | None) -> Receipt | None:
        """See `Backend.receipt`."""
        seq = self._running.get((request_id, key))
        if seq is None and key is None:
            seq = next((seq for (running, _), seq in reversed(self._running.items()) if running == request_id), None)
        record = self.dispatcher.sequences.get(seq) if seq is not None else None
        return self._observer.find(request_id, key) if record is None else self._observer.receipt(record)

    def receipts(self, limit: int, key: str | None) -> list[Receipt]:
        """See `Backend.receipts`."""
        return self._observer.latest(limit, self.dispatcher.sequences.values(), key)

    def trace(self, seconds: float | None) -> Iterator[bytes]:
        """See `Backend.trace`."""
        return self._observer.trace(seconds, self.dispatcher.sequences.values())

    def why_not_ready(self) -> str | None:
        """No decode node is there; or, while the cluster starts, anything else that the file names is not; or the router drains."""
        if self._draining_since is not None:
            return STOPPING
        if time.monotonic() < self._starting_until:
            if missing := self._missing():
                return f"the cluster is starting: {', '.join(missing)}"
            self._starting_until = 0.0
        return self.dispatcher.why_closed

    def _missing(self) -> list[str]:
        """What is not there of a whole cluster: links, then the ways of KV."""
        linked = {*self.dispatcher.prefills, *self.dispatcher.decodes}
        nodes = [f"no link to {node.name} yet" for node in self._config.nodes_of("prefill", "decode") if node.name not in linked]
        pairs = [pair for pair in self.dispatcher.pairs if pair.state not in (PairState.READY, PairState.REFUSED)]
        return nodes or [f"no way for KV from {pair.writer} to {pair.target} yet" for pair in pairs]

    async def blocks(self) -> dict[str, object]:
        """See `Backend.blocks`."""
        peers: dict[NodeName, PrefillPeer | DecodePeer] = {**self.dispatcher.prefills, **self.dispatcher.decodes}
        answers = await self._survey.ask(peers)
        return {
            "nodes": [
                {
                    "name": node.name,
                    "state": "down" if node.name not in peers else "silent" if answers[node.name] is None else "answered",
                }
                for node in self._config.nodes_of("prefill", "decode")
            ],
            "blocks": [
                shown(name, self._request_id(holding.seq), holding) for name, holdings in answers.items() for holding in holdings or ()
            ],
        }

    async def check(self) -> dict[str, object]:
        """See `Backend.check`."""
        return dict(msgspec.to_builtins(await self.checkups.run()))

    def _request_id(self, seq: SeqId) -> str | None:
        """As its client knows it; None for what was long ago, or is another router's."""
        record = self.dispatcher.sequences.get(seq)
        return self._observer.request_id(seq) if record is None else record.request.id

    def cluster(self) -> dict[str, object]:
        """See `Backend.cluster`."""
        dispatcher = self.dispatcher
        peers: dict[NodeName, PrefillPeer | DecodePeer] = {**dispatcher.prefills, **dispatcher.decodes}
        return {
            "model": self.model_name,
            "router": self._name,
            "incarnation": self.incarnation,
            "state": "serving" if self._draining_since is None else "draining",
            "nodes": [
                {
                    "name": node.name,
                    "role": node.role,
                    "listen": str(node.listen),
                    "link": "up" if node.name in peers else "down",
                    **(_describe(peers[node.name]) if node.name in peers else {}),
                }
                for node in self._config.nodes_of("prefill", "decode")
            ],
            "pairs": [
                {"prefill": pair.writer, "decode": pair.target, "state": pair.state.value, "reason": pair.reason}
                for pair in dispatcher.pairs
                if pair.target in dispatcher.decodes
            ],
            "prefix_pairs": [
                {"decode": pair.writer, "prefill": pair.target, "state": pair.state.value, "reason": pair.reason}
                for pair in dispatcher.pairs
                if pair.target in dispatcher.prefills
            ],
            "prefill_queue": len(dispatcher.queue),
            "requests": len(dispatcher.sequences),
        }

    # ── the cluster's side ───────────────────────────────────────────────────────────────────────────────────────────

    def accept(self, node: NodeConfig, hello: NodeHello) -> None:
        """Raises HelloRefused naming the field of the KV geometry in which the node differs from the file."""
        expected = kv_spec(self._spec, node.block_size)
        for field in ("dtype", "block_size", "head_dim", "groups"):
            ours, theirs = getattr(expected, field), getattr(hello.kv, field)
            if ours != theirs:
                raise HelloRefused(f"kv.{field}", ours, theirs)

    def on_up(self, link: RouterLink) -> None:
        if link.peer.role == "prefill":
            self.dispatcher.prefill_up(PrefillPeer(link.name, link.peer, link.send))
        else:
            self.dispatcher.decode_up(DecodePeer(link.name, link.peer, link.send))
        self.checkups.node_up(link.name)
        self._observer.node_up(link.name, link.peer)

    def on_frame(self, link: RouterLink, frame: ToRouter) -> None:
        if isinstance(frame, RefusedLinks):
            return self._observer.refused_by(link.name, frame.cause, frame.total)
        if isinstance(frame, SlowThread):
            return self._observer.slow_thread(link.name, frame.thread, frame.seconds)
        if isinstance(frame, BlockList):
            return self._survey.on_list(link.name, frame)
        self.dispatcher.on_frame(link.name, frame)
        if isinstance(frame, Gauges):
            self._observer.gauges(link.name, link.peer, frame)
        return None

    def on_down(self, link: RouterLink, reason: str) -> None:
        self.checkups.node_down(link.name, reason)
        self._observer.node_down(link.name, link.peer, reason)
        self.dispatcher.node_down(link.name)
        if self._draining_since is not None:
            return
        if link.peer.role == "prefill" and not self.dispatcher.prefills:
            log.warning("no prefill node is left: decode nodes prefill by themselves")
        if link.peer.role == "decode" and not self.dispatcher.decodes:
            log.error("no decode node is left: requests wait for one for %g s, then fail", DECODE_PATIENCE_S)

    def on_refused(self, field: str) -> None:
        """This router and a node refused each other."""
        self._observer.refused_here(field)

    def drain(self) -> None:
        """Admit nothing more; what is under way after `drain_s` ends with an error that says why."""
        self._draining_since = time.monotonic()

    @property
    def is_drained(self) -> bool:
        return self._draining_since is not None and not self.dispatcher.sequences

    def end_all(self) -> None:
        """End every sequence that still runs, with an error for its client."""
        for seq in list(self.dispatcher.sequences):
            self.dispatcher.fail(seq, Unavailable(STOPPING))

    def tick(self) -> None:
        self.dispatcher.tick()
        self.checkups.tick()
        if self._draining_since is not None and time.monotonic() - self._draining_since > self._config.cluster.drain_s:
            if count := len(self.dispatcher.sequences):
                log.warning("%d under way are cut: drain_s is over", count)
            self.end_all()
        self._observer.tick(self.dispatcher)

    def _on_update(self, record: RoutedSequence) -> None:
        self._observer.ended(record, awaits_report=self.dispatcher.awaits_report(record))


def _asked(request: GenerationRequest) -> Request:
    return Request(
        id=request.id,
        prompt=tuple(request.tokens),
        sampling=request.sampling,
        override=request.policy,
        cache_salt=request.cache_salt,
        priority=request.priority,
        session=request.session,
        key=request.key,
    )


def _describe(peer: PrefillPeer | DecodePeer) -> dict[str, object]:
    gauges = peer.gauges
    load: dict[str, object] = {
        "state": "serving" if peer.duty is Duty.SERVING else "draining",
        "tp": peer.hello.num_ranks,
        "block_size": peer.hello.kv.block_size,
        "num_blocks": peer.hello.num_blocks,
        "incarnation": peer.hello.incarnation,
    }
    if gauges is None:
        return load
    return {**load, "waiting": gauges.waiting, "running": gauges.running, "queued": gauges.queued, "blocks": block_counts(gauges)}


# ── the process ──────────────────────────────────────────────────────────────────────────────────────────────────────


def run(config: Config, node: NodeConfig) -> None:
    """Serve the router until a signal has it drained. Raises DisaggdError, and KeyboardInterrupt after SIGINT."""
    directory = open_directory(config.model.path)
    uvloop.run(_serve(config, node, directory, directory.spec(config.model.dtype)))


async def _serve(config: Config, node: NodeConfig, directory: ModelDirectory, spec: ModelSpec) -> None:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    metrics = Metrics(registry, disaggd.__version__, config.model.served_name)
    backend = RouterBackend(config, node, spec, metrics)
    limits = GatewayLimits(max_body_bytes=config.router.max_body_bytes)
    key_file = KeyFile(config.router.api_keys) if config.router.api_keys is not None else None
    access = Access(metrics, None if key_file is None else key_file.read())
    open_metrics = config.router.metrics == "open"
    app = create_app(backend, read_tokenizer(directory.root, spec.vocab_size), metrics, limits, access, open_metrics=open_metrics)
    hello = RouterHello(PROTOCOL_VERSION, node.name, backend.incarnation, directory.served_id(config.model.weights))
    links = link_settings(config.cluster)
    server = http_server(app, config.router, metrics)
    listener = bind(node.listen)
    ending = _Ending(backend, server, config.cluster.drain_s)
    ending.signals.catch(asyncio.get_running_loop())
    gc.collect()
    gc.freeze()  # the tokenizer's tables and every module: nothing that a collection needs to walk again
    gc.set_threshold(GC_THRESHOLD)
    async with asyncio.TaskGroup() as tasks:
        background = [tasks.create_task(_tick(backend, server))]
        if key_file is not None:
            background.append(tasks.create_task(_follow_keys(key_file, access, metrics)))
        background += [tasks.create_task(_keep_link(engine, hello, backend, links)) for engine in config.nodes_of("prefill", "decode")]
        if config.exposed_without_keys(node):
            log.warning("anybody who reaches %s may use this cluster: see [router] api_keys", node.listen)
        log.info("router listens on %s://%s", config.router.scheme, node.listen)
        await server.serve(sockets=[listener])
        for task in background:
            task.cancel()
    ending.signals.raise_interrupt()


async def _tick(backend: RouterBackend, server: HttpServer) -> None:
    while True:
        await asyncio.sleep(TICK_S)
        backend.tick()
        if backend.is_drained:
            server.should_exit = True


class _Ending:
    """What signals do to a router: it serves on, refusing new requests, until the streams under way have ended."""

    def __init__(self, backend: RouterBackend, server: HttpServer, drain_s: float) -> None:
        self.signals = StopSignals(self._drain, self._end)
        self._backend = backend
        self._server = server
        self._drain_s = drain_s

    def _drain(self) -> None:
        self._backend.drain()
        if count := len(self._backend.dispatcher.sequences):
            log.info("draining: %d under way, for %g s at most; one more signal ends them at once", count, self._drain_s)

    def _end(self) -> None:
        """A second signal: each client still hears why. One more, or only the last bytes are to be sent: not even that."""
        if self._server.should_exit:
            os._exit(self.signals.exit_code)
        log.warning("ended at once by a second signal")
        self._backend.end_all()
        self._server.config.timeout_graceful_shutdown = LAST_WORDS_S
        self._server.should_exit = True


async def _follow_keys(file: KeyFile, access: Access, metrics: Metrics) -> None:
    """Keys are added and withdrawn without a restart. A file that cannot be read changes nothing, and is counted."""
    while True:
        await asyncio.sleep(KEY_FILE_POLL_S)
        if file.has_changed():
            try:
                keys = file.read()
            except ConfigError as error:
                metrics.count_unreadable_keys()
                log.error("%s; the API keys stay as they were", error)
            except Exception:
                metrics.count_unreadable_keys()
                log.exception("the API keys cannot be read and stay as they were")
            else:
                access.set_keys(keys)
                if keys:
                    log.info("%d API keys", len(keys))
                else:
                    log.warning("0 API keys: nobody may use this router")


async def _keep_link(engine: NodeConfig, hello: RouterHello, backend: RouterBackend, settings: LinkSettings) -> None:
    await dial(
        engine,
        hello,
        on_up=backend.on_up,
        on_frame=backend.on_frame,
        on_down=backend.on_down,
        on_refused=backend.on_refused,
        on_trouble=lambda error, why: backend.checkups.no_link(engine, error, why),
        settings=settings,
        accept=lambda theirs: backend.accept(engine, theirs),
    )
