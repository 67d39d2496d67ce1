"""Log lines as a terminal and `disaggd up` see them."""

import io
import logging
import sys
from collections.abc import Iterator

import pytest

from disaggd.log import configure_logging, paint, start_progress


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    ours = logging.getLogger("disaggd")
    handlers, level, our_level = root.handlers[:], root.level, ours.level
    out = io.StringIO()
    configure_logging("p0", out)
    yield out
    root.handlers[:] = handlers
    root.setLevel(level)
    ours.setLevel(our_level)


def test_an_event_is_one_line_with_the_nodes_name(stream: io.StringIO) -> None:
    logging.getLogger("disaggd.test").info("ready")
    logging.getLogger("disaggd.test").warning("a client sent %r and %s", "x", "two\nlines")
    ready, warning = stream.getvalue().splitlines()
    assert ready.startswith("[p0] ")
    assert ready.endswith(" ready")
    assert warning.endswith(" warning: a client sent 'x' and two\\nlines")


def test_what_a_terminal_would_obey_is_spelt_out(stream: io.StringIO) -> None:
    logging.getLogger("disaggd.test").info("GET /%s", "\x1b[2Jmodèle\x07\t\r\x9b1m")
    assert stream.getvalue().endswith(" GET /\\x1b[2Jmodèle\\x07\\t\\r\\x9b1m\n")


def test_libraries_are_heard_from_warnings_on(stream: io.StringIO) -> None:
    library = logging.getLogger("library.cache")
    library.info("cache stats:")
    library.warning("cannot")
    assert [line.partition("warning: ")[2] for line in stream.getvalue().splitlines()] == ["cannot"]


def test_colours_mark_time_and_level_and_leave_the_rest() -> None:
    assert paint("15:04:05 ready") == "\x1b[2m15:04:05\x1b[0m ready"
    assert paint("15:04:05 error: broken") == "\x1b[2m15:04:05\x1b[0m \x1b[31merror:\x1b[0m broken"
    assert paint("Traceback (most recent call last):") == "Traceback (most recent call last):"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_load_names_its_model_once_there_is_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with start_progress("Qwen [x]") as progress:
        assert "loading" not in terminal.getvalue()
        progress.loading(2**20, 2**21)
        progress.capturing(3, 11)
    assert "loading Qwen [x]" in terminal.getvalue()
    assert "capturing decode steps" in terminal.getvalue()
    assert "3 of 11" in terminal.getvalue()
    assert "?" not in terminal.getvalue().replace("\x1b[?", "")


def test_a_load_without_a_terminal_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with start_progress("tiny") as progress:
        progress.loading(1, 2)
        progress.capturing(1, 2)
    assert capsys.readouterr() == ("", "")
