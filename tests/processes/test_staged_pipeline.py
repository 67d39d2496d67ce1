"""A cluster on the CPU that handles its KV as one on GPUs does: through staging memory, with late copies. It equals the oracle."""

import asyncio
from pathlib import Path

import pytest

from tests.processes.test_exactness import run
from tests.processes.test_failures import PATIENT, kill_amid_writes
from tests.support.clusters import Block, Cluster, running
from tests.support.completions import check, complete_all
from tests.support.oracle import Oracle, prompt_of

pytestmark = pytest.mark.process


def staged(
    directory: Path, oracle: Oracle, num_blocks: int, *, prefill: int = 1, cluster: Block | None = None, **transfer: object
) -> Cluster:
    """Each engine node has staging memory of so many blocks, which takes KV in one direction: as on a GPU nobody pushes prefixes back."""
    sections: dict[str, Block] = {
        "transfer": {**transfer, "staging": num_blocks * oracle.kv_spec.bytes_per_block},
        "disaggregation": {"prefix_push": "never"},
        "cluster": cluster or {},
    }
    return Cluster(directory, prefill=prefill, module="tests.support.staged_node", **sections)


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


@pytest.mark.nightly
def test_requests_survive_their_prefill_node_killed_with_writes_in_flight(directory: Path, oracle: Oracle) -> None:
    with running(staged(directory, oracle, 200, cluster=PATIENT["cluster"], **PATIENT["transfer"])) as cluster:
        kill_amid_writes(cluster, oracle)
