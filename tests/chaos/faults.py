"""How each kind of fault is done to a running cluster, and undone. Runs on the driver's loop; what blocks goes to a thread.

`begin` returns once the fault is there, `mend` once what was broken is free to heal: a killed node is started, a stopped one runs.
"""

import asyncio
import signal
import subprocess

from tests.chaos.cluster import ChaosCluster
from tests.chaos.schedule import Fault
from tests.support.proxy import GOOD, Condition

STOP_S = 30.0
"""SIGTERM must end a node within this, after `drain_s`: a process that is short of processor time needs a while to end."""

SLOW_LINK = Condition(delay_s=0.08, bytes_per_s=60_000)
_RUNS_S, _STANDS_S = 0.02, 0.06
"""A slow process has a quarter of its time, in pieces."""


class NotStopped(Exception):
    """A node that SIGTERM did not end."""


class Injector:
    """The faults that are there now."""

    def __init__(self, cluster: ChaosCluster, drain_s: float) -> None:
        self._cluster = cluster
        self._drain_s = drain_s
        self._slowing: dict[str, asyncio.Task[None]] = {}
        self.down: set[str] = set()
        """Nodes that are dead because we killed them."""

    async def begin(self, fault: Fault) -> None:
        """Raises NotStopped."""
        match fault.part, fault.kind:
            case "wire", kind:
                await asyncio.to_thread(self._harm_wire, kind)
            case "link", kind:
                condition = {"cut": Condition(is_cut=True), "stall": Condition(is_stalled=True), "slow": SLOW_LINK}[kind]
                self._cluster.set_link(fault.victim, condition)
            case _, "kill" | "restart":
                self.down.add(fault.victim)
                await asyncio.to_thread(self._cluster.kill, fault.victim)
            case _, "terminate":
                self.down.add(fault.victim)
                await self._terminate(fault.victim)
            case _, "blink" | "freeze" | "hang":
                self._signal(fault.victim, signal.SIGSTOP)
            case _, "slow":
                self._slowing[fault.victim] = asyncio.create_task(self._slow(fault.victim))

    async def mend(self, fault: Fault) -> None:
        match fault.part, fault.kind:
            case "wire", _:
                assert self._cluster.wire is not None
                await asyncio.to_thread(self._cluster.wire.mend)
            case "link", _:
                self._cluster.set_link(fault.victim, GOOD)
            case _, "kill" | "restart" | "terminate":
                self._cluster.start_node(fault.victim)
                self.down.discard(fault.victim)
            case _, "slow":
                slowing = self._slowing.pop(fault.victim)
                slowing.cancel()
                await asyncio.gather(slowing, return_exceptions=True)
                self._signal(fault.victim, signal.SIGCONT)
            case _:
                self._signal(fault.victim, signal.SIGCONT)

    def _harm_wire(self, kind: str) -> None:
        assert self._cluster.wire is not None
        {"slow": self._cluster.wire.slow, "down": self._cluster.wire.down, "silent": self._cluster.wire.silent}[kind]()

    def _signal(self, name: str, number: signal.Signals) -> None:
        if self._cluster.is_running(name):  # else it has crashed, and whoever watches the processes says so
            self._cluster.kill(name, number)

    async def _terminate(self, name: str) -> None:
        self._signal(name, signal.SIGTERM)
        process = self._cluster.nodes[name].process
        assert process is not None
        try:
            await asyncio.to_thread(process.wait, self._drain_s + STOP_S)
        except subprocess.TimeoutExpired:
            await asyncio.to_thread(self._cluster.kill, name)
            raise NotStopped(f"SIGTERM did not end {name} within {self._drain_s + STOP_S:g} s") from None

    async def _slow(self, name: str) -> None:
        while True:
            self._signal(name, signal.SIGSTOP)
            await asyncio.sleep(_STANDS_S)
            self._signal(name, signal.SIGCONT)
            await asyncio.sleep(_RUNS_S)
