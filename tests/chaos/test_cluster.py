"""What is missing from a view of the cluster is seen, and so is whatever an idle cluster should not hold."""

from typing import Any

import pytest

from tests.chaos.cluster import NUM_BLOCKS, held, incarnations, missing

NAMES = ("p0", "p1", "d0", "d1")


def view(**changes: Any) -> dict[str, Any]:
    """As `/v1/cluster` of an idle cluster that is whole, but for `changes`."""
    blocks = {"free": NUM_BLOCKS - 20, "cached": 20, "used": 0, "granted": 0, "held": 0, "quarantined": 0}
    nodes = [{"name": name, "link": "up", "incarnation": f"{name}-1", "blocks": dict(blocks)} for name in NAMES]
    pairs = [{"prefill": p, "decode": d, "state": "ready"} for p in NAMES[:2] for d in NAMES[2:]]
    return {
        "router": "router",
        "incarnation": "r-1",
        "nodes": nodes,
        "pairs": pairs,
        "prefix_pairs": [dict(pair) for pair in pairs],
        "requests": 0,
        "prefill_queue": 0,
    } | changes


def with_node(name: str, **changes: Any) -> dict[str, Any]:
    return view(nodes=[node | changes if node["name"] == name else node for node in view()["nodes"]])


def test_nothing_is_missing_from_a_whole_cluster_and_an_idle_one_holds_nothing() -> None:
    assert missing(view(), frozenset()) == []
    assert held(view()) == []
    assert incarnations(view()) == {"router": "r-1", **{name: f"{name}-1" for name in NAMES}}


def test_a_link_that_is_down_is_missing_unless_its_node_is_hurt() -> None:
    down = with_node("d1", link="down")
    assert missing(down, frozenset()) == ["link to d1"]
    assert missing(down, frozenset({"d1"})) == []
    assert missing(down, frozenset({"d0", "wire"})) == ["link to d1"]


@pytest.mark.parametrize(("kind", "path"), [("pairs", "p1 → d0"), ("prefix_pairs", "d0 → p1")])
@pytest.mark.parametrize("state", ["probing", "lost", None])
def test_a_path_that_is_not_ready_is_missing_unless_an_end_or_the_wire_is_hurt(kind: str, path: str, state: str | None) -> None:
    pairs = [pair for pair in view()[kind] if (pair["prefill"], pair["decode"]) != ("p1", "d0")]
    broken = view(**{kind: pairs if state is None else [*pairs, {"prefill": "p1", "decode": "d0", "state": state}]})
    assert missing(broken, frozenset()) == [path]
    assert all(missing(broken, frozenset({victim})) == [] for victim in ("p1", "d0", "wire"))
    assert missing(broken, frozenset({"p0", "d1"})) == [path]


@pytest.mark.parametrize("state", ["used", "granted", "held", "quarantined"])
def test_a_block_that_an_idle_node_still_holds_is_a_finding(state: str) -> None:
    blocks = view()["nodes"][0]["blocks"]
    ((kind, what),) = held(with_node("d0", blocks=blocks | {"free": blocks["free"] - 1, state: 1}))
    assert kind == "blocks" and "d0" in what


def test_a_block_that_is_nowhere_is_a_finding() -> None:
    blocks = view()["nodes"][0]["blocks"]
    assert [kind for kind, _ in held(with_node("p0", blocks=blocks | {"free": blocks["free"] - 1}))] == ["blocks"]


@pytest.mark.parametrize("key", ["requests", "prefill_queue"])
def test_a_request_that_the_router_still_has_is_a_finding(key: str) -> None:
    assert [kind for kind, _ in held(view(**{key: 1}))] == ["idle"]
