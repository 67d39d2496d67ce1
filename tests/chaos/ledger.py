"""What a request may come to, given the faults that were about while it ran. Pure.

A request ends in one of two ways: with the oracle's very tokens, or with an explicit error that one of those faults excuses. Whatever
its client has seen by then must be the beginning of the right answer. Everything else is a finding.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec

from tests.chaos.catalogue import Case
from tests.chaos.schedule import DEADLY, NODES, Ask, Fault

End = Literal["complete", "left", "refused", "broken", "unavailable", "no_decode_node", "error", "silence"]
"""complete: to its finish reason · left: its client went, as it meant to · refused: no connection · broken: the connection ended amid
the answer · unavailable: 503, or that in the stream · no_decode_node: 502, or that in the stream · error: any other error object, or an
answer that makes no sense · silence: nothing came until the client gave up."""

LOGPROB_TOLERANCE = 2e-3
"""Of float32 sums in another order, on logprobs down to about -20."""


class Outcome(msgspec.Struct, kw_only=True):
    """What a client saw of one request. Times are monotonic seconds."""

    ask: Ask
    began_s: float
    ended_s: float = 0.0
    end: End = "silence"
    note: str = ""
    """An error's own words."""
    request_id: str = ""
    text: str = ""
    labels: list[str] | None = None
    logprobs: list[float] | None = None
    finish_reason: str | None = None
    event_s: list[float] = []
    """When each piece of text came."""


class Spell(msgspec.Struct, frozen=True):
    """The time in which a fault may excuse something: from its first effect until the cluster was surely whole again."""

    fault: Fault
    began_s: float
    healed_s: float
    """From then on it looked whole whenever it was looked at."""
    sure_s: float = 0.0
    """It had looked so for long enough: between two looks a link may be lost and come back."""

    def touches(self, began_s: float, ended_s: float) -> bool:
        return self.began_s <= ended_s and began_s <= max(self.healed_s, self.sure_s)


class Verdict(msgspec.Struct, frozen=True):
    """`finding` is None for a request that ended as it may."""

    outcome: Outcome
    finding: Literal["lost", "wrong", "unexcused"] | None
    why: str = ""


def judge(outcome: Outcome, case: Case, spells: Sequence[Spell]) -> Verdict:
    """`spells`: all that there were; those of another time excuse nothing."""
    if outcome.end == "silence":
        return Verdict(outcome, "lost", "neither an answer nor an error")
    if (why := _contradiction(outcome, case)) is not None:
        return Verdict(outcome, "wrong", why)
    if outcome.end in ("complete", "left"):
        return Verdict(outcome, None)
    near = [spell for spell in spells if spell.touches(outcome.began_s, outcome.ended_s)]
    if _excuses(outcome, near):
        return Verdict(outcome, None)
    return Verdict(outcome, "unexcused", f"{outcome.end}: {outcome.note}; around it: {[spell.fault.title for spell in near]}")


def _contradiction(outcome: Outcome, case: Case) -> str | None:
    """Where the answer, as far as it came, is not the oracle's."""
    if outcome.end == "complete":
        if (outcome.text, outcome.finish_reason) != (case.text, case.finish_reason):
            return f"{outcome.text!r} ({outcome.finish_reason}), not {case.text!r} ({case.finish_reason})"
        if outcome.labels is not None and outcome.labels != case.labels:
            return f"tokens {outcome.labels}, not {case.labels}"
    elif not case.text.startswith(outcome.text):
        return f"{outcome.text!r} does not begin {case.text!r}"
    elif outcome.labels is not None and case.labels[: len(outcome.labels)] != outcome.labels:
        return f"tokens {outcome.labels} do not begin {case.labels}"
    for at, (ours, theirs) in enumerate(zip(outcome.logprobs or (), case.logprobs, strict=False)):
        if abs(ours - theirs) > LOGPROB_TOLERANCE:
            return f"the logprob of token {at} is {ours}, not {theirs}"
    return None


def _excuses(outcome: Outcome, near: Sequence[Spell]) -> bool:
    router_ended = any(spell.fault.victim == "router" and spell.fault.kind in DEADLY for spell in near)
    match outcome.end:
        case "refused" | "broken":
            return router_ended
        case "unavailable":
            return router_ended or _no_decode_node(outcome, near)
        case "no_decode_node":
            return _no_decode_node(outcome, near)
        case _:
            return False


def _no_decode_node(outcome: Outcome, near: Sequence[Spell]) -> bool:
    """Whether each decode node was in trouble while the request ran: no link, or no process; a router that stands still loses all links,
    and so does a machine that does."""
    troubled = {spell.fault.victim for spell in near if spell.fault.part in ("decode", "link")}
    all_lost = any(spell.fault.part == "machine" or (spell.fault.part == "router" and spell.fault.kind != "blink") for spell in near)
    return all_lost or troubled >= set(NODES["decode"])
