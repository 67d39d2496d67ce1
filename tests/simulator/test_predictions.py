"""What is predicted when a prompt is placed is what comes about, as far as it can be known by then."""

import pytest

from disaggd.simulator.cluster import Setup
from disaggd.simulator.costs import Costs
from disaggd.simulator.defaults import MODEL_S, default_cluster
from disaggd.simulator.policies import with_policy
from disaggd.simulator.summary import outcome_of
from disaggd.simulator.traces import Lengths
from disaggd.units import Size
from tests.support.simulations import replay

BURST = (300, 100, 700, 250, 450, 900)
"""Prompt tokens of requests that come at once: each is behind those before it."""

FULL_STEP_S = 0.21
"""Of 512 prompt tokens."""


def errors_s(policy: str, rows: list[Lengths]) -> list[float]:
    """Of the predicted TTFTs, by request, in seconds."""
    config = with_policy(default_cluster("1P1D", Size(256 * 2**20)), policy)
    clients, _ = replay(Setup(config=config, spec=MODEL_S, costs=Costs(), block=64), rows)
    outcomes = [outcome_of(client, 0.0) for client in clients]
    return [one.prediction_error * one.ttft_ms / 1e3 for one in outcomes if one.prediction_error is not None and one.ttft_ms is not None]


@pytest.mark.parametrize("policy", ["never", "always"])
def test_prompts_that_come_at_once_are_predicted_one_behind_the_other(policy: str) -> None:
    """All are offered a prefill elsewhere before the first has been decided on. They share steps with those behind them, who come later."""
    found = errors_s(policy, [Lengths(num_input=n, num_output=20) for n in BURST])
    assert len(found) == len(BURST)
    assert max(map(abs, found)) < FULL_STEP_S, found


@pytest.mark.parametrize("policy", ["never", "always"])
def test_prompts_that_share_steps_do_not_make_a_node_look_slow(policy: str) -> None:
    """Five that come at once, and then one that has the node to itself."""
    five = [Lengths(num_input=100, num_output=2) for _ in range(5)]
    alone = errors_s(policy, [*five, Lengths(arrival_s=9.0, num_input=400, num_output=2)])[-1]
    assert abs(alone) < 0.02


def test_what_is_cached_of_those_before_is_not_waited_for() -> None:
    first = [Lengths(num_input=1000, num_output=2, blocks=tuple(range(15)))]
    again = [Lengths(arrival_s=5.0, num_input=1000, num_output=2, blocks=tuple(range(15))) for _ in range(3)]
    found = errors_s("never", [*first, *again, Lengths(arrival_s=5.0, num_input=300, num_output=2)])
    assert abs(found[-1]) < 0.05, found
