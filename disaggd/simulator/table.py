"""The comparison as a table on the terminal."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from disaggd.observe.spread import Spread
from disaggd.simulator.summary import Slo, Summary

_COLUMNS = (
    "policy",
    "requests",
    "failed",
    "good",
    "good/s",
    "TTFT p50",
    "p90",
    "p99",
    "ITL p50",
    "p90",
    "p99",
    "remote",
    "queue p50",
    "p99",
    "cached D",
    "cached P",
    "error p50",
    "p90",
)
_PIPED_WIDTH = 200
"""Columns where there is no terminal to count them."""


def show(trace: str, nodes: str, slo: Slo, summaries: Sequence[Summary]) -> None:
    """Prints a row for each of `summaries`: milliseconds; cached tokens as a part of the prompts, errors as a part of the TTFT.

    Below, why requests failed.
    """
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    for summary in summaries:
        table.add_row(*_cells(summary))
    console = Console()
    if not console.is_terminal:
        console.width = _PIPED_WIDTH
    console.print(f"{trace} on {nodes}; good: {_limits(slo)}; times in ms", highlight=False, soft_wrap=True)
    console.print(table)
    for line in filter(None, map(_failures, summaries)):
        console.print(line, highlight=False, soft_wrap=True)


def _failures(summary: Summary) -> str:
    reasons = "; ".join(f"{count:,}: {why}" for why, count in summary.failures.items())
    return f"failed under {summary.policy}: {reasons}" if reasons else ""


def _limits(slo: Slo) -> str:
    limits = {"TTFT": slo.ttft_ms, "every ITL": slo.itl_ms}
    return " and ".join(f"{name} ≤ {limit:g} ms" for name, limit in limits.items() if limit is not None) or "finished"


def _cells(summary: Summary) -> tuple[str, ...]:
    return (
        summary.policy,
        f"{summary.requests:,}",
        f"{summary.failed:,}",
        f"{summary.good_share:.1%}",
        f"{summary.goodput_per_s:.3f}",
        *_percentiles(summary.ttft_ms),
        *_percentiles(summary.itl_ms),
        f"{summary.remote_share:.0%}",
        *_ends(summary.queued_ms),
        f"{summary.cached_at_decode / summary.prompt_tokens:.1%}",
        f"{summary.cached_at_prefill / summary.prompt_tokens:.1%}",
        *(("", "") if summary.prediction_error is None else (f"{summary.prediction_error.p50:.0%}", f"{summary.prediction_error.p90:.0%}")),
    )


def _percentiles(spread: Spread | None) -> tuple[str, str, str]:
    return ("", "", "") if spread is None else (f"{spread.p50:,.1f}", f"{spread.p90:,.1f}", f"{spread.p99:,.1f}")


def _ends(spread: Spread | None) -> tuple[str, str]:
    return ("", "") if spread is None else (f"{spread.p50:,.0f}", f"{spread.p99:,.0f}")
