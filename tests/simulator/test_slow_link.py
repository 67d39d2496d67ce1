"""What the decision makes of a link that slows down: the replay's load is the same before and after, so that nothing else moves it."""

from statistics import median

import msgspec

from disaggd.simulator.cluster import Setup
from disaggd.simulator.costs import Costs
from disaggd.simulator.defaults import MODEL_S, default_cluster
from disaggd.simulator.experiment import replay
from disaggd.simulator.policies import with_policy
from disaggd.simulator.summary import Outcome
from disaggd.simulator.traces import Lengths
from disaggd.simulator.wire import Rate
from disaggd.units import Size

PROMPTS = (120, 800, 300, 1500, 200, 600)
EVERY_S = 0.45
BEFORE, AFTER = 60, 40
SETTLED = 20
"""Requests after which the decision has to know."""


def outcomes() -> list[Outcome]:
    """200 Mbit/s carry KV more slowly than prompts are computed, and the second token may not wait for it for long."""
    config = with_policy(default_cluster("1P1D", Size(256 * 2**20)), "adaptive")
    config = msgspec.structs.replace(config, disaggregation=msgspec.structs.replace(config.disaggregation, itl_target_ms=54.0))
    rows = [Lengths(arrival_s=i * EVERY_S, num_input=PROMPTS[i % len(PROMPTS)], num_output=60) for i in range(BEFORE + AFTER)]
    slow = Rate(BEFORE * EVERY_S, 200e6 / 8)
    return replay(Setup(config=config, spec=MODEL_S, costs=Costs(), block=1, rate_changes=(slow,)), rows)


def test_the_break_even_follows_a_link_that_slows_down_within_twenty_requests() -> None:
    found = [one.breakeven_tokens or 0 for one in outcomes()]
    before, after = found[BEFORE - 20 : BEFORE], found[BEFORE + SETTLED :]
    assert max(before) < 500 < 1500 < min(after)
    first = next(index for index, tokens in enumerate(found[BEFORE:]) if tokens > 1500)
    assert first < SETTLED and all(tokens > 1500 for tokens in found[BEFORE + first :])


def test_prompts_whose_kv_would_be_late_stay_where_they_are() -> None:
    after = outcomes()[BEFORE + SETTLED :]
    assert all(not one.remote for one in after if one.prompt_tokens > 600)
    assert median(max(one.gaps_ms) for one in after) < 50
