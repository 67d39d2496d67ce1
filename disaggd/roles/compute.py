"""The compute thread of an engine node: `take inbox → tick → step → deliver`, and everything that thread owns.

It is the only thread that touches the engine, its blocks and the role's state. Links and the transfer thread post frozen
messages to its inbox; it answers through an outbox that crosses to asyncio once per turn.
"""

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NewType, Protocol

from disaggd.cluster.holdings import Holding
from disaggd.cluster.protocol import BlockList, CacheSnapshot, Dismiss, Draining, Gauges, ListBlocks, ToNode, ToRouter
from disaggd.engine.engine import Engine, SequenceOutput
from disaggd.engine.scheduler import StepPlan
from disaggd.pulse import Pulse
from disaggd.roles.cache_report import CacheReport
from disaggd.transfer.messages import TransferEvent

log = logging.getLogger(__name__)

GAUGES_PERIOD_S = 0.1
"""Changed gauges are sent at most this often."""

LinkId = NewType("LinkId", int)
"""One link to one router; a reconnect is a new link."""


@dataclass(frozen=True, slots=True)
class LinkUp:
    link: LinkId


@dataclass(frozen=True, slots=True)
class LinkDown:
    link: LinkId


@dataclass(frozen=True, slots=True)
class FrameIn:
    link: LinkId
    frame: ToNode


@dataclass(frozen=True, slots=True)
class Drain:
    """The node is to stop: finish what there is, and have the routers bring nothing new."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Leave the loop after this turn."""


Message = LinkUp | LinkDown | FrameIn | TransferEvent | Drain

Batch = list[tuple[LinkId, ToRouter]]


class Outbox:
    """Frames of one turn, in order. `post` takes the whole batch to the asyncio thread."""

    def __init__(self, post: Callable[[Batch], None]) -> None:
        self.links: set[LinkId] = set()
        self._post = post
        self._batch: Batch = []

    def send(self, link: LinkId, frame: ToRouter) -> None:
        """To one router; dropped if its link is down, as the frame would be on the wire."""
        if link in self.links:
            self._batch.append((link, frame))

    def broadcast(self, frame: ToRouter) -> None:
        """To every router."""
        self._batch.extend((link, frame) for link in sorted(self.links))

    def flush(self) -> None:
        if self._batch:
            batch, self._batch = self._batch, []
            self._post(batch)


class Role(Protocol):
    """What a prefill or a decode node does with its engine. Every method runs on the compute thread."""

    def link_up(self, link: LinkId) -> None: ...
    def link_down(self, link: LinkId) -> None: ...
    def on_frame(self, link: LinkId, frame: ToNode) -> None: ...
    def on_event(self, event: TransferEvent) -> None: ...
    def layers_done(self, plan: StepPlan, layers: range) -> None:
        """K and V of `layers` are in the pool for every chunk of `plan`, or a GPU was asked for them; called in the middle of a step."""

    def deliver(self, outputs: Sequence[SequenceOutput]) -> None: ...
    def tick(self) -> None:
        """Once a turn: whatever is due by the clock."""

    def next_deadline(self) -> float | None:
        """When `tick` has something to do next, if nothing comes in before."""

    def gauges(self) -> Gauges: ...
    def holdings(self) -> Iterable[Holding]:
        """The blocks that the gauges count as granted, held and quarantined."""

    @property
    def is_idle(self) -> bool:
        """Whether it has no sequence, and pushes nothing."""


class Compute:
    """What an engine node's compute thread does, a turn at a time: whoever drives it takes the inbox and knows what time it is."""

    def __init__(self, engine: Engine, role: Role, outbox: Outbox, clock: Callable[[], float]) -> None:
        self.pulse = Pulse()
        self._engine = engine
        self._role = role
        self._outbox = outbox
        self._clock = clock
        self._gauges: Gauges | None = None
        self._gauges_due = 0.0
        self._cache_reports: dict[LinkId, CacheReport] = {}
        self._undismissed: set[LinkId] | None = None
        """Routers that may still need this node, once it drains."""

    @property
    def is_drained(self) -> bool:
        """Whether the node was told to drain, every router has let it go, and it has nothing left."""
        return self._undismissed is not None and not self._undismissed and self._role.is_idle

    @property
    def has_work(self) -> bool:
        """Whether a turn would compute something though nothing came in."""
        return self._engine.has_work

    def next_deadline(self) -> float | None:
        """When a turn has something to do, if nothing comes in before."""
        due = [self._role.next_deadline(), self._gauges_due if self._role.gauges() != self._gauges else None]
        return min((at for at in due if at is not None), default=None)

    def handle(self, message: Message) -> None:
        match message:
            case FrameIn(link, ListBlocks(request)):
                self._outbox.send(link, BlockList(request, tuple(self._role.holdings())))
            case FrameIn(link, CacheSnapshot()):
                self._report_cache()
                self._send_snapshot(link)
            case FrameIn(link, Dismiss()):
                if self._undismissed is not None:
                    self._undismissed.discard(link)
            case FrameIn(link, frame):
                self._role.on_frame(link, frame)
            case LinkUp(link):
                self._outbox.links.add(link)
                if self._undismissed is not None:
                    self._ask_to_go(link)
                self._gauges = None  # a new router knows none yet
                self._report_cache()
                self._cache_reports[link] = CacheReport(self._engine.pool)
                self._send_snapshot(link)
                self._role.link_up(link)
            case LinkDown(link):
                self._outbox.links.discard(link)
                if self._undismissed is not None:
                    self._undismissed.discard(link)
                del self._cache_reports[link]
                self._role.link_down(link)
            case TransferEvent():
                self._role.on_event(message)
            case Drain():
                self._undismissed = set()
                for link in self._outbox.links:
                    self._ask_to_go(link)

    def turn(self) -> None:
        """Do what is due, compute one step, hand its tokens out."""
        self.pulse.beat()
        self._role.tick()
        self._outbox.flush()
        outputs = self._engine.step(self._layers_done)
        self._role.deliver(outputs)
        self._report_cache()
        self._report_gauges()
        self._outbox.flush()

    def _layers_done(self, plan: StepPlan, layers: range) -> None:
        self.pulse.beat()
        self._role.layers_done(plan, layers)

    def _ask_to_go(self, link: LinkId) -> None:
        assert self._undismissed is not None
        self._undismissed.add(link)
        self._outbox.send(link, Draining())

    def _send_snapshot(self, link: LinkId) -> None:
        """Once all changes up to now are reported: one that is undone later would be in the snapshot and in no change."""
        if self._engine.pool.hasher is not None:
            self._outbox.send(link, self._cache_reports[link].snapshot())

    def _report_cache(self) -> None:
        """What a step has left, and whose blocks were taken for it."""
        changes = self._engine.pool.take_changes()
        if changes.stored or changes.evicted:
            for link, report in self._cache_reports.items():
                self._outbox.send(link, report.changes(changes))

    def _report_gauges(self) -> None:
        gauges = self._role.gauges()
        now = self._clock()
        if gauges != self._gauges and now >= self._gauges_due:
            self._gauges, self._gauges_due = gauges, now + GAUGES_PERIOD_S
            self._outbox.broadcast(gauges)


class ComputeThread:
    """Runs a role's engine until `stop`. An error in here ends the node: `fail` is called with it, on this thread.

    `on_start` is called on it first; `drained`, once, when a node that drains has nothing left.
    """

    def __init__(
        self,
        engine: Engine,
        role: Role,
        outbox: Outbox,
        clock: Callable[[], float],
        fail: Callable[[BaseException], None],
        on_start: Callable[[], None] = lambda: None,
        drained: Callable[[], None] = lambda: None,
    ) -> None:
        self.inbox: queue.SimpleQueue[Message | Stop] = queue.SimpleQueue()
        self._compute = Compute(engine, role, outbox, clock)
        self._clock = clock
        self._fail = fail
        self._on_start = on_start
        self._drained = drained
        self._is_drained = False
        self._stopping = False
        self._thread = threading.Thread(target=self._main, name="compute", daemon=True)

    @property
    def pulse(self) -> Pulse:
        return self._compute.pulse

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Ask the loop to end and wait for it; False if it is still in a step after `timeout_s`."""
        self.inbox.put(Stop())
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        try:
            self._on_start()
            while not self._stopping:
                self.turn()
        except BaseException as error:  # noqa: BLE001  the thread's edge: the node fails whole, and says why
            self._fail(error)

    def turn(self) -> None:
        """Take what came in, do what is due, compute one step, hand its tokens out."""
        self._take_inbox()
        self._compute.turn()
        if self._compute.is_drained and not self._is_drained:
            self._is_drained = True
            self._drained()

    def _take_inbox(self) -> None:
        """Handle every message there is; with nothing to compute, wait for one, or for the next deadline."""
        try:
            message = self.inbox.get_nowait() if self._compute.has_work else self._wait()
            while True:
                self.pulse.beat()
                self._handle(message)
                message = self.inbox.get_nowait()
        except queue.Empty:
            return

    def _wait(self) -> Message | Stop:
        self.pulse.rest()
        return self.inbox.get(timeout=self._idle_s())

    def _idle_s(self) -> float | None:
        deadline = self._compute.next_deadline()
        return None if deadline is None else max(0.0, deadline - self._clock())

    def _handle(self, message: Message | Stop) -> None:
        if isinstance(message, Stop):
            self._stopping = True
        else:
            self._compute.handle(message)
