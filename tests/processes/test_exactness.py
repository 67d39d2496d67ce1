"""In float32, what a cluster generates equals the oracle, token for token."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.support.clusters import Cluster, running
from tests.support.completions import check, complete_all
from tests.support.oracle import Oracle, prompt_of

pytestmark = pytest.mark.process

LENGTHS = [12, 700, 64, 150, 33, 300, 129, 128, 65, 420, 90, 200, 1, 511, 257, 384]
"""Prompt lengths, short and long, on and beside block edges; repeated with other prompts."""

GREEDY = {"temperature": 0.0}
SEEDED = {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "seed": 7, "frequency_penalty": 0.2}


def jobs(count: int, oracle: Oracle, num_tokens: int) -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts and options: half greedy, half seeded, each with its own seed."""
    made = []
    for i in range(count):
        options = {**(GREEDY if i % 2 else SEEDED), "max_tokens": num_tokens, "ignore_eos": True}
        if not i % 2:
            options["seed"] = i
        made.append((prompt_of(LENGTHS[i % len(LENGTHS)], oracle, salt=i), options))
    return made


def run(cluster: Cluster, oracle: Oracle, count: int, num_tokens: int) -> list[dict[str, Any]]:
    work = jobs(count, oracle, num_tokens)
    replies = asyncio.run(complete_all(cluster, work))
    for reply, (prompt, options) in zip(replies, work, strict=True):
        check(reply, prompt, options, oracle)
    cluster.wait_idle()
    return [cluster.receipt(reply["id"]) for reply in replies]


def test_64_concurrent_requests_equal_the_oracle(cluster: Cluster, oracle: Oracle) -> None:
    receipts = run(cluster, oracle, 64, 12)
    assert {receipt["decision"] for receipt in receipts} == {"local", "remote"}


def test_preemption_by_a_small_pool_changes_no_token(directory: Path, oracle: Oracle) -> None:
    """40 blocks hold two or three of the longer sequences: decode preempts, grants wait for room."""
    small = {"kv_cache": 40 * oracle.kv_spec.bytes_per_block}
    with running(Cluster(directory, nodes=small, router={"kv_overcommit": 100})) as cluster:
        run(cluster, oracle, 16, 80)
        assert cluster.metric("disaggd_num_preemptions_total")["d0",] > 0, "the pool was not small enough"
