"""What was computed once is not computed again, on either side, and no token changes for it."""

import asyncio
from typing import Any

import pytest

from disaggd.roles.compute import GAUGES_PERIOD_S
from disaggd.sampling import SamplingParams
from tests.support.clusters import Cluster, wait_until
from tests.support.completions import check, complete_all
from tests.support.oracle import Oracle, prompt_of

pytestmark = pytest.mark.process

BLOCK = 64
OPTIONS = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}


def serve(cluster: Cluster, oracle: Oracle, prompt: list[int], **options: Any) -> dict[str, Any]:
    """Its receipt, once its tokens are found to be the oracle's."""
    reply = cluster.complete(prompt, logprobs=0, **OPTIONS, **options)
    check(reply, prompt, OPTIONS, oracle)
    cluster.wait_idle()
    return cluster.receipt(reply["id"])


class Computed:
    """Tokens that each node has computed of those that it sought in its cache since this was made, by its gauges."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._before: tuple[dict[str, float], ...] = ()
        wait_until("gauges have told of all that was before", self._stays, deadline_s=10.0, every_s=5 * GAUGES_PERIOD_S)

    def of(self, sought: dict[str, float]) -> dict[str, float]:
        """Once they tell of so many."""
        wait_until(f"gauges tell of {sought}", lambda: self._since()[0] == sought, deadline_s=5.0)
        _, hits = self._since()
        return {node: tokens - hits[node] for node, tokens in sought.items()}

    def _stays(self) -> bool:
        before, self._before = self._before, self._counted()
        return before == self._before

    def _since(self) -> tuple[dict[str, float], ...]:
        pairs = zip(self._before, self._counted(), strict=True)
        return tuple({node: value - before.get(node, 0.0) for node, value in now.items()} for before, now in pairs)

    def _counted(self) -> tuple[dict[str, float], ...]:
        """Tokens sought, and those of them that were found."""
        metrics = (self._cluster.metric(f"disaggd_prefix_cache_{what}_total") for what in ("queries", "hits"))
        return tuple({node: value for (node,), value in metric.items()} for metric in metrics)


def test_a_repeated_prompt_computes_less_than_a_block_and_its_tail_on_either_side(cluster: Cluster, oracle: Oracle) -> None:
    prompt, computed = prompt_of(2000, oracle), Computed(cluster)
    first = serve(cluster, oracle, prompt)
    assert (first["decision"], first["cached_tokens"], first["kv_bytes"]) == ("remote", {"decode": 0, "prefill": 0}, oracle.kv_bytes(2000))
    assert computed.of({"d0": 2000, "p0": 2000}) == {"d0": 2000, "p0": 2000}  # to decode they came by the wire
    again = serve(cluster, oracle, prompt)
    assert (again["decision"], again["cached_tokens"], again["kv_bytes"]) == ("local", {"decode": 1984, "prefill": 0}, 0)
    elsewhere = serve(cluster, oracle, prompt, headers={"x-disaggd-policy": "remote"})
    assert (elsewhere["decision"], elsewhere["cached_tokens"]) == ("remote", {"decode": 1984, "prefill": 1984})
    assert elsewhere["kv_bytes"] == oracle.kv_bytes(2000 - 1984)
    assert computed.of({"d0": 6000, "p0": 4000}) == {"d0": 2000 + 2 * 16, "p0": 2000 + 16}


def test_a_prompt_of_whole_blocks_computes_its_last_one_again(cluster: Cluster, oracle: Oracle) -> None:
    prompt = prompt_of(16 * BLOCK, oracle)
    serve(cluster, oracle, prompt)
    again = serve(cluster, oracle, prompt, headers={"x-disaggd-policy": "remote"})
    assert again["cached_tokens"] == {"decode": 15 * BLOCK, "prefill": 15 * BLOCK}
    assert again["kv_bytes"] == oracle.kv_bytes(BLOCK)


def test_turn_two_prefills_only_the_new_turn(cluster: Cluster, oracle: Oracle) -> None:
    """The answer's KV is decode's alone; its last token was never fed back, so the block it is in is computed anew."""
    first = prompt_of(300, oracle)
    answer = oracle.continue_(first, SamplingParams(**{**OPTIONS, "max_tokens": 100}))
    reply = cluster.complete(first, **{**OPTIONS, "max_tokens": 100})
    assert reply["usage"]["completion_tokens"] == 100
    second = first + answer + prompt_of(60, oracle)
    receipt = serve(cluster, oracle, second)
    assert (receipt["decision"], receipt["cached_tokens"]["decode"]) == ("local", 399 // BLOCK * BLOCK)


def test_another_salt_finds_nothing(cluster: Cluster, oracle: Oracle) -> None:
    prompt = prompt_of(500, oracle)
    serve(cluster, oracle, prompt, cache_salt="mine")
    theirs = serve(cluster, oracle, prompt, cache_salt="theirs")
    assert theirs["cached_tokens"] == {"decode": 0, "prefill": 0}
    mine = serve(cluster, oracle, prompt, cache_salt="mine")
    assert mine["cached_tokens"]["decode"] == 448


def test_identical_prompts_at_once_equal_the_oracle_and_are_prefilled_once(cluster: Cluster, oracle: Oracle) -> None:
    prompt = prompt_of(1000, oracle)
    replies = asyncio.run(complete_all(cluster, [(prompt, OPTIONS)] * 6))
    for reply in replies:
        check(reply, prompt, OPTIONS, oracle)
    cluster.wait_idle()
    receipts = [cluster.receipt(reply["id"]) for reply in replies]
    cached = sorted(receipt["cached_tokens"]["prefill"] for receipt in receipts if receipt["decision"] == "remote")
    assert cached == [0, *[960] * (len(cached) - 1)]
