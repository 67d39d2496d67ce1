"""docs/timeouts.md names every limit there is, and no other; and its defaults are the code's."""

import ast
import importlib
import re
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import pytest

from disaggd.config import Config, Seconds

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "disaggd"
PAGE = (ROOT / "docs" / "timeouts.md").read_text(encoding="utf-8")

CONSTANT = re.compile(r"`([\w/]+\.py):([\w.]+)`")
KEY = re.compile(r"`((?:router|disaggregation|transfer|cluster)\.\w+)`")
ROW = re.compile(r"^\| .+? \| (.+?) \| (.+?) \| .+ \|$", re.MULTILINE)
WAITS = re.compile(r"_?\w*(TIMEOUT|PATIENCE|GRACE)_S")
"""Constants that are called so are limits of waits."""

ROWS = [(limit, default) for limit, default in ROW.findall(PAGE) if limit not in ("limit", "---")]


def value_of(file: str, name: str) -> Any:
    value: Any = importlib.import_module("disaggd." + file.removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        value = getattr(value, part)
    return value


def default_of(key: str) -> Any:
    table, name = key.split(".")
    return getattr(getattr(Config(), table), name)


def constants_of(text: str) -> list[tuple[str, str]]:
    return [(file, name) for file, name in CONSTANT.findall(text) if "LinkSettings" not in name]


def shown(default: str) -> float:
    """`10 s` → 10; of `1 s, 3 times` the first."""
    number = re.match(r"[\d.]+", default)
    assert number is not None, default
    return float(number[0])


@pytest.mark.parametrize(("limit", "default"), ROWS, ids=[limit for limit, _ in ROWS])
def test_a_default_on_the_page_is_that_of_the_code(limit: str, default: str) -> None:
    if "LinkSettings" in limit:
        (name,) = re.findall(r"LinkSettings\.(\w+)", limit)
        settings: Any = importlib.import_module("disaggd.cluster.link_settings")
        value = getattr(settings.LinkSettings(), name) / (2**20 if name.endswith("bytes") else 1)
    elif constants := constants_of(limit):
        value = value_of(*constants[0])
    elif keys := KEY.findall(limit):
        value = default_of(keys[0])
    else:
        assert limit.startswith("`TimeoutStopSec`"), limit
        unit = (ROOT / "deploy" / "systemd" / "disaggd@.service").read_text()
        value = float(re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[0])
    assert shown(default) == value


def test_every_key_in_seconds_is_on_the_page() -> None:
    keys = [
        f"{table.encode_name}.{field.encode_name}"
        for table in msgspec.structs.fields(Config)
        if isinstance(table.type, type) and issubclass(table.type, msgspec.Struct)
        for field in msgspec.structs.fields(table.type)
        if get_type_hints(table.type, include_extras=True)[field.name] == Seconds
    ]
    assert len(keys) >= 10
    assert [key for key in keys if key not in KEY.findall(PAGE)] == []


def test_every_constant_that_is_a_timeout_is_on_the_page() -> None:
    found = [
        (path.relative_to(PACKAGE).as_posix(), node.targets[0].id)
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and WAITS.fullmatch(node.targets[0].id)
    ]
    assert len(found) >= 10
    on_page = {*constants_of(PAGE), ("transfer/outgoing.py", "PUSH_TIMEOUT_S")}  # the default of `transfer.push_timeout_s`
    assert [constant for constant in found if constant not in on_page] == []


def test_what_is_called_a_key_anywhere_on_the_page_is_one() -> None:
    assert KEY.findall(PAGE) and all(default_of(key) is not None for key in KEY.findall(PAGE))
