"""An engine node's process: links on the asyncio thread, the engine on the compute thread, NIXL on the transfer thread.

This module starts the three, carries frames between links and the compute thread's inbox, and ends them in order. What
the frames mean is the role's matter (`prefill.py`, `decode.py`).
"""

import asyncio
import gc
import itertools
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from disaggd.clock import lease_clock
from disaggd.cluster.hello import PROTOCOL_VERSION, NodeHello, RouterHello
from disaggd.cluster.link import LinkServer, NodeLink, serve_links
from disaggd.cluster.link_settings import link_settings
from disaggd.cluster.protocol import RefusedLinks, SlowThread, ToNode
from disaggd.config import Config, NodeConfig
from disaggd.engine.build import LoadedEngine, OnRankLost, load_engine
from disaggd.engine.kv_repack import make_repacker
from disaggd.engine.rank_orders import HostMemory
from disaggd.engine.self_measurement import measure_steps
from disaggd.errors import EXIT_RESOURCE, DisaggdError
from disaggd.ids import Incarnation
from disaggd.model.directory import open_directory
from disaggd.open_files import allow_files
from disaggd.roles.compute import Batch, ComputeThread, Drain, FrameIn, LinkDown, LinkId, LinkUp, Outbox, Role
from disaggd.roles.repacking import check_repacking, repack_settings
from disaggd.roles.stopping import StopSignals
from disaggd.roles.watchdog import SLOW_S, Watchdog
from disaggd.transfer.joint import JointTransfers
from disaggd.transfer.landing_memory import LandingMemory
from disaggd.transfer.messages import TransferCommand, TransferEvent, TransferFailed
from disaggd.transfer.remote import RankSettings, RemoteTransfers, rank_transfers
from disaggd.transfer.share import Share
from disaggd.transfer.thread import TransferThread

log = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.0005
"""Three threads share the GIL; the 5 ms default convoys them (step p99 14 ms against 7.6 ms)."""

MAX_FILES = 4096
"""Links, strangers at the port, and NIXL's sockets, of which each peer has some."""

STOP_TIMEOUT_S = 10.0
"""A step under way may finish; then the process goes, whatever is left."""

FAILED_STOP_TIMEOUT_S = 0.5
"""What a step would still give nobody wants then."""

MakeRole = Callable[[LoadedEngine, LandingMemory | None, Outbox, Callable[[TransferCommand], None]], Role]


class EngineNode:
    """One prefill or decode node, from its start to its end."""

    def __init__(self, config: Config, node: NodeConfig, make_role: MakeRole) -> None:
        self._config = config
        self._node = node
        self._incarnation = Incarnation(uuid.uuid4().hex)
        self._links: dict[LinkId, NodeLink] = {}
        self._refused: dict[str, int] = {}
        """Links, by cause."""
        self._link_ids: dict[NodeLink, LinkId] = {}
        self._counter = itertools.count(1)
        self._signals = StopSignals(self._drain, self._end_at_once)
        self._link_settings = link_settings(config.cluster)
        self._ended = asyncio.Event()
        self._failure: BaseException | None = None
        self._loop = asyncio.get_running_loop()
        self._loaded = _on_a_thread_of_its_own(lambda: _load(config, node, self._fail))
        self._transfer = transfers_of(config, node, self._loaded, self._on_transfer_event)
        outbox = Outbox(lambda batch: self._call_soon(self._send, batch))
        role = make_role(self._loaded, self._loaded.landing, outbox, self._transfer.submit)
        self._compute = ComputeThread(
            self._loaded.engine,
            role,
            outbox,
            lease_clock,
            self._fail,
            on_start=self._loaded.stream.enter,
            drained=lambda: self._call_soon(self._ended.set),
        )
        pulses = {"compute": self._compute.pulse, **self._transfer.pulses}
        self._watchdog = Watchdog(pulses, config.cluster.stuck_s, self._on_slow_thread, self._end_stuck)

    async def serve(self) -> None:
        """Run until a signal has it drained, or a failure, which is raised. If it was SIGINT, KeyboardInterrupt is."""
        self._signals.catch(self._loop)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        gc.collect()
        gc.freeze()  # weights, modules, the block pool: nothing that a collection needs to walk again
        self._transfer.start()
        self._compute.start()
        server: LinkServer | None = None
        watching = self._loop.create_task(self._watchdog.run())
        try:
            server = await self._listen()
            ranks = f", {self._node.tp} ranks" if self._node.tp > 1 else ""
            log.info("%s node ready at %s: %d blocks of %d tokens%s", self._node.role, self._node.listen, *self._pool_size(), ranks)
            await self._ended.wait()
        finally:
            watching.cancel()
            if server is not None:
                await server.close()
            await asyncio.to_thread(self._stop_threads)
        if self._failure is not None:
            raise self._failure
        self._signals.raise_interrupt()

    def _pool_size(self) -> tuple[int, int]:
        pool = self._loaded.engine.pool
        return pool.num_blocks, pool.block_size

    async def _listen(self) -> LinkServer:
        return await serve_links(
            self._node.listen,
            hello=self._hello,
            on_up=self._on_link_up,
            on_frame=self._on_frame,
            on_down=self._on_link_down,
            on_refused=self._on_link_refused,
            settings=self._link_settings,
        )

    def _stop_threads(self) -> None:
        """Raises `ResourceError` if the transfer thread does not end; the ranks end all the same."""
        limit_s = STOP_TIMEOUT_S if self._failure is None else FAILED_STOP_TIMEOUT_S
        try:
            if not self._compute.stop(limit_s):
                log.warning("the step under way did not end within %g s", limit_s)
            self._transfer.stop()
        finally:
            self._loaded.close()

    # ── the end (asyncio thread) ─────────────────────────────────────────────────────────────────────────────────────

    def _drain(self) -> None:
        limit_s = self._config.cluster.drain_s
        log.info("draining: it ends when nothing is left here, or in %g s; one more signal ends it at once", limit_s)
        self._compute.inbox.put(Drain())
        self._loop.call_later(limit_s, self._drained_too_late)

    def _drained_too_late(self) -> None:
        if not self._ended.is_set():
            log.warning("not drained within %g s: routers take what is left elsewhere", self._config.cluster.drain_s)
            self._ended.set()

    def _end_at_once(self) -> None:
        """Whatever its threads are doing: nothing waits for them. That the process is gone is what stops its peers' writes."""
        log.warning("ended at once by a second signal")
        os._exit(self._signals.exit_code)

    def _on_slow_thread(self, thread: str, seconds: float) -> None:
        if not seconds:
            log.info("the %s thread gets on again", thread)
        elif seconds == SLOW_S:
            log.warning("the %s thread has not got on for %g s", thread, seconds)
        for link in self._links.values():
            link.send(SlowThread(thread, seconds))

    def _end_stuck(self, thread: str) -> None:
        """Its routers go on elsewhere; whoever keeps the process starts it anew."""
        log.error("the %s thread is stuck: nothing from it for %g s; this node ends", thread, self._config.cluster.stuck_s)
        os._exit(EXIT_RESOURCE)

    # ── links (asyncio thread) ───────────────────────────────────────────────────────────────────────────────────────

    def _hello(self, theirs: RouterHello) -> NodeHello:
        """What this node is; the link refuses a router that serves another model, the router a geometry that is not its own."""
        assert self._node.role != "router"
        return NodeHello(
            PROTOCOL_VERSION,
            self._node.name,
            self._node.role,
            self._incarnation,
            self._loaded.directory.served_id(self._config.model.weights),
            self._loaded.kv_spec,
            self._loaded.engine.pool.num_blocks,
            self._loaded.engine.limits.max_model_len,
            self._config.pushes_prefixes(self._node),
            self._node.tp,
            self._config.lands_in_fp8(self._node),
        )

    def _on_link_up(self, link: NodeLink) -> None:
        link_id = LinkId(next(self._counter))
        self._links[link_id], self._link_ids[link] = link, link_id
        for cause, total in self._refused.items():
            link.send(RefusedLinks(cause, total))
        self._compute.inbox.put(LinkUp(link_id))

    def _on_frame(self, link: NodeLink, frame: ToNode) -> None:
        self._compute.inbox.put(FrameIn(self._link_ids[link], frame))

    def _on_link_down(self, link: NodeLink, reason: str) -> None:
        link_id = self._link_ids.pop(link)
        del self._links[link_id]
        self._compute.inbox.put(LinkDown(link_id))

    def _on_link_refused(self, cause: str, total: int) -> None:
        self._refused[cause] = total
        for link in self._links.values():
            link.send(RefusedLinks(cause, total))

    def _send(self, batch: Batch) -> None:
        for link_id, frame in batch:
            if (link := self._links.get(link_id)) is not None:
                link.send(frame)

    # ── other threads ────────────────────────────────────────────────────────────────────────────────────────────────

    def _on_transfer_event(self, event: TransferEvent) -> None:
        if isinstance(event, TransferFailed):
            self._fail(event.error)
        else:
            self._compute.inbox.put(event)

    def _fail(self, error: BaseException) -> None:
        if not isinstance(error, DisaggdError):
            log.error("this node fails whole: %s", error, exc_info=error)
        self._call_soon(self._end, error)

    def _end(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self._ended.set()

    def _call_soon(self, function: Callable[..., None], *args: object) -> None:
        """Onto the asyncio thread, which may have ended already when this node is stopping."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)


def host_memory(config: Config, node: NodeConfig) -> HostMemory:
    """What the node's KV goes through: a pool in the host's own memory needs none, and what lands in fp8 lands beside the pool.

    A GPU's node that KV comes to in fp8 writes none to others, so it needs nothing else.
    """
    if config.lands_in_fp8(node):
        return HostMemory(fp8_bytes=config.transfer.staging)
    return HostMemory(staging_bytes=config.transfer.staging if node.is_gpu else None)


def transfers_of(
    config: Config, node: NodeConfig, loaded: LoadedEngine, post: Callable[[TransferEvent], None]
) -> TransferThread | JointTransfers:
    """What moves the node's KV: this process's thread, and, if it has more ranks, theirs, spoken to as one."""
    rank, num_ranks = loaded.rank, 1 if loaded.followers is None else 1 + len(loaded.followers.side_pipes)
    held = Share(loaded.kv_spec, 0, num_ranks).held
    settings = repack_settings(config, node)
    repacking = None if settings is None else settings.made(held, partial(make_repacker, rank.kv))

    def make(post: Callable[[TransferEvent], None]) -> TransferThread:
        return TransferThread(
            place=rank.place,
            pool_bytes=rank.kv.nbytes,
            kv=loaded.kv_spec,
            post=post,
            port_range=config.transfer.port_range,
            num_ranks=num_ranks,
            on_start=loaded.stream.enter,
            staging=rank.staging,
            is_hosts=not rank.kv.is_cuda,
            push_timeout_s=config.transfer.push_timeout_s,
            repacking=repacking,
            fp8_landing=rank.fp8_landing,
        )

    if loaded.followers is None:
        return make(post)
    return JointTransfers(make, [partial(RemoteTransfers, pipe) for pipe in loaded.followers.side_pipes], post, loaded.stream.enter)


def _load(config: Config, node: NodeConfig, on_rank_lost: OnRankLost) -> LoadedEngine:
    """The node's engine, which knows what its steps take if the file says so."""
    check_repacking(config, node, open_directory(config.model.path).spec(config.model.dtype))
    settings = RankSettings(
        port_range=config.transfer.port_range,
        push_timeout_s=config.transfer.push_timeout_s,
        stuck_s=config.cluster.stuck_s,
        switch_interval_s=SWITCH_INTERVAL_S,
        repack=repack_settings(config, node),
    )
    loaded = load_engine(config, node, partial(rank_transfers, settings), host_memory(config, node), on_rank_lost)
    if config.disaggregation.self_measurement:
        measure_steps(loaded.engine, time.monotonic)
    return loaded


def _on_a_thread_of_its_own(load: Callable[[], LoadedEngine]) -> LoadedEngine:
    """Runs `load` on a thread that then ends, and with it the OpenMP workers that it got.

    Were they still there beside the compute thread's own, OpenMP would count more threads than processors and have each go to sleep
    between any two kernels: 8.8 ms a step of a small model on two threads instead of 6.9.
    """
    outcome: Future[LoadedEngine] = Future()

    def run() -> None:
        try:
            outcome.set_result(load())
        except BaseException as error:  # noqa: BLE001  carried to whoever waits
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="load", daemon=True)
    thread.start()
    thread.join()
    return outcome.result()


async def run_engine_node(config: Config, node: NodeConfig, make_role: MakeRole) -> None:
    """Serve `node` until it is told to end. Raises DisaggdError for what the operator can mend."""
    allow_files(MAX_FILES)
    await EngineNode(config, node, make_role).serve()
