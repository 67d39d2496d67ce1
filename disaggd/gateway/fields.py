"""Reading an untrusted JSON object field by field: every refusal names the field. Knows no field's meaning.

A field that is absent or null has its default, as in OpenAI's own clients.
"""

import math
from collections.abc import Collection
from difflib import get_close_matches
from typing import Any, TypeVar

from disaggd.errors import InvalidRequest

Default = TypeVar("Default")

_SHOWN = 60
"""Characters of a refused value that an error repeats."""


class Fields:
    """One JSON object; `at` is its path in the body, as in `messages[0].`."""

    def __init__(self, values: dict[str, Any], at: str = "") -> None:
        self._values = values
        self._at = at

    def get(self, name: str) -> Any:
        """The raw value; None when absent."""
        return self._values.get(name)

    def refusal(self, name: str, why: str) -> InvalidRequest:
        """The error to raise for a field that is `why` wrong."""
        return InvalidRequest(f"{self._at}{name}: {why}", param=f"{self._at}{name}")

    def only(self, known: Collection[str]) -> None:
        """Refuse every other field, with the nearest known one."""
        for name in self._values:
            if name not in known:
                near = get_close_matches(name[:_SHOWN], known, n=1)
                raise self.refusal(name[:_SHOWN], f"unknown field{f' ({near[0]}?)' if near else ''}")

    def fixed(self, name: str, *allowed: object) -> None:
        """Refuse any value but those that ask for nothing we lack."""
        value = self.get(name)
        if value is not None and not any(type(value) is type(one) and value == one for one in allowed):
            raise self.refusal(name, f"{shown(value)} is not supported")

    def integer(self, name: str, default: Default, low: int, high: int) -> int | Default:
        value = self.get(name)
        if value is None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise self.refusal(name, f"must be an integer from {low} to {high}, not {shown(value)}")
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self.get(name)
        if value is None:
            return default
        if not is_number(value) or not low <= value <= high:
            raise self.refusal(name, f"must be a number from {low:g} to {high:g}, not {shown(value)}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.refusal(name, f"must be true or false, not {shown(value)}")
        return value

    def text(self, name: str, default: Default) -> str | Default:
        value = self.get(name)
        if value is None:
            return default
        if type(value) is not str:
            raise self.refusal(name, f"must be a string, not {shown(value)}")
        return value

    def array(self, name: str, longest: int, items: str) -> list[Any]:
        """Of what a refusal calls `items`; empty when absent."""
        value = self.get(name)
        if value is None:
            return []
        if type(value) is not list or len(value) > longest:
            raise self.refusal(name, f"must be a list of at most {longest} {items}")
        return value

    def section(self, name: str) -> "Fields":
        """Empty when absent."""
        return self.nested(name, {} if self.get(name) is None else self.get(name))

    def nested(self, name: str, value: object) -> "Fields":
        """`value`, found at `name`, as an object of its own."""
        if type(value) is not dict:
            raise self.refusal(name, f"must be an object, not {shown(value)}")
        return Fields(value, f"{self._at}{name}.")

    def plain(self) -> dict[str, Any]:
        """The object itself."""
        return self._values


def is_number(value: object) -> bool:
    """A finite JSON number; true and false are none."""
    return type(value) is int or (type(value) is float and math.isfinite(value))


def shown(value: object) -> str:
    """A refused value, as an error repeats it: short, and never a nested one, whose `repr` may recurse too deeply."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
