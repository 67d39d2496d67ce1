"""One chaos run: faults and requests as a seed has them, rests in between, and everything checked at each rest.

Runs on one asyncio loop. A rest lets faults heal and requests end, judges each of these, and looks at what the cluster still holds.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Sequence

import httpx

from tests.chaos.cluster import ChaosCluster, held, incarnations, missing
from tests.chaos.faults import Injector, NotStopped
from tests.chaos.ledger import Outcome, Spell, Verdict, judge
from tests.chaos.load import Load
from tests.chaos.report import FaultRecord, Finding, Report, began_at, ends_of, machine, served_again_s
from tests.chaos.schedule import DEADLY, Ask, Fault, Route, Tempo
from tests.chaos.watch import Reading, growths, read

TOGETHER = 3
"""Faults at once, never two of one victim."""
IDLE_S = 60.0
"""Requests are over: within this no block may be used, granted, held or quarantined. Fences take up to `quiesce_s`."""
POLL_S = 0.1
RECONNECT_S = 2.0
"""A lost link is there again within this, if both ends want it."""
STEADY_POLLS = 4
"""A link that has just died may look well for a moment: whole is what looks so this often, and since the first of these."""

ROUTES: tuple[Route, ...] = ("local", "remote")
PROBE_CASE = 9
"""A prompt of 900 tokens."""

Say = Callable[[str], None]


class Fatal(Exception):
    """The cluster is in no state to go on with."""


class Run:
    """A cluster that serves, and what is done to it."""

    def __init__(self, cluster: ChaosCluster, load: Load, tempo: Tempo, say: Say) -> None:
        self._cluster, self._load, self._tempo, self._say = cluster, load, tempo, say
        self._injector = Injector(cluster, tempo.drain_s)
        self._client = httpx.AsyncClient()
        self._active: dict[str, Fault] = {}
        """By victim: from just before its beginning until it has healed."""
        self._unmended: dict[str, Fault] = {}
        self._quiet_since_s = time.monotonic()
        """When the last fault was mended."""
        self._incarnations: dict[str, str] = {}
        """Of each node as it was when it was well."""
        self._changed = asyncio.Condition()
        self._until_s = math.inf
        """From then on no fault begins."""
        self._last_fault = -1
        self._fresh: list[tuple[Spell, float]] = []
        """Healed since the last rest: the spell, and when it was mended."""
        self._stalls: list[Spell] = []
        self.records: list[FaultRecord] = []
        self.verdicts: list[Verdict] = []
        self.readings: list[Reading] = []
        self.findings: list[Finding] = []
        self.num_rests = 0

    @property
    def num_stalls(self) -> int:
        """How often the machine stood still."""
        return len(self._stalls)

    async def go(self, faults: Sequence[Fault], rest_every: int, min_requests: int, seconds: float = math.inf) -> None:
        """All of `faults`, and at least so many requests, or as many as there is time for.

        Also stops early when the cluster is beyond use; the findings say why.
        """
        self._until_s = time.monotonic() + seconds
        try:
            await self._rest()
            for first in range(0, len(faults), rest_every):
                async with self._load.offered():
                    await self._inject(faults[first : first + rest_every])
                    if first + rest_every >= len(faults):
                        await self._until(lambda: self._is_late or len(self.verdicts) + self._load.num_waiting >= min_requests)
                await self._rest()
                if self._is_late:
                    break
        except Fatal as error:
            self._say(f"cannot go on: {error}")
        finally:
            await self._client.aclose()
        for growth in growths(self.readings):
            if growth.excess is not None:
                self._find("growth", growth.excess)

    @property
    def _is_late(self) -> bool:
        return time.monotonic() > self._until_s

    # ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _inject(self, faults: Sequence[Fault]) -> None:
        """One after another as their times come, up to `TOGETHER` at once; returns when all have healed."""
        try:
            async with asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(self._watch())
                running = []
                for fault in faults:
                    await asyncio.sleep(fault.wait_s)
                    if self._is_late:
                        break
                    async with self._changed:
                        await self._changed.wait_for(lambda fault=fault: self._has_room(fault))  # type: ignore[misc]
                    self._active[fault.victim] = self._unmended[fault.victim] = fault
                    self._last_fault = fault.index
                    running.append(tasks.create_task(self._suffer(fault)))
                await asyncio.gather(*running)
                watching.cancel()
        except ExceptionGroup as errors:
            fatal = errors.subgroup(Fatal)
            if fatal is None:
                raise
            raise fatal.exceptions[0] from None

    def _has_room(self, fault: Fault) -> bool:
        return len(self._active) < TOGETHER and fault.victim not in self._active

    async def _suffer(self, fault: Fault) -> None:
        """The whole life of one fault."""
        began_s, before = time.monotonic(), self._incarnations.get(fault.victim)
        try:
            await self._injector.begin(fault)
        except NotStopped as error:
            self._find("not_stopped", str(error))
        await asyncio.sleep(fault.hold_s)
        await self._injector.mend(fault)
        del self._unmended[fault.victim]
        mended_s = self._quiet_since_s = time.monotonic()
        healed_s = await self._heal(fault, before if fault.kind in DEADLY else None)
        self._fresh.append((Spell(fault, began_s, healed_s, time.monotonic()), mended_s))
        self._say(f"fault {fault.index}: {fault.title}; whole again {healed_s - mended_s:.1f} s later")
        async with self._changed:
            del self._active[fault.victim]
            self._changed.notify_all()

    async def _heal(self, fault: Fault, before: str | None) -> float:
        """Returns when all was there again that no other fault concerns, and no victim of incarnation `before`.

        Fatal if that takes too long with nothing wrong any more.
        """
        lacks: list[str] = []
        since_s, num_whole = 0.0, 0
        while num_whole < STEADY_POLLS:
            now = time.monotonic()
            lacks = await self._lacks(fault, before)
            since_s, num_whole = (since_s, num_whole + 1) if num_whole and not lacks else (now, int(not lacks))
            if lacks and not self._unmended and now - self._quiet_since_s > self._tempo.heal_s:
                self._find("not_healed", f"{self._tempo.heal_s:g} s after {fault.title}: {', '.join(lacks)}")
                raise Fatal(f"not whole after {fault.title}")
            await asyncio.sleep(POLL_S)
        return since_s

    async def _lacks(self, fault: Fault, before: str | None) -> list[str]:
        """What is not there that this fault concerned."""
        view = None if "router" in self._unmended else await self._cluster.view(self._client)
        if view is None:
            return ["the router"]
        seen = incarnations(view)
        if before is not None and seen.get(fault.victim) == before:
            return [f"the new {fault.victim}"]
        lacks = missing(view, frozenset(self._active.keys() - {fault.victim}))
        if not lacks:
            self._incarnations |= {name: seen[name] for name in seen.keys() - self._unmended.keys()}
        return lacks

    async def _watch(self) -> None:
        """Fatal when a process ends that we did not end. Also notes when this very task was not given the processor for long."""
        while True:
            self._check_processes()
            asleep_s = time.monotonic()
            await asyncio.sleep(POLL_S)
            late_s = time.monotonic() - asleep_s - POLL_S
            if late_s > self._tempo.loss_s / 3:
                self._note_stall(asleep_s, late_s)

    def _note_stall(self, since_s: float, late_s: float) -> None:
        """The whole machine stood still, or we did, through whom all links go: they may be lost, without a fault of the cluster's."""
        self._say(f"the machine stood still for {late_s:.1f} s")
        fault = Fault(index=-1, part="machine", kind="stall", victim="machine", wait_s=0.0, hold_s=late_s)
        self._stalls.append(Spell(fault, since_s - self._tempo.loss_s, since_s + late_s + self._tempo.loss_s + RECONNECT_S))

    def _check_processes(self) -> None:
        for node in self._cluster.nodes.values():
            if node.name not in self._injector.down and not self._cluster.is_running(node.name):
                assert node.process is not None
                self._find("crash", f"{node.name} ended with {node.process.returncode}:\n{self._cluster.tail(node.name)}")
                raise Fatal(f"{node.name} is dead")

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._check_processes()
            await asyncio.sleep(POLL_S)

    # ── rests ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _rest(self) -> None:
        """Nothing is wrong and nobody asks: judge what was answered, count what is held, and ask once more each way."""
        outcomes = self._load.take_outcomes()
        spells = [spell for spell, _ in self._fresh] + self._stalls
        for outcome in outcomes:
            self._settle(judge(outcome, self._load.case_of(outcome.ask), spells))
        await self._check_idle()
        self._record([*outcomes, *await self._probe()])
        await self._check_idle()
        self._check_logs()
        now = time.monotonic()
        self.readings += [read(node.name, node.pid, now) for node in self._cluster.nodes.values()]
        self.num_rests += 1
        ends = ", ".join(f"{count} {end}" for end, count in ends_of(self.verdicts).items())
        self._say(
            f"rest {self.num_rests}: {len(self.records)} faults, {len(self.verdicts)} requests ({ends}), {len(self.findings)} findings"
        )

    def _record(self, outcomes: Sequence[Outcome]) -> None:
        """How long after each fault somebody was served: `outcomes` are all since the last rest, the probes included."""
        for spell, mended_s in self._fresh:
            again_s = served_again_s(spell, outcomes)
            self.records.append(FaultRecord(spell=spell, mended_s=mended_s, served_again_s=again_s))
            if again_s is None or again_s > spell.fault.hold_s + self._tempo.heal_s:
                self._find("not_served", f"{spell.fault.title}: the next answer came after {again_s} s")
        self._fresh = []

    def _settle(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)
        if verdict.finding is not None:
            ask = verdict.outcome.ask
            self._find(verdict.finding, f"request {ask.index} ({verdict.outcome.request_id}, {ask}): {verdict.why}")

    async def _check_idle(self) -> None:
        """No request is known any more, and every block is free or cached."""
        end_s = time.monotonic() + IDLE_S
        while True:
            held = await self._held()
            if not held or time.monotonic() > end_s:
                break
            await asyncio.sleep(POLL_S)
        for kind, what in held:
            self._find(kind, f"{IDLE_S:g} s after the last request: {what}")

    async def _held(self) -> list[tuple[str, str]]:
        """What is not as it is in an idle cluster: the kind of finding, and its words."""
        view = await self._cluster.view(self._client)
        if view is None:
            return [("idle", "the router does not answer")]
        self._incarnations = incarnations(view)
        return held(view)

    async def _probe(self) -> list[Outcome]:
        """A request of each way: both must come out right, with nothing to excuse them."""
        outcomes = []
        for route in ROUTES:
            salt = f"probe-{self.num_rests}-{route}"
            ask = Ask(index=-1, case=PROBE_CASE, salt=salt, stream=True, logprobs=True, route=route, manner="read", after=0, wait_s=0.0)
            outcome = await self._load.one(ask)
            self._settle(judge(outcome, self._load.case_of(ask), ()))
            await self._check_way(outcome, route)
            outcomes.append(outcome)
        self._load.take_outcomes()
        return outcomes

    async def _check_way(self, outcome: Outcome, route: str) -> None:
        with contextlib.suppress(httpx.TransportError):
            receipt = (await self._client.get(f"{self._cluster.url}/v1/requests/{outcome.request_id}")).json()
            if receipt.get("decision") != route:
                self._find("not_healed", f"a request that was to be prefilled {route} was not: {receipt}")

    def _check_logs(self) -> None:
        for name in self._cluster.nodes:
            text = self._cluster.log(name).read_text()
            if "Traceback" in text:
                self._find("traceback", f"{name}:\n{text[text.index('Traceback') :][:3000]}")
                with self._cluster.log(name).open("a") as log:
                    log.truncate(0)  # it is reported: what comes next is news

    def _find(self, kind: str, what: str) -> None:
        self.findings.append(Finding(kind=kind, after_fault=self._last_fault, what=what))
        self._say(f"FINDING after fault {self._last_fault}: {kind}: {what}")


def report_of(run: Run, *, seed: int, tempo: str, began_s: float, has_wire: bool) -> Report:
    """`began_s`: monotonic."""
    return Report(
        seed=seed,
        tempo=tempo,
        began=began_at(began_s),
        machine=machine(),
        seconds=time.monotonic() - began_s,
        has_wire=has_wire,
        faults=run.records,
        requests=len(run.verdicts),
        ends=ends_of(run.verdicts),
        growths=growths(run.readings),
        rests=run.num_rests,
        stalls=run.num_stalls,
        findings=run.findings,
    )
