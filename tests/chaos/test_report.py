"""The report says what happened, and counts every finding under its name."""

import msgspec

from tests.chaos.ledger import Outcome, Spell
from tests.chaos.report import TROUBLES, FaultRecord, Finding, Report, markdown, served_again_s
from tests.chaos.schedule import Ask, Fault
from tests.chaos.watch import Growth


def fault(index: int) -> Fault:
    return Fault(index=index, part="decode", kind="freeze", victim="d1", wait_s=0.5, hold_s=2.0)


def report(*findings: Finding) -> Report:
    return Report(
        seed=5,
        tempo="quick",
        began="2026-11-26 12:00",
        machine="2 × a processor",
        seconds=90.0,
        has_wire=True,
        faults=[
            FaultRecord(spell=Spell(fault(i), 10.0, 13.0 + i), mended_s=12.0, served_again_s=served)
            for i, served in enumerate([0.2, None, 0.6])
        ],
        requests=3,
        ends={"complete": 2, "left": 1},
        growths=[
            Growth(node="d0", pid=7, readings=9, fds=(40, 41), threads=(9, 9), rss_bytes=(500 << 20, 510 << 20)),
            Growth(node="d1", pid=8, readings=1, fds=(40, 40), threads=(9, 9), rss_bytes=(500 << 20, 500 << 20)),
        ],
        rests=4,
        stalls=0,
        findings=list(findings),
    )


def test_a_good_run_reports_noughts_and_times() -> None:
    text = markdown(report())
    assert "| requests | 3: 2 complete, 1 left |" in text
    assert "| decode | freeze | 3 | 0.4, 0.6 | 2.0, 3.0 |" in text
    assert "| lost without an explicit error | 0 |" in text
    assert "| d0 | 9 | 40 → 41 | 9 → 9 | 500 → 510 |" in text
    assert "| d1 | 1 | – | – | – |" in text


def test_every_kind_of_finding_is_counted_in_its_row() -> None:
    kinds = {
        "lost": "lost without an explicit error",
        "wrong": "wrong tokens",
        "unexcused": "errors that no fault excuses",
        "blocks": "leaked blocks",
        "growth": "processes whose fds, threads or RSS grew",
        **dict.fromkeys(TROUBLES, "crashes, tracebacks, nodes that did not heal, serve or stop in time"),
    }
    for kind, row in kinds.items():
        assert f"| {row} | 1 |" in markdown(report(Finding(kind=kind, after_fault=2, what="something")))


def test_a_report_can_be_read_again() -> None:
    before = report(Finding(kind="lost", after_fault=2, what="something"))
    assert msgspec.json.decode(msgspec.json.encode(before), type=Report) == before


def test_the_next_answer_is_that_of_a_request_that_came_after_the_fault() -> None:
    ask = Ask(index=0, case=0, salt="", stream=True, logprobs=True, route=None, manner="read", after=0, wait_s=0.0)

    def answered(began_s: float, ended_s: float, end: str = "complete") -> Outcome:
        return Outcome(ask=ask, began_s=began_s, ended_s=ended_s, end=end)  # type: ignore[arg-type]

    outcomes = [answered(9.9, 10.1), answered(10.5, 13.0), answered(11.0, 12.5), answered(10.1, 10.2, "refused")]
    assert served_again_s(Spell(fault(0), 10.0, 14.0), outcomes) == 2.5
    assert served_again_s(Spell(fault(0), 11.5, 14.0), outcomes) is None
