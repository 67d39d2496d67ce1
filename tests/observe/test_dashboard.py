"""The Grafana dashboard: it shows metrics that exist, its panels do not overlap, and it is what its tool writes."""

import json
import re
import runpy
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.support.exercised_metrics import exercise, exposed

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "disaggd.json"


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return dict(json.loads(DASHBOARD.read_text(encoding="utf-8")))


def graphs(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions(dashboard: dict[str, Any]) -> list[str]:
    variables = [variable["definition"] for variable in dashboard["templating"]["list"] if "definition" in variable]
    return variables + [target["expr"] for panel in graphs(dashboard) for target in panel["targets"]]


def series() -> dict[str, set[str]]:
    """What PromQL may name, with its labels: a histogram by its parts, anything else by its name."""
    named: dict[str, set[str]] = {}
    for name, kind, labels in exposed(exercise()):
        for part in ("_bucket", "_sum", "_count") if kind == "histogram" else ("",):
            named[name + part] = {*labels, *(("le",) if part == "_bucket" else ())}
    return named


def test_every_metric_in_an_expression_exists(dashboard: dict[str, Any]) -> None:
    known = series().keys() | {"process_cpu_seconds_total", "process_resident_memory_bytes"}
    named = {name for expression in expressions(dashboard) for name in re.findall(r"\b(?:disaggd|process)_\w+", expression)}
    assert len(named) > 30
    assert named - known == set()


def test_every_label_in_an_expression_is_one_of_its_metrics(dashboard: dict[str, Any]) -> None:
    known = series()
    for panel in graphs(dashboard):
        for target in panel["targets"]:
            metrics = re.findall(r"\bdisaggd_\w+", target["expr"])
            asked = {label.strip() for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in group.split(",")}
            asked |= set(re.findall(r'(\w+)[=!]~?"', target["expr"])) | set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert all(asked - {"instance"} <= known[name] for name in metrics), target


def test_every_documented_metric_is_on_it_or_is_no_graph(dashboard: dict[str, Any]) -> None:
    text = "\n".join(expressions(dashboard))
    assert [name for name, _, _ in exposed(exercise()) if name not in text] == []


def test_expressions_are_balanced_and_counters_are_rated(dashboard: dict[str, Any]) -> None:
    for expression in expressions(dashboard):
        for opening, closing in ("()", "{}", "[]"):
            assert expression.count(opening) == expression.count(closing), expression
        for counter in re.findall(r"\b\w+_(?:total|bucket)\b", expression):
            assert re.search(rf"rate\({counter}(?:{{[^}}]*}})?\[\$__rate_interval\]\)", expression), expression


def test_panels_have_their_own_ids_and_places(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)
    assert all(panel["gridPos"]["x"] >= 0 and panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)


def test_every_panel_asks_the_chosen_datasource_and_says_what_it_shows(dashboard: dict[str, Any]) -> None:
    assert dashboard["uid"] == "disaggd"
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "node"]
    for panel in graphs(dashboard):
        assert panel["title"] and panel["description"]
        assert {target["refId"] for target in panel["targets"]} == set("ABCDEFGH"[: len(panel["targets"])])
        for asking in (panel, *panel["targets"]):
            assert asking["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_the_file_is_what_its_tool_writes(dashboard: dict[str, Any]) -> None:
    assert runpy.run_path(str(ROOT / "tools" / "dashboard.py"))["dashboard"]() == dashboard
