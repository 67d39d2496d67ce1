"""Figures from samples: median, percentiles, spread. Pure; knows nothing of what was measured."""

from collections.abc import Iterable, Sequence

import msgspec


class Spread(msgspec.Struct, frozen=True):
    """What is said of a set of samples; all in the samples' unit."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


def spread(samples: Iterable[float]) -> Spread | None:
    """None where there are no samples."""
    ordered = sorted(samples)
    if not ordered:
        return None
    return Spread(
        count=len(ordered),
        mean=sum(ordered) / len(ordered),
        p50=percentile(ordered, 50),
        p90=percentile(ordered, 90),
        p99=percentile(ordered, 99),
        max=ordered[-1],
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of samples in ascending order, at least one; between two of them, a straight line (numpy's default)."""
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
