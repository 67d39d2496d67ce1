"""Measuring by turns, and medians of what was found. Pure; knows nothing of what is measured."""

from collections.abc import Callable
from statistics import median

from disaggd.observe.spread import Spread, percentile, spread

__all__ = ["Spread", "interleaved", "medians", "percentile", "spread"]


def interleaved(measures: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Every measure `repeats` times, by turns, so that what disturbs the machine for a while disturbs all alike."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(repeats):
        for name, measure in measures.items():
            found[name].append(measure())
    return found


def medians(found: dict[str, list[float]]) -> dict[str, float]:
    return {name: median(samples) for name, samples in found.items()}
