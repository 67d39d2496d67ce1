"""A wire that garbles blocks: with `verify` a bad block is computed again; without it the reply is wrong, so the fault is a real one."""

import asyncio
from pathlib import Path

import pytest

from disaggd.sampling import SamplingParams
from tests.support.clusters import Cluster, running
from tests.support.completions import Work, check, complete_all
from tests.support.oracle import Oracle, prompt_of

pytestmark = pytest.mark.process

GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
LENGTH = 600
NUM_BLOCKS = 10


def garbling(directory: Path, verify: bool) -> Cluster:
    return Cluster(directory, module="tests.support.corrupting_node", transfer={"verify": verify, "check_pairs": False})


def total(cluster: Cluster, name: str) -> dict[str, float]:
    return {node: value for (node,), value in cluster.metric(name).items()}


def test_a_block_that_arrives_garbled_is_computed_again_and_never_used(directory: Path, oracle: Oracle) -> None:
    with running(garbling(directory, verify=True)) as cluster:
        work: Work = [(prompt_of(LENGTH, oracle, salt=salt), GREEDY) for salt in range(3)]
        receipts = []
        for one in work:  # one by one, so that no other's write is the first
            (reply,) = asyncio.run(complete_all(cluster, [one]))
            check(reply, *one, oracle)
            receipts.append(cluster.receipt(reply["id"]))
        assert [receipt["retries"] for receipt in receipts] == [1, 0, 0]
        assert "the checksums of 1 block(s) differ" in receipts[0]["attempts"][0]["failure"]
        cluster.wait_idle()
        assert total(cluster, "disaggd_kv_checksum_failures_total")["d0"] == 1
        assert total(cluster, "disaggd_kv_blocks_verified_total")["d0"] == 3 * NUM_BLOCKS
        again = asyncio.run(complete_all(cluster, work[:1], "local"))[0]
        check(again, *work[0], oracle)  # what is cached at decode is right, too


@pytest.mark.nightly
def test_unverified_the_same_block_spoils_the_reply(directory: Path, oracle: Oracle) -> None:
    """Else the test above would prove nothing."""
    with running(garbling(directory, verify=False)) as cluster:
        prompt = prompt_of(LENGTH, oracle)
        (reply,) = asyncio.run(complete_all(cluster, [(prompt, GREEDY)]))
        assert cluster.receipt(reply["id"])["retries"] == 0
        assert reply["choices"][0]["logprobs"]["tokens"] != oracle.labels(oracle.continue_(prompt, SamplingParams(**GREEDY)))
        assert total(cluster, "disaggd_kv_checksum_failures_total")["d0"] == 0
        cluster.wait_idle()
