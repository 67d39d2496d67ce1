"""A cluster on the CPU that handles its KV as one on GPUs does: through staging memory, with late copies. It equals the oracle."""

import asyncio
from pathlib import Path

import pytest

from tests.processes.test_exactness import run
from tests.processes.test_failures import QUICK, InBackground, is_pushing, long_jobs
from tests.support.clusters import Cluster, running, wait_until
from tests.support.completions import check, complete_all
from tests.support.oracle import Oracle, prompt_of

pytestmark = pytest.mark.process


def staged(directory: Path, oracle: Oracle, num_blocks: int, *, prefill: int = 1, **transfer: object) -> Cluster:
    """Each engine node has staging memory of so many blocks."""
    staging = num_blocks * oracle.kv_spec.bytes_per_block
    return Cluster(directory, prefill=prefill, module="tests.support.staged_node", transfer={"staging": staging, **transfer})


def test_concurrent_requests_equal_the_oracle_though_few_of_them_can_land_at_once(directory: Path, oracle: Oracle) -> None:
    """Thirteen blocks hold the longest prompt, of eleven; or several short ones, whose pushes then mix."""
    with running(staged(directory, oracle, 13, prefill=2)) as cluster:
        receipts = run(cluster, oracle, 48, 16)
    assert {receipt["decision"] for receipt in receipts} == {"local", "remote"}
    assert all(receipt["retries"] == 0 for receipt in receipts)


def test_a_prompt_longer_than_the_staging_memory_is_prefilled_by_its_decode_node(directory: Path, oracle: Oracle) -> None:
    options = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
    with running(staged(directory, oracle, 9)) as cluster:
        work = [(prompt_of(num_tokens, oracle), options) for num_tokens in (576, 577)]
        replies = asyncio.run(complete_all(cluster, work))
        for reply, (prompt, sampling) in zip(replies, work, strict=True):
            check(reply, prompt, sampling, oracle)
        fits, longer = (cluster.receipt(reply["id"]) for reply in replies)
        assert (fits["decision"], fits["kv_bytes"]) == ("remote", oracle.kv_bytes(576))
        assert (longer["decision"], longer["reason"]) == ("local", "staging: 577 uncached tokens > 576 that can be received")
        cluster.wait_idle()


def test_requests_survive_their_prefill_node_killed_in_the_middle_of_pushes(directory: Path, oracle: Oracle) -> None:
    """The decode node lives, what was landing is quarantined until the fence, and the next node's pushes land."""
    with running(staged(directory, oracle, 80, **QUICK)) as cluster:
        work = long_jobs(12, oracle)
        under_way = InBackground(cluster, work)
        wait_until("the prefill node has work", lambda: is_pushing(cluster), 30)
        cluster.kill("p0")
        cluster.start_node("p0")
        wait_until("the prefill node is back", cluster.is_whole, 40, every_s=0.1)
        replies = under_way.replies()
        for reply, (prompt, options) in zip(replies, work, strict=True):
            check(reply, prompt, options, oracle)
        assert sum(cluster.receipt(reply["id"])["retries"] for reply in replies) > 0, "the kill hit nothing"
        cluster.wait_idle(QUICK["quiesce_s"] + 5)
        after = cluster.complete(prompt_of(1500, oracle), max_tokens=4)
        assert cluster.receipt(after["id"])["decision"] == "remote"
        cluster.wait_idle()
