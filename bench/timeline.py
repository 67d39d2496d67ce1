"""Draws what streams felt: every gap between two tokens over time, a lane per setting, on one scale. Headless; knows no bench."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import msgspec
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from samples import percentile, spread

_COLOURS = ("#0b7a75", "#c8553d", "#b8860b", "#6d597a", "#4a6fa5")
_INK, _FAINT, _GRID = "#22272e", "#6b7280", "#e5e7eb"
_STYLE = {"font.family": "DejaVu Sans", "text.color": _INK, "axes.edgecolor": _GRID, "xtick.color": _FAINT, "ytick.color": _FAINT}
_HEAD, _LANE, _FOOT = 0.95, 1.75, 0.48
"""Inches."""
_LEGEND = "each gap between two tokens of a stream, as long as it lasted; ms, log scale  ·  line, shade: a prompt, until its first token"
_TICKS_MS = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000)


class Lane(msgspec.Struct, frozen=True):
    """One setting. All in seconds of its window, but for the gaps' milliseconds."""

    name: str
    gaps: list[tuple[float, float]]
    """When each ended, and how long it was."""
    sent_s: list[float]
    """When a long prompt came."""
    first_s: list[float]
    """When its first token did."""


def draw_lanes(lanes: Sequence[Lane], title: str, path: Path) -> None:
    """Write a PNG."""
    mpl.use("agg")
    with mpl.rc_context(_STYLE):
        height = _HEAD + _LANE * len(lanes) + _FOOT
        figure = Figure(figsize=(10, height), dpi=160, facecolor="white")
        rows = figure.subplots(len(lanes), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, lane, colour in zip(rows, lanes, _COLOURS, strict=False):
            _draw_lane(axes, lane, colour)
        _scale(rows[0], lanes)
        rows[-1].set_xlabel("seconds", color=_FAINT, fontsize=9)
        figure.text(0.065, 1 - 0.12 / height, title, fontsize=12.5, fontweight="bold", va="top")
        figure.text(0.065, 1 - 0.42 / height, _LEGEND, fontsize=8.5, color=_FAINT, va="top")
        figure.subplots_adjust(left=0.065, right=0.985, top=1 - _HEAD / height, bottom=_FOOT / height, hspace=0.34)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _draw_lane(axes: Axes, lane: Lane, colour: str) -> None:
    for sent_s, first_s in zip(lane.sent_s, lane.first_s, strict=True):
        axes.axvspan(sent_s, first_s, color="#eef1f5", linewidth=0, zorder=0)
        axes.axvline(sent_s, color="#9ca3af", linewidth=0.9, zorder=1)
    spans = [[(at - gap / 1e3, gap), (at, gap)] for at, gap in lane.gaps]
    axes.add_collection(LineCollection(spans, colors=colour, linewidths=2.2, alpha=0.55, capstyle="round", zorder=3))
    found = spread(gap for _, gap in lane.gaps)
    assert found is not None, f"{lane.name}: nothing to draw"
    axes.axhline(found.max, color=colour, linewidth=0.8, linestyle=(0, (4, 3)), zorder=2)
    axes.set_title(lane.name, loc="left", fontsize=10, fontweight="bold", color=colour, pad=4)
    axes.set_title(f"p50 {_ms(found.p50)} · p99 {_ms(found.p99)} · worst {_ms(found.max)} ms", loc="right", fontsize=9, color=_INK, pad=4)
    axes.grid(axis="y", color=_GRID, linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8.5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _scale(axes: Axes, lanes: Sequence[Lane]) -> None:
    """All lanes share it: a decade in one is a decade in the others."""
    gaps = [gap for lane in lanes for _, gap in lane.gaps]
    axes.set_yscale("log")
    axes.set_ylim(percentile(sorted(gaps), 10) / 2.5, max(gaps) * 1.5)
    axes.set_xlim(0, max(at for lane in lanes for at, _ in lane.gaps))
    axes.yaxis.set_major_locator(FixedLocator(_TICKS_MS))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
