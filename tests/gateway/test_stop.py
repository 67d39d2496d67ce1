"""Stop strings against a reference that sees the whole text at once."""

from hypothesis import given
from hypothesis import strategies as st

from disaggd.gateway.stop import StopStrings

SHORT = st.text("ab", min_size=1, max_size=4)


def feed_all(stops: tuple[str, ...], chunks: list[str]) -> tuple[list[str], bool]:
    stop, shown = StopStrings(stops), []
    for chunk in chunks:
        text, stopped = stop.feed(chunk)
        shown.append(text)
        if stopped:
            return shown, True
    return [*shown, stop.flush()], False


def reference(stops: tuple[str, ...], text: str) -> str:
    """The text before whichever stop string is complete first; of those, the one that began first."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@given(stops=st.lists(SHORT, min_size=1, max_size=3), chunks=st.lists(st.text("ab", max_size=3), max_size=10))
def test_the_cut_does_not_depend_on_the_chunks(stops: list[str], chunks: list[str]) -> None:
    shown, stopped = feed_all(tuple(stops), chunks)
    expected = reference(tuple(stops), "".join(chunks))
    assert "".join(shown) == expected
    assert stopped == any(stop in "".join(chunks) for stop in stops)


def test_nothing_that_may_become_a_stop_string_is_shown() -> None:
    assert feed_all(("<end>",), ["go <", "en", "d", "> on"]) == (["go ", "", "", ""], True)


def test_what_was_held_back_is_shown_when_it_turns_out_harmless() -> None:
    assert feed_all(("<end>",), ["go <en", "try>"]) == (["go ", "<entry>", ""], False)


def test_what_is_still_held_at_the_end_is_shown() -> None:
    assert feed_all(("<end>",), ["go <en"]) == (["go ", "<en"], False)
