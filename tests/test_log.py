"""Log lines as a terminal and `disaggd up` see them."""

import io
import logging
from collections.abc import Iterator

import pytest

from disaggd.log import configure_logging, loading_progress, paint


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    out = io.StringIO()
    configure_logging("p0", out)
    yield out
    root.handlers[:], root.level = handlers, level


def test_an_event_is_one_line_with_the_nodes_name(stream: io.StringIO) -> None:
    logging.getLogger("disaggd.test").info("ready")
    logging.getLogger("disaggd.test").warning("a client sent %r and %s", "x", "two\nlines")
    ready, warning = stream.getvalue().splitlines()
    assert ready.startswith("[p0] ")
    assert ready.endswith(" ready")
    assert warning.endswith(" warning: a client sent 'x' and two\\nlines")


def test_colours_mark_time_and_level_and_leave_the_rest() -> None:
    assert paint("15:04:05 ready") == "\x1b[2m15:04:05\x1b[0m ready"
    assert paint("15:04:05 error: broken") == "\x1b[2m15:04:05\x1b[0m \x1b[31merror:\x1b[0m broken"
    assert paint("Traceback (most recent call last):") == "Traceback (most recent call last):"


def test_a_load_without_a_terminal_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with loading_progress("p0") as progress:
        progress(1, 2)
    assert capsys.readouterr() == ("", "")
