"""The waterfall: bars where the time went, readable without colour, at 80 columns and in ASCII."""

import io
import re

import pytest
from rich.console import Console

from disaggd.observe.receipts import CachedTokens, Predicted, Receipt, Span, Spans
from disaggd.waterfall import ASCII, UNICODE, Glyphs, Scale, draw, duration, table
from tests.support.receipts import local_receipt, remote_attempt, remote_receipt, retried_receipt, running_receipt

RECEIPTS = [local_receipt(), remote_receipt(), retried_receipt(), running_receipt()]


def page(receipt: Receipt, width: int = 80, glyphs: Glyphs = UNICODE) -> list[str]:
    return [line.plain for line in draw(receipt, width, glyphs)]


def row(lines: list[str], name: str) -> str:
    (found,) = [line for line in lines if line.startswith(f"{name:<13}")]
    return found


def bar(line: str) -> tuple[int, int]:
    """Columns that are drawn: the first, and the one behind the last."""
    drawn = [column for column, character in enumerate(line) if character in "░█▒▓▶"]
    return drawn[0], drawn[-1] + 1


@pytest.mark.parametrize("receipt", RECEIPTS, ids=lambda receipt: receipt.id)
@pytest.mark.parametrize("width", [60, 80, 200])
def test_bars_fit_the_width_and_every_span_has_one(receipt: Receipt, width: int) -> None:
    lines = page(receipt, width)
    drawn = [line for line in lines if re.search(r"[░█▒▓▶].* m?s$", line)]
    assert len(drawn) == sum(len(attempt.spans) for attempt in receipt.attempts)
    assert max(map(len, drawn)) <= width


def test_a_bar_stands_where_its_time_was() -> None:
    lines = page(remote_receipt())
    queue, prefill, transfer, decode = (bar(row(lines, name)) for name in ("queue", "prefill", "transfer", "decode"))
    assert queue[0] < queue[1] < prefill[0] < transfer[0] < prefill[1] < transfer[1]
    assert prefill[1] <= decode[0] + 1
    assert row(lines, "prefill").endswith("107 ms")


def test_a_prefix_push_has_a_bar_of_the_node_that_pushes() -> None:
    pushed = remote_attempt(spans=(Span("prefix_push", "d0", 0.0, 90.0), *remote_attempt().spans))
    assert re.search(r"^prefix push  d0 ▒+ +90.0 ms$", row(page(remote_receipt(attempts=(pushed,))), "prefix push"))


def test_the_exposed_part_of_a_transfer_looks_different() -> None:
    assert re.search("▒+▓+", row(page(remote_receipt()), "transfer"))
    assert re.search("-+=+", row(page(remote_receipt(), glyphs=ASCII), "transfer"))
    hidden = remote_attempt(spans=(Span("prefill", "p0", 0.0, 100.0), Span("transfer", "p0", 20.0, 99.0)))
    lines = page(remote_receipt(attempts=(hidden,)))
    assert "▓" not in "".join(lines)
    assert "▓" in page(remote_receipt())[-1]


def test_a_long_decode_breaks_the_axis_and_a_short_one_does_not() -> None:
    broken = Scale.of(remote_receipt(), 100)
    assert (broken.is_broken, broken.cells(0.0, 142.0)) == (True, (0, 70))
    assert broken.cells(142.0, 1200.0) == (70, 100)
    assert any("≈" in line for line in page(remote_receipt()))
    short = remote_attempt(end_ms=150.0, spans=(*remote_attempt().spans[:-1], Span("decode", "d0", 131.0, 150.0)))
    assert not Scale.of(remote_receipt(attempts=(short,), spans_ms=Spans(total=150.0)), 100).is_broken


def test_no_span_is_too_short_to_be_seen() -> None:
    scale = Scale(columns=40, focus_columns=40, focus_ms=1000.0, end_ms=1000.0)
    assert scale.cells(0.0, 0.0) == (0, 1)
    assert scale.cells(1000.0, 1000.0) == (39, 40)


def test_what_runs_goes_on_to_the_edge() -> None:
    lines = page(running_receipt())
    assert "queued, 41.5 ms so far" in lines[0]
    assert re.search("░▶ +40.0 ms$", row(lines, "queue"))


def test_an_attempt_that_failed_says_when_and_why_between_its_bars_and_the_next_ones() -> None:
    lines = page(retried_receipt())
    failed = lines.index("attempt 1 failed at 90.0 ms: its prefill failed or is lost")
    assert [line.split()[0] for line in lines[failed - 3 : failed]] == ["decide", "queue", "prefill"]
    assert lines[failed + 1].startswith("decide")


def test_the_head_says_what_was_decided_and_why_what_was_expected_and_what_came() -> None:
    head = "\n".join(
        page(remote_receipt(cached_tokens=CachedTokens(decode=128, prefill=64), priority=-5, session="s1", policy="remote"))[:10]
    )
    assert head.startswith("remote-1  remote p0→d0  length after 1.20 s\n")
    for text in (
        "why          long: 1500 uncached tokens > 512",
        "predicted    remote 120 ms against local 310 ms and 14.0 ms for others",
        "break-even   430 uncached tokens",
        "first token  after 131 ms; the prediction was 8% too low",
        "queued       2 of the 5 jobs that waited were before it",
        "prompt       1,500 tokens, of them cached: 128 at decode, 64 at prefill",
        "output       128 tokens; 9.1 MB of KV moved in 102 ms, 12.0 ms of it exposed",
        "asked for    policy remote, priority -5, session s1",
    ):
        assert text in head


@pytest.mark.parametrize(("error", "shown"), [(-0.5, "50% too low"), (2.0, "200% too high"), (112.26, "113 times too high")])
def test_a_prediction_that_is_far_off_is_told_in_times(error: float, shown: str) -> None:
    assert f"the prediction was {shown}" in "\n".join(page(remote_receipt(prediction_error=error)))


@pytest.mark.parametrize(
    ("predicted", "shown"),
    [
        (Predicted(), None),
        (Predicted(local_ttft_ms=3.0), "local 3.0 ms"),
        (Predicted(remote_ttft_ms=3.0, local_damage_ms=1.0), "remote 3.0 ms"),
        (Predicted(local_ttft_ms=3.0, remote_ttft_ms=2000.0, local_damage_ms=0.0), "local 3.0 ms against remote 2.00 s"),
    ],
)
def test_what_could_not_be_predicted_is_left_out(predicted: Predicted, shown: str | None) -> None:
    lines = [line for line in page(local_receipt(predicted=predicted)) if line.startswith("predicted")]
    assert lines == ([] if shown is None else [f"predicted    {shown}"])


def test_nothing_in_a_receipt_reaches_the_terminal_as_a_command() -> None:
    lines = page(local_receipt(reason="short: \x1b]0;gotcha\x07", error="a\nb\x9b"))
    assert not any(character in "".join(lines) for character in "\x1b\x07\x9b\n")


def test_a_request_that_has_not_begun_is_shown_by_its_head_alone() -> None:
    lines = page(Receipt(id="new", model="tiny", prompt_tokens=5, phase="placed", age_ms=0.4))
    assert lines[0] == "new  undecided ?  placed, 0.4 ms so far"
    assert not any("░" in line for line in lines)


@pytest.mark.parametrize(
    ("span_ms", "shown"), [(0.04, "0.0 ms"), (99.94, "99.9 ms"), (99.96, "100 ms"), (999.4, "999 ms"), (999.6, "1.00 s")]
)
def test_durations_have_three_digits_or_so(span_ms: float, shown: str) -> None:
    assert duration(span_ms) == shown


def test_a_long_node_name_is_cut_and_the_bars_stay() -> None:
    name = "a-name-of-fifty-letters-that-no-terminal-is-wide-enough"
    spans = (Span("decide", name, 0.0, 1.0), Span("decode", name, 1.0, 9.0))
    lines = page(local_receipt(decode_node=name, attempts=(remote_attempt(spans=spans, end_ms=9.0),)))
    assert "a-name-of-f… " in row(lines, "decode")
    assert len(row(lines, "decode")) <= 80


def test_only_ascii_is_drawn_where_nothing_else_can_be() -> None:
    for receipt in RECEIPTS:
        assert "".join(page(receipt, glyphs=ASCII)).isascii()


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_gives_each_request_a_line(width: int) -> None:
    long_id = "chatcmpl-0123456789abcdef0123456789abcdef"
    out = io.StringIO()
    Console(file=out, width=width).print(table([remote_receipt(long_id), running_receipt()], UNICODE))
    _, _, first, second = out.getvalue().splitlines()
    assert first.startswith(long_id if width == 200 else long_id[:16])
    assert first.split()[-9:] == ["p0→d0", "1,500", "+", "128", "131", "ms", "1.20", "s", "length"]
    assert second.split() == ["running-1", "remote", "?→d0", "1,500", "+", "0", "(queued)"]
    assert max(map(len, out.getvalue().splitlines())) <= width
