"""`TransferThread`: the thread that moves KV by NIXL. Takes commands, posts events; owns the agents, pushes and landings. An agent that is
being connected is lent to a thread of its own (`connecting.py`); no other thread uses NIXL.

Knows nothing of sequences, links or asyncio: events go to the compute thread's inbox. Both directions run in every node;
which commands come is the role's affair.
"""

import logging
import os
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Protocol

import msgspec

from disaggd.clock import lease_clock
from disaggd.errors import DisaggdError, ResourceError
from disaggd.pulse import Pulse
from disaggd.transfer import messages as m
from disaggd.transfer.agent import AgentMaker
from disaggd.transfer.cadence import Cadence
from disaggd.transfer.environment import has_device_down
from disaggd.transfer.incoming import RETRY_S, Incoming
from disaggd.transfer.layout import KVSpec, PoolPlace, in_fp8
from disaggd.transfer.outgoing import PUSH_TIMEOUT_S, Outgoing
from disaggd.transfer.path import Paths, Repacking
from disaggd.transfer.pool import Pool
from disaggd.transfer.ports import PortRange
from disaggd.transfer.share import Share
from disaggd.transfer.source import InPlace, OutOfReach, Sources, Staged, Staging

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 10.0


class TransferStats(msgspec.Struct, frozen=True):
    """Counts since the start, but for `num_agents`, which is now."""

    num_agents: int
    num_fences: int
    num_dropped_notifications: int
    sent_bytes: int
    landed_bytes: int


class Inbox(Protocol):
    """Where commands come in."""

    def put(self, command: m.TransferCommand) -> None: ...

    def take(self, timeout_s: float | None) -> list[m.TransferCommand]:
        """All that are there; waits for the first one until the timeout, None being for ever."""


class QueueInbox:
    """Of a thread that is told by others of its process."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[m.TransferCommand] = queue.SimpleQueue()

    def put(self, command: m.TransferCommand) -> None:
        self._queue.put(command)

    def take(self, timeout_s: float | None) -> list[m.TransferCommand]:
        commands: list[m.TransferCommand] = []
        try:
            commands.append(self._queue.get(timeout_s != 0, timeout_s))
            while True:
                commands.append(self._queue.get_nowait())
        except queue.Empty:
            return commands


class TransferThread:
    """Moves KV between this process's memory and its peers'.

    `pool_bytes` from `place` on are the pool, laid out as `kv` says of the heads that `rank` holds, of `num_ranks` that share the KV
    heads: what is pushed, and, without `staging`, what NIXL reads and peers write. With it NIXL knows of the staging memory alone. What
    has landed there it is the caller's to copy into the pool, and he may use it for grants or for pushes, not both. With `fp8_landing`
    peers write there, in fp8, and what has landed is the caller's to unpack. A pool that is not the host's (`is_hosts`) needs one of them.

    `repacking` is for peers whose blocks differ; without it they cannot be written to.

    `post` is called on the transfer thread, must be thread-safe and must not block. `on_start` is called there first: copies from a
    GPU need its context made current on each thread that asks for them. The UCX environment must be set (`environment.py`).
    """

    def __init__(
        self,
        place: PoolPlace,
        pool_bytes: int,
        kv: KVSpec,
        post: Callable[[m.TransferEvent], None],
        port_range: tuple[int, int],
        clock: Callable[[], float] = lease_clock,
        rank: int = 0,
        num_ranks: int = 1,
        on_start: Callable[[], None] = lambda: None,
        staging: Staging | None = None,
        push_timeout_s: float = PUSH_TIMEOUT_S,
        inbox: Inbox | None = None,
        repacking: Repacking | None = None,
        fp8_landing: PoolPlace | None = None,
        is_hosts: bool = True,
    ) -> None:
        share = Share(kv, rank, num_ranks)
        assert is_hosts or staging is not None or fp8_landing is not None, "NIXL is shown the host's memory only"
        sources = _sources(share, place, staging, is_hosts=is_hosts)
        assert sources.pool.num_bytes == pool_bytes, "the pool and its geometry disagree"
        if repacking is not None:
            sources = Paths(sources, repacking)
        landed = share if fp8_landing is None else Share(in_fp8(kv), rank, num_ranks)
        landing = Pool(fp8_landing or (place if staging is None else staging.place), landed.held)
        self.pulse = Pulse()
        self._post = post
        self._on_start = on_start
        self._inbox = inbox or QueueInbox()
        devices = os.environ.get("UCX_NET_DEVICES", "")
        open_agent = AgentMaker(PortRange(*port_range), lambda: has_device_down(devices))
        self._incoming = Incoming(landed, landing, partial(open_agent, [landing.region]), self._report, clock)
        self._outgoing = Outgoing(sources, partial(open_agent, sources.regions), self._report, clock, push_timeout_s)
        self._cadence = Cadence(clock)
        self._has_stirred = False
        self._thread = threading.Thread(target=self._main, name="transfer", daemon=True)

    @property
    def pulses(self) -> dict[str, Pulse]:
        """Of what may hang in a call of NIXL: the thread itself, and those that connect agents for it."""
        return {"transfer": self.pulse, "connecting": self._outgoing.connecting_pulse}

    def start(self) -> None:
        """Start the thread. Agents are made when pairs are opened or connected."""
        self._thread.start()

    def submit(self, command: m.TransferCommand) -> None:
        """Hand over a command, from any thread; wakes the transfer thread."""
        self._inbox.put(command)

    def stop(self) -> None:
        """End the thread and destroy its agents; what is in flight is lost. Raises `ResourceError` if it does not end."""
        self.submit(m.Stop())
        self._thread.join(STOP_TIMEOUT_S)
        if self._thread.is_alive():
            raise ResourceError(f"the transfer thread did not end within {STOP_TIMEOUT_S:.0f} s: NIXL hangs in a call")

    def stats(self) -> TransferStats:
        """A snapshot, from any thread: numbers that only the transfer thread writes."""
        return TransferStats(
            num_agents=self._incoming.num_agents + self._outgoing.num_agents,
            num_fences=self._incoming.num_fences,
            num_dropped_notifications=self._incoming.num_dropped,
            sent_bytes=self._outgoing.sent_bytes,
            landed_bytes=self._incoming.landed_bytes,
        )

    def _main(self) -> None:
        failure = self._serve_until_failure()
        try:
            self._outgoing.close_all()
            self._incoming.close_all()
        finally:  # whatever happens here, the node must hear that nobody moves KV any more
            if failure is not None:
                self._post(m.TransferFailed(failure))

    def _serve_until_failure(self) -> Exception | None:
        try:
            self._on_start()
            self._serve()
        except DisaggdError as error:
            return error
        except Exception as error:
            log.exception("the transfer thread has failed")
            # The traceback holds on to the agents, which could then not be destroyed.
            return error.with_traceback(None)
        return None

    def _serve(self) -> None:
        sleep_s: float | None = None
        while True:
            commands = self._take(sleep_s)
            arrived = self._incoming.poll()
            # A grant's `Expect` is submitted before the grant leaves the node, so before its first piece: commands that
            # came before the notifications were fetched must be taken before these are looked at.
            commands += self._take(0)
            for command in commands:
                if isinstance(command, m.Stop):
                    return
                self.pulse.beat()
                self._obey(command)
            self._incoming.retry()
            self._incoming.deliver(arrived)
            self._outgoing.poll()
            sleep_s = self._sleep_s(stirred=bool(commands or arrived))

    def _take(self, timeout_s: float | None) -> list[m.TransferCommand]:
        self.pulse.rest()
        try:
            return self._inbox.take(timeout_s)
        finally:
            self.pulse.beat()

    def _obey(self, command: m.TransferCommand) -> None:
        match command:
            case m.OpenPair():
                self._incoming.open(command)
            case m.Expect():
                self._incoming.expect(command)
            case m.Forget(token):
                self._incoming.forget(token)
            case m.Fence():
                self._incoming.fence(command)
            case m.ConnectPair():
                self._outgoing.connect(command)
            case m.BeginPush():
                self._outgoing.begin(command)
            case m.PushBlocks():
                self._outgoing.push_blocks(command)
            case m.FinishPush():
                self._outgoing.finish(command)
            case m.RenewLease(token):
                self._outgoing.renew(token)
            case m.CancelPush(token):
                self._outgoing.cancel(token)
            case m.QuiesceByWire():
                self._outgoing.quiesce_by_wire(command)
            case m.ClosePair(peer):
                self._outgoing.close(peer)
            case _:
                raise TypeError(f"not a transfer command: {command!r}")

    def _report(self, event: m.TransferEvent) -> None:
        self._has_stirred = True
        self._post(event)

    def _sleep_s(self, *, stirred: bool) -> float | None:
        stirred = stirred or self._has_stirred
        self._has_stirred = False
        if not self._incoming.num_agents and not self._outgoing.num_agents:
            return RETRY_S if self._incoming.is_lacking else None
        is_in_flight = self._outgoing.is_in_flight or self._outgoing.is_waiting or self._incoming.is_landing
        return self._cadence.sleep_s(stirred=stirred, in_flight=is_in_flight, expecting=self._incoming.is_expecting)


def _sources(share: Share, place: PoolPlace, staging: Staging | None, *, is_hosts: bool) -> Sources:
    """Of blocks that peers take as they are."""
    if staging is not None:
        return Staged(share, place, staging)
    return InPlace(share, place) if is_hosts else OutOfReach(share, place)
