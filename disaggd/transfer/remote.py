"""`RemoteTransfers`: the transfer thread of another rank, at both ends of the pipe between its process and the first rank's.

Commands go one way, events and counts the other. The pipe is the thread's inbox itself: what was sent before a grant left the node is read
before any notification of that grant is looked at. Between the processes of one node, which one program started, pickles will do.
"""

import os
import select
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import msgspec

from disaggd.errors import EXIT_RESOURCE, ResourceError
from disaggd.pulse import Pulse
from disaggd.transfer import messages as m
from disaggd.transfer.path import RepackSettings
from disaggd.transfer.rank_kv import RankKV
from disaggd.transfer.thread import TransferStats, TransferThread

LOOK_EVERY_S = 1.0


class RemoteTransfers:
    """The first rank's end. That the other is gone is its owner's to find out: here, what is sent to it is lost."""

    def __init__(self, pipe: Connection, post: Callable[[m.TransferEvent], None]) -> None:
        self._pipe = pipe
        self._post = post
        self._stats = TransferStats(0, 0, 0, 0, 0)
        self._thread = threading.Thread(target=self._hear, name="rank's transfers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, command: m.TransferCommand) -> None:
        with suppress(OSError):
            self._pipe.send(command)

    def stop(self) -> None:
        """It is waited for with its process, which ends the pipe."""
        self.submit(m.Stop())

    def stats(self) -> TransferStats:
        return self._stats

    def _hear(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                event, self._stats = self._pipe.recv()
                self._post(event)


class PipeInbox:
    """The rank's end of it. When the first rank's process is gone, or this one has nothing more to compute, the thread is to stop."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._stop, self._told_to_stop = Pipe()

    def put(self, command: m.TransferCommand) -> None:
        assert isinstance(command, m.Stop), "all else is for the first rank to say"
        self._stop.send(command)

    def take(self, timeout_s: float | None) -> list[m.TransferCommand]:
        commands: list[m.TransferCommand] = []
        try:
            while pipes := self._with_commands(0 if commands else timeout_s):
                commands += [pipe.recv() for pipe in pipes]
        except (EOFError, OSError):
            commands.append(m.Stop())
        return commands

    def _with_commands(self, timeout_s: float | None) -> list[Connection]:
        """`Connection.poll` counts in whole milliseconds: twenty times what the thread sleeps while bytes move."""
        return select.select([self._pipe, self._told_to_stop], [], [], timeout_s)[0]


class RankSettings(msgspec.Struct, frozen=True):
    """What every rank's transfer thread of a node is made with."""

    port_range: tuple[int, int]
    push_timeout_s: float
    stuck_s: float
    """A thread that has not got on for so long ends its process, and the node with it."""
    switch_interval_s: float
    """Of the GIL, which the thread shares with the rank's computing."""
    repack: RepackSettings | None
    """None: nobody is written to."""


@contextmanager
def rank_transfers(settings: RankSettings, held: RankKV, pipe: Connection) -> Iterator[None]:
    """A rank's transfer thread, while the body runs in its process."""

    def post(event: m.TransferEvent) -> None:
        if isinstance(event, m.TransferFailed):
            event = m.TransferFailed(ResourceError(f"rank {held.rank} of {held.num_ranks}: {event.error}"))
        with suppress(OSError):  # the first rank is gone: the next look into the inbox ends the thread
            pipe.send((event, thread.stats()))

    thread = TransferThread(
        held.place,
        held.num_bytes,
        held.kv,
        post,
        settings.port_range,
        rank=held.rank,
        num_ranks=held.num_ranks,
        on_start=held.on_start,
        staging=held.staging,
        is_hosts=held.is_hosts,
        push_timeout_s=settings.push_timeout_s,
        inbox=PipeInbox(pipe),
        repacking=None if settings.repack is None else settings.repack.made(held.share.held, held.make_repacker),
        fp8_landing=held.fp8_landing,
    )
    sys.setswitchinterval(settings.switch_interval_s)
    thread.start()
    for pulse in thread.pulses.values():
        threading.Thread(target=_end_if_stuck, args=(pulse, settings.stuck_s), name="watchdog", daemon=True).start()
    yield
    thread.stop()


def _end_if_stuck(pulse: Pulse, stuck_s: float) -> None:
    """NIXL may hang in a call: then the first rank hears that this one has ended."""
    wait_until_stuck(pulse, stuck_s, threading.Event().wait)
    os._exit(EXIT_RESOURCE)


def wait_until_stuck(pulse: Pulse, stuck_s: float, pause: Callable[[float], object]) -> None:
    """Returns when the pulse has not beaten for so long. Counts looks, not time: a process that was stopped for a minute is not stuck."""
    seen, silent_s = pulse.count, 0.0
    while silent_s < stuck_s:
        pause(LOOK_EVERY_S)
        silent_s = 0.0 if pulse.is_resting or pulse.count != seen else silent_s + LOOK_EVERY_S
        seen = pulse.count
