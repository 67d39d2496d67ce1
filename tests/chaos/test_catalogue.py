"""The catalogue's answers are the oracle's, of every style, and the same each time."""

import pytest

from disaggd.sampling import SamplingParams
from tests.chaos import catalogue
from tests.support.oracle import Oracle


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


def test_an_answer_is_what_the_oracle_says(oracle: Oracle) -> None:
    cases = catalogue.build(5, oracle)
    assert cases == catalogue.build(5, oracle)
    assert cases != catalogue.build(5, oracle, seed=1)
    for case in cases:
        assert case.labels == oracle.labels(oracle.continue_(case.prompt, SamplingParams(**case.options)))
        assert len(case.logprobs) == len(case.labels)


def test_an_answer_that_hangs_on_a_tie_is_left_out(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = catalogue.build(4, oracle)
    monkeypatch.setattr(catalogue, "TIE", 1e9)
    assert all(case.options["temperature"] > 0 for case in catalogue.build(2, oracle))
    assert any(case.options["temperature"] == 0 for case in plain)
