"""A run from its seed to its report: catalogue, wire, cluster, load, faults; everything gone again afterwards."""

import asyncio
import contextlib
import math
import time
from pathlib import Path

import msgspec

from tests.chaos import catalogue, schedule
from tests.chaos.cluster import ChaosCluster
from tests.chaos.load import Load
from tests.chaos.report import Report
from tests.chaos.run import Run, Say, report_of
from tests.support.oracle import Oracle
from tests.support.territory import has_namespaces, wired

TEMPOS = {"quick": schedule.QUICK, "standard": schedule.STANDARD}


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be done; the seed and this are the whole of it."""

    seed: int
    faults: int
    requests: int
    """At least so many; they come for as long as there are faults."""
    tempo: str
    rate: float
    """Requests per second."""
    cases: int
    """Different questions."""
    rest_every: int
    """Faults between two rests, at which all is checked."""
    minutes: float | None = None
    """No fault begins later than this; None: all come."""


def carry_out(plan: Plan, directory: Path, oracle: Oracle, say: Say) -> Report:
    """Nodes' logs stay in `directory`. Without root there is no wire to harm, and `say` is told so."""
    cases = catalogue.build(plan.cases, oracle)
    tempo = TEMPOS[plan.tempo]
    with contextlib.ExitStack() as stack:
        wire = stack.enter_context(wired()) if has_namespaces() else None
        say(f"seed {plan.seed}; " + ("the wire is ours" if wire is not None else "no faults of the wire: they want root, ip and tc"))
        cluster = ChaosCluster(directory, tempo, wire, oracle.kv_spec.bytes_per_block)
        faults = schedule.faults(plan.seed, plan.faults, tempo, has_wire=wire is not None)
        began_s = time.monotonic()

        async def run() -> Run:
            load = Load(cluster.url, cases, schedule.asks(plan.seed, plan.rate))
            async with cluster.serving(), contextlib.aclosing(load):
                run = Run(cluster, load, tempo, say)
                await run.go(faults, plan.rest_every, plan.requests, math.inf if plan.minutes is None else 60 * plan.minutes)
            return run

        return report_of(asyncio.run(run()), seed=plan.seed, tempo=plan.tempo, began_s=began_s, has_wire=wire is not None)
