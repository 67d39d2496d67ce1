"""The ledger lets nothing pass: every way in which a request can end badly is a finding, unless a fault of its time excuses it."""

from typing import Any

import pytest

from tests.chaos.catalogue import Case
from tests.chaos.ledger import End, Outcome, Spell, judge
from tests.chaos.schedule import Ask, Fault, Kind, Part

CASE = Case(
    prompt=[5], options={"temperature": 0.0}, labels=["a", " b", "c"], logprobs=[-0.5, -1.0, -0.1], text="a bc", finish_reason="length"
)


def outcome(end: End = "complete", **seen: Any) -> Outcome:
    """A right answer, but for what is `seen`; from 10 to 12 s."""
    ask = Ask(index=0, case=0, salt="", stream=True, logprobs=True, route=None, manner="read", after=0, wait_s=0.0)
    right: dict[str, Any] = {"text": "a bc", "labels": ["a", " b", "c"], "logprobs": [-0.5, -1.0, -0.1], "finish_reason": "length"}
    begun: dict[str, Any] = {"text": "a b", "labels": ["a", " b"], "logprobs": [-0.5, -1.0], "finish_reason": None}
    fields = {**(right if end == "complete" else begun), **seen}
    return Outcome(ask=ask, began_s=10.0, ended_s=12.0, end=end, **fields)


def spell(part: Part, kind: Kind, victim: str, began_s: float = 11.0, healed_s: float = 14.0) -> Spell:
    return Spell(Fault(index=0, part=part, kind=kind, victim=victim, wait_s=0.0, hold_s=1.0), began_s, healed_s)


KILLED_ROUTER = spell("router", "kill", "router")
NO_DECODE = (spell("decode", "freeze", "d0"), spell("link", "cut", "d1"))


def test_a_right_answer_is_no_finding() -> None:
    assert judge(outcome(), CASE, ()).finding is None
    assert judge(outcome(labels=None, logprobs=None), CASE, ()).finding is None


@pytest.mark.parametrize(
    "seen",
    [
        {"text": "a bd"},
        {"text": "a b"},
        {"finish_reason": "stop"},
        {"labels": ["a", " b", "d"]},
        {"labels": ["a", " b"]},
        {"labels": ["a", " b", "c", "c"]},
        {"logprobs": [-0.5, -1.1, -0.1]},
    ],
)
def test_another_answer_is_wrong_whatever_was_broken(seen: dict[str, Any]) -> None:
    assert judge(outcome(**seen), CASE, [KILLED_ROUTER, *NO_DECODE]).finding == "wrong"


@pytest.mark.parametrize("end", ["left", "broken", "unavailable"])
@pytest.mark.parametrize("seen", [{"text": "b"}, {"labels": ["a", "b"]}, {"logprobs": [-0.9]}])
def test_what_came_before_an_error_must_be_right_as_well(end: End, seen: dict[str, Any]) -> None:
    assert judge(outcome(end), CASE, [KILLED_ROUTER]).finding is None
    assert judge(outcome(end, **seen), CASE, [KILLED_ROUTER]).finding == "wrong"


def test_a_request_that_nobody_ended_is_lost_whatever_was_broken() -> None:
    assert judge(outcome("silence"), CASE, [KILLED_ROUTER, *NO_DECODE]).finding == "lost"


@pytest.mark.parametrize("end", ["refused", "broken", "unavailable", "no_decode_node", "error"])
def test_nothing_excuses_an_error_of_quiet_times(end: End) -> None:
    early, late = spell("router", "kill", "router", 3.0, 9.9), spell("router", "kill", "router", 12.1, 14.0)
    assert judge(outcome(end), CASE, [early, late]).finding == "unexcused"


@pytest.mark.parametrize("end", ["refused", "broken", "unavailable", "no_decode_node"])
@pytest.mark.parametrize(
    "one", [spell("prefill", "kill", "p1"), spell("decode", "kill", "d1"), spell("link", "cut", "d0"), spell("wire", "down", "wire")]
)
def test_no_fault_of_one_engine_node_excuses_an_error(end: End, one: Spell) -> None:
    assert judge(outcome(end), CASE, [one]).finding == "unexcused"


@pytest.mark.parametrize("end", ["refused", "broken"])
def test_a_lost_connection_is_excused_by_the_death_of_the_router_alone(end: End) -> None:
    assert judge(outcome(end), CASE, [KILLED_ROUTER]).finding is None
    assert judge(outcome(end), CASE, [spell("router", "freeze", "router"), *NO_DECODE]).finding == "unexcused"


def test_a_spell_excuses_until_it_is_sure_that_all_is_well() -> None:
    thawed = Spell(spell("router", "freeze", "router").fault, 11.0, 14.0, sure_s=14.4)
    assert thawed.touches(14.3, 14.3) and not thawed.touches(14.5, 14.5)


@pytest.mark.parametrize("end", ["unavailable", "no_decode_node"])
def test_without_any_decode_node_a_request_may_be_given_up(end: End) -> None:
    assert judge(outcome(end), CASE, NO_DECODE).finding is None
    assert judge(outcome(end), CASE, NO_DECODE[:1]).finding == "unexcused"
    assert judge(outcome(end), CASE, [NO_DECODE[0], spell("link", "cut", "d1", 13.0, 15.0)]).finding == "unexcused"


@pytest.mark.parametrize("end", ["unavailable", "no_decode_node"])
def test_a_machine_that_stood_still_excuses_lost_links_and_no_lost_connection(end: End) -> None:
    stall = spell("machine", "stall", "machine")
    assert judge(outcome(end), CASE, [stall]).finding is None
    assert judge(outcome("broken"), CASE, [stall]).finding == "unexcused"


def test_nothing_excuses_an_answer_that_makes_no_sense() -> None:
    assert judge(outcome("error"), CASE, [KILLED_ROUTER, *NO_DECODE]).finding == "unexcused"
