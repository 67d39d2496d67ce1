"""A `Surface`: something that takes what others send, and what must hold whatever that is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy


@dataclass(frozen=True)
class Surface:
    """`check` takes one case, and raises when it found what must not be. It leaves nothing behind that a next case could meet."""

    name: str
    cases: SearchStrategy[Any]
    check: Callable[[Any], None]
    quick: int
    """Cases of a quick run."""
    share: float
    """Of a long run's cases."""


def fuzz(surface: Surface, num_cases: int, seed: int | None = None, *, shrinks: bool = True) -> int:
    """Checks so many cases, always the same ones if `seed` is None, and returns how many. Raises what the simplest bad case raises.

    Unless it `shrinks`, what the first one raises: where a case leaves something behind, no other can be compared with it.
    """
    phases = [phase for phase in Phase if shrinks or phase is Phase.generate]
    count = 0

    @settings(
        max_examples=num_cases,
        derandomize=seed is None,
        database=None,
        deadline=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    @given(surface.cases)
    def check(case: Any) -> None:
        nonlocal count
        count += 1
        surface.check(case)

    (check if seed is None else hypothesis.seed(seed)(check))()
    return count
