"""What a run came to: JSON for machines, Markdown for docs/reliability.md."""

import platform
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import msgspec

from tests.chaos.ledger import Outcome, Spell, Verdict
from tests.chaos.schedule import Cell
from tests.chaos.watch import Growth

TROUBLES = ("crash", "traceback", "not_healed", "not_served", "not_stopped", "idle")
"""Kinds of findings that are about the cluster as a whole."""


class FaultRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One fault that was injected."""

    spell: Spell
    mended_s: float
    """When it was undone; monotonic seconds, as all times here."""
    served_again_s: float | None
    """From its beginning to the first complete answer to a request that came after that; None if there was none, not even at the rest."""

    @property
    def heal_s(self) -> float:
        """From its end until every link and KV path that no other fault concerned was there again."""
        return self.spell.healed_s - self.mended_s


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something that must not be."""

    kind: str
    """lost, wrong, unexcused (requests); blocks, growth, crash, not_healed, not_served, not_stopped, traceback, idle (the cluster)."""
    after_fault: int
    """The index of the last fault that had begun: where to look when the seed is run again."""
    what: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run."""

    seed: int
    tempo: str
    began: str
    """Date and time, UTC."""
    machine: str
    seconds: float
    has_wire: bool
    faults: list[FaultRecord]
    requests: int
    ends: dict[str, int]
    growths: list[Growth]
    rests: int
    stalls: int
    """How often the machine stood still: it was not quiet."""
    findings: list[Finding]

    def count(self, *kinds: str) -> int:
        return sum(finding.kind in kinds for finding in self.findings)


def ends_of(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """How many requests ended in each way."""
    return dict(Counter(verdict.outcome.end for verdict in verdicts).most_common())


def served_again_s(spell: Spell, outcomes: Iterable[Outcome]) -> float | None:
    """See `FaultRecord`."""
    ends = [one.ended_s for one in outcomes if one.end == "complete" and one.began_s >= spell.began_s]
    return min(ends) - spell.began_s if ends else None


def markdown(report: Report) -> str:
    """The tables of docs/reliability.md."""
    return "\n\n".join([_summary(report), _cells(report), _growths(report.growths)])


def _summary(report: Report) -> str:
    rows = [
        ("run", f"seed {report.seed}, tempo {report.tempo}, {report.began}, {report.seconds / 60:.0f} min, {report.machine}"),
        ("faults", f"{len(report.faults)}"),
        ("times that the machine itself stood still", f"{report.stalls}"),
        ("requests", f"{report.requests}: " + ", ".join(f"{count} {end.replace('_', ' ')}" for end, count in report.ends.items())),
        ("lost without an explicit error", f"{report.count('lost')}"),
        ("wrong tokens", f"{report.count('wrong')}"),
        ("errors that no fault excuses", f"{report.count('unexcused')}"),
        ("times at rest, with every block accounted for", f"{report.rests}"),
        ("leaked blocks", f"{report.count('blocks')}"),
        ("processes whose fds, threads or RSS grew", f"{report.count('growth')}"),
        ("crashes, tracebacks, nodes that did not heal, serve or stop in time", f"{report.count(*TROUBLES)}"),
    ]
    return table(("", ""), rows)


def _cells(report: Report) -> str:
    cells: dict[Cell, list[FaultRecord]] = {}
    for record in report.faults:
        fault = record.spell.fault
        cells.setdefault(Cell(fault.part, fault.kind), []).append(record)
    rows = []
    for cell, records in sorted(cells.items(), key=lambda item: (item[0].part, item[0].kind)):
        served = [record.served_again_s for record in records if record.served_again_s is not None]
        heals = [record.heal_s for record in records]
        rows.append((cell.part, cell.kind, str(len(records)), _spread(served), _spread(heals)))
    return table(("part", "fault", "times", "next answer, s (median, max)", "whole again, s (median, max)"), rows)


def _growths(growths: Sequence[Growth]) -> str:
    rows = [
        (
            one.node,
            str(one.readings),
            *(_change(one.readings, *pair) for pair in (one.fds, one.threads, (one.rss_bytes[0] / 2**20, one.rss_bytes[1] / 2**20))),
        )
        for one in growths[:8]
    ]
    return table(("process", "readings", "fds", "threads", "RSS, MiB"), rows)


def _change(readings: int, first: float, last: float) -> str:
    """One reading says nothing of growth."""
    return f"{first:.0f} → {last:.0f}" if readings > 1 else "–"


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.1f}, {max(values):.1f}" if values else "none"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> str:
    """The one that this runs on."""
    models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{len(models)} × {models[0]}" if models else platform.machine()


def began_at(began_s: float) -> str:
    """Date and time, UTC, of monotonic seconds."""
    return datetime.fromtimestamp(time.time() - time.monotonic() + began_s, UTC).strftime("%Y-%m-%d %H:%M")
