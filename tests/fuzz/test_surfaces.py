"""A few hundred cases of each surface, the same ones each time. Many more: `python -m tests.fuzz`."""

import pytest

from tests.fuzz.surface import Surface, fuzz
from tests.fuzz.surfaces import SURFACES


@pytest.mark.parametrize("surface", SURFACES, ids=lambda surface: surface.name)
def test_it_stands_whatever_comes(surface: Surface) -> None:
    assert fuzz(surface, surface.quick) >= surface.quick


def test_a_long_run_has_as_many_cases_as_were_asked_for() -> None:
    assert sum(surface.share for surface in SURFACES) == pytest.approx(1)
