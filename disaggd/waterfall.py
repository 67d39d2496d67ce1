"""How `disaggd trace` draws a receipt: what was decided and why, and a bar for each span. Pure functions: receipts in, text out.

Every bar means something without its colour, and with ASCII alone. Where decoding takes much longer than all before it,
the axis is broken, or the prefill that one looks for would be a column wide.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from disaggd.observe.receipts import Attempt, Receipt, Span, SpanName

Kind = Literal["waits", "computes", "moves", "exposed"]

KINDS: dict[SpanName, Kind] = {
    "decide": "waits",
    "queue": "waits",
    "grant": "waits",
    "prefix_push": "moves",
    "prefill_wait": "waits",
    "prefill": "computes",
    "transfer": "moves",
    "decode": "computes",
}
LEGEND: dict[Kind, str] = {
    "waits": "waits",
    "computes": "computes",
    "moves": "KV moves meanwhile",
    "exposed": "the next token waits for KV",
}
STYLES: dict[Kind, str] = {"waits": "yellow", "computes": "green", "moves": "cyan", "exposed": "bold red"}

FOCUS_SHARE = 0.7
"""Of the columns, for what comes before decoding, where the axis is broken."""
BREAK_FROM = 2.5
"""The axis is broken if the whole took so many times as long as what comes before decoding."""
LABEL_COLUMNS = 13
NODE_COLUMNS = 12
TOOK_COLUMNS = 9
MIN_BAR_COLUMNS = 16


@dataclass(frozen=True, slots=True)
class Glyphs:
    """What the terminal's encoding can show."""

    bars: dict[Kind, str]
    arrow: str
    ellipsis: str
    gap: str
    """Where the axis is broken."""
    goes_on: str


UNICODE = Glyphs({"waits": "░", "computes": "█", "moves": "▒", "exposed": "▓"}, "→", "…", "≈", "▶")
ASCII = Glyphs({"waits": ".", "computes": "#", "moves": "-", "exposed": "="}, "->", "~", "~", ">")


def draw(receipt: Receipt, width: int, glyphs: Glyphs) -> Iterator[Text]:
    """The lines of one request's page; those of the waterfall have at most `width` columns."""
    yield _title(receipt, glyphs)
    yield from (Text.assemble((f"{name:<{LABEL_COLUMNS}}", "bold"), printable(text)) for name, text in _facts(receipt))
    if not any(attempt.spans for attempt in receipt.attempts):
        return
    scale = Scale.of(receipt, bar_columns(receipt, width))
    margin = _margin(receipt)
    yield Text()
    yield Text(" " * margin + scale.axis(glyphs), style="dim")
    for number, attempt in enumerate(receipt.attempts):
        yield from (_row(span, attempt, scale, margin, glyphs) for span in attempt.spans)
        if attempt.failure is not None:
            at = "" if attempt.end_ms is None else f" at {duration(attempt.end_ms)}"
            yield Text(f"attempt {number + 1} failed{at}: {printable(attempt.failure)}", style="red")
    yield Text()
    yield Text("   ").join(Text.assemble((glyphs.bars[kind], STYLES[kind]), f" {LEGEND[kind]}") for kind in _kinds(receipt))


def table(receipts: Iterable[Receipt], glyphs: Glyphs) -> Table:
    """One line a request."""
    shown = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    shown.add_column("request", min_width=12, overflow="ellipsis" if glyphs is UNICODE else "crop")  # the only one that gives way
    for column in ("way", "tokens", "first token", "total", "end"):
        shown.add_column(column, justify="left" if column in ("way", "end") else "right", no_wrap=True)
    for receipt in receipts:
        times = ("" if span_ms is None else duration(span_ms) for span_ms in (receipt.spans_ms.first_token, receipt.spans_ms.total))
        ending = f"({receipt.phase})" if receipt.finish_reason is None else receipt.finish_reason
        tokens = f"{receipt.prompt_tokens:,} + {receipt.output_tokens:,}"
        shown.add_row(Text(receipt.id), Text(way(receipt, glyphs)), tokens, *times, ending)
    return shown


def way(receipt: Receipt, glyphs: Glyphs) -> str:
    """`remote p0→d0`, `local d0`."""
    decode = receipt.decode_node or "?"
    if receipt.decision == "remote":
        return f"remote {receipt.prefill_node or '?'}{glyphs.arrow}{decode}"
    return f"{receipt.decision or 'undecided'} {decode}"


def duration(span_ms: float) -> str:
    """Three digits or so: 1.5 ms, 107 ms, 1.07 s."""
    if span_ms < 99.95:
        return f"{span_ms:.1f} ms"
    return f"{span_ms:.0f} ms" if span_ms < 999.5 else f"{span_ms / 1e3:.2f} s"


def printable(text: str) -> str:
    """Nothing that a terminal would obey: some of it may be what a client sent."""
    return "".join(character if character.isprintable() else "?" for character in text)


# ── words ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _title(receipt: Receipt, glyphs: Glyphs) -> Text:
    return Text.assemble((printable(receipt.id), "bold"), f"  {way(receipt, glyphs)}  ", (_ending(receipt), _ending_style(receipt)))


def _ending(receipt: Receipt) -> str:
    if receipt.finish_reason is None:
        return f"{receipt.phase}, {duration(receipt.age_ms or 0.0)} so far"
    total = receipt.spans_ms.total
    return receipt.finish_reason if total is None else f"{receipt.finish_reason} after {duration(total)}"


def _ending_style(receipt: Receipt) -> str:
    return {None: "yellow", "stop": "green", "length": "green"}.get(receipt.finish_reason, "red")


def _facts(receipt: Receipt) -> Iterator[tuple[str, str]]:
    if receipt.error is not None:
        yield "error", receipt.error
    if receipt.reason is not None:
        yield "why", receipt.reason
    if (predicted := _prediction(receipt)) is not None:
        yield "predicted", predicted
    if receipt.predicted is not None and receipt.predicted.breakeven_tokens is not None:
        yield "break-even", f"{receipt.predicted.breakeven_tokens:,} uncached tokens"
    if receipt.spans_ms.first_token is not None:
        yield "first token", f"after {duration(receipt.spans_ms.first_token)}{_verdict(receipt)}"
    if receipt.attempts and (waited := receipt.attempts[-1]).queue_depth is not None:
        yield "queued", f"{waited.jobs_ahead} of the {waited.queue_depth} jobs that waited were before it"
    cached = receipt.cached_tokens
    yield "prompt", f"{receipt.prompt_tokens:,} tokens, of them cached: {cached.decode:,} at decode, {cached.prefill:,} at prefill"
    yield "output", f"{receipt.output_tokens:,} tokens{_moved(receipt)}"
    if asked := _asked(receipt):
        yield "asked for", asked


def _moved(receipt: Receipt) -> str:
    spans = receipt.spans_ms
    if not receipt.kv_bytes:
        return ""
    took = "" if spans.transfer is None else f" in {duration(spans.transfer)}"
    exposed = "" if spans.transfer_exposed is None else f", {duration(spans.transfer_exposed)} of it exposed"
    return f"; {receipt.kv_bytes / 1e6:,.1f} MB of KV moved{took}{exposed}"


def _prediction(receipt: Receipt) -> str | None:
    if receipt.predicted is None or receipt.decision is None:
        return None
    here, there, damage = receipt.predicted.local_ttft_ms, receipt.predicted.remote_ttft_ms, receipt.predicted.local_damage_ms
    ways = {
        "local": None if here is None else f"local {duration(here)}" + (f" and {duration(damage)} for others" if damage else ""),
        "remote": None if there is None else f"remote {duration(there)}",
    }
    chosen = ways.pop(receipt.decision)
    (other,) = ways.values()
    return " against ".join(filter(None, (chosen, other))) or None


def _verdict(receipt: Receipt) -> str:
    """The prediction against what came."""
    error = receipt.prediction_error
    if error is None:
        return ""
    if error > 2:
        return f"; the prediction was {1 + error:,.3g} times too high"
    return f"; the prediction was {abs(error):.0%} too {'low' if error < 0 else 'high'}"


def _asked(receipt: Receipt) -> str:
    session = None if receipt.session is None else f"session {receipt.session}"
    priority = f"priority {receipt.priority}" if receipt.priority else None
    return ", ".join(filter(None, (None if receipt.policy == "auto" else f"policy {receipt.policy}", priority, session)))


# ── bars ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Scale:
    """Milliseconds to columns: up to `focus_ms` in `focus_columns`, and from there to `end_ms` in the others."""

    columns: int
    focus_columns: int
    focus_ms: float
    end_ms: float

    @classmethod
    def of(cls, receipt: Receipt, columns: int) -> "Scale":
        """Broken at the end of whatever comes before decoding, if that is short."""
        end_ms = max(_times(receipt), default=0.0) or 1.0
        before = [
            span.end_ms for attempt in receipt.attempts for span in attempt.spans if span.name != "decode" and span.end_ms is not None
        ]
        decodes = [span.start_ms for span in receipt.attempts[-1].spans if span.name == "decode"]
        focus_ms = max((*before, *decodes), default=end_ms)
        if not decodes or focus_ms <= 0 or end_ms < BREAK_FROM * focus_ms:
            return cls(columns, columns, end_ms, end_ms)
        return cls(columns, int(columns * FOCUS_SHARE), focus_ms, end_ms)

    @property
    def is_broken(self) -> bool:
        return self.focus_columns < self.columns

    def column(self, at_ms: float) -> float:
        if at_ms <= self.focus_ms:
            return at_ms / self.focus_ms * self.focus_columns
        beyond = (at_ms - self.focus_ms) / (self.end_ms - self.focus_ms)
        return self.focus_columns + beyond * (self.columns - self.focus_columns)

    def cells(self, start_ms: float, end_ms: float) -> tuple[int, int]:
        """First column and the one behind the last; at least one column."""
        first = min(round(self.column(start_ms)), self.columns - 1)
        return first, max(first + 1, min(round(self.column(end_ms)), self.columns))

    def axis(self, glyphs: Glyphs) -> str:
        """Times at the ends, and where the axis is broken."""
        if not self.is_broken:
            return "0" + duration(self.end_ms).rjust(self.columns - 1)
        focus = f"{duration(self.focus_ms)} {glyphs.gap}"
        return "0" + focus.rjust(self.focus_columns - 1) + duration(self.end_ms).rjust(self.columns - self.focus_columns)


def bar_columns(receipt: Receipt, width: int) -> int:
    return max(MIN_BAR_COLUMNS, width - _margin(receipt) - TOOK_COLUMNS - 1)


def _margin(receipt: Receipt) -> int:
    names = [span.node or "" for attempt in receipt.attempts for span in attempt.spans]
    return LABEL_COLUMNS + min(NODE_COLUMNS, max(map(len, names), default=0)) + 1


def _row(span: Span, attempt: Attempt, scale: Scale, margin: int, glyphs: Glyphs) -> Text:
    node = _fitted(span.node or "", margin - LABEL_COLUMNS - 1, glyphs)
    row = Text(f"{span.name.replace('_', ' '):<{LABEL_COLUMNS}}{node} ")
    end_ms = scale.end_ms if span.end_ms is None else span.end_ms
    first, last = scale.cells(span.start_ms, end_ms)
    row.append(" " * first)
    for kind, columns in _parts(span, attempt, scale, first, last):
        row.append(glyphs.bars[kind] * columns, STYLES[kind])
    if span.end_ms is None:
        row.right_crop(1)
        row.append(glyphs.goes_on, STYLES[KINDS[span.name]])
    row.append(" " * (scale.columns - last))
    return row.append(f" {duration(end_ms - span.start_ms):>{TOOK_COLUMNS}}")


def _parts(span: Span, attempt: Attempt, scale: Scale, first: int, last: int) -> Iterator[tuple[Kind, int]]:
    """A transfer's columns after the first token are the ones that somebody waited for."""
    since_ms = _exposed_from(span, attempt)
    exposed = 0 if since_ms is None else min(max(1, last - round(scale.column(since_ms))), last - first)
    yield KINDS[span.name], last - first - exposed
    yield "exposed", exposed


def _exposed_from(span: Span, attempt: Attempt) -> float | None:
    """When the first token was there, if the transfer went on beyond."""
    computed = next((other.end_ms for other in attempt.spans if other.name == "prefill"), None)
    if span.name != "transfer" or computed is None or span.end_ms is None or span.end_ms <= computed:
        return None
    return computed


def _kinds(receipt: Receipt) -> list[Kind]:
    """Those in the picture, in the order of the legend."""
    spans = [(span, attempt) for attempt in receipt.attempts for span in attempt.spans]
    found = {KINDS[span.name] for span, _ in spans} | {"exposed" for span, attempt in spans if _exposed_from(span, attempt) is not None}
    return [kind for kind in LEGEND if kind in found]


def _times(receipt: Receipt) -> Iterator[float]:
    """Every moment that must be in the picture."""
    ends = (span.end_ms for attempt in receipt.attempts for span in attempt.spans)
    starts = (span.start_ms for attempt in receipt.attempts for span in attempt.spans)
    return (time for time in chain(starts, ends, (receipt.spans_ms.total, receipt.age_ms)) if time is not None)


def _fitted(name: str, columns: int, glyphs: Glyphs) -> str:
    if len(name) > columns:
        return name[: columns - 1] + glyphs.ellipsis
    return name.ljust(columns)
