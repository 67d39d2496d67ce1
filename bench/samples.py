"""Figures from samples: medians, percentiles, spread. Pure; knows nothing of what was measured."""

from collections.abc import Callable, Iterable, Sequence
from statistics import median

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


def interleaved(measures: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Every measure `repeats` times, by turns, so that what disturbs the machine for a while disturbs all alike."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(repeats):
        for name, measure in measures.items():
            found[name].append(measure())
    return found


def medians(found: dict[str, list[float]]) -> dict[str, float]:
    return {name: median(samples) for name, samples in found.items()}
