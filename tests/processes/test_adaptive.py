"""Nodes that measured themselves, and a decision that predicts from the first request on."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from disaggd.sampling import SamplingParams
from tests.support.clusters import Cluster, running
from tests.support.oracle import Oracle, prompt_of

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory: Path = tmp_path_factory.mktemp("adaptive")
    rules = {"policy": "adaptive", "self_measurement": True, "itl_target_ms": 50}
    with running(Cluster(directory, disaggregation=rules)) as cluster:
        yield cluster


@pytest.mark.parametrize("num_tokens", [40, 300, 1500])
def test_every_decision_is_predicted_and_every_output_the_oracles(adaptive: Cluster, oracle: Oracle, num_tokens: int) -> None:
    prompt = prompt_of(num_tokens, oracle, salt=7)
    reply = adaptive.complete(prompt, max_tokens=12, temperature=0, ignore_eos=True, logprobs=0)
    receipt = adaptive.receipt(reply["id"])
    assert receipt["reason"].partition(":")[0] in ("cheaper", "target", "explore")
    assert min(receipt["predicted"][key] for key in ("local_ttft_ms", "remote_ttft_ms")) > 0
    assert receipt["predicted"]["breakeven_tokens"] >= 1
    assert receipt["prediction_error"] is not None
    expected = oracle.continue_(prompt, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
    assert reply["choices"][0]["logprobs"]["tokens"] == oracle.labels(expected)
