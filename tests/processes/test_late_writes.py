"""A prefill node that wakes up with writes for blocks that others compute in by now: every token is the oracle's.

By night: by day `tests/transfer/test_late_writes.py` shows the same of the bytes, with both roles and real NIXL.
"""

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.clusters import Cluster, running, wait_until
from tests.support.completions import InBackground, Work, check
from tests.support.oracle import Oracle, prompt_of

pytestmark = [pytest.mark.process, pytest.mark.nightly]

GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
LONG = {"temperature": 0.0, "max_tokens": 60, "ignore_eos": True}
NUM_PROMPTS = 3
PROMPT_BLOCKS = 29
POOL_BLOCKS = 100
"""Room for three prompts of 29 blocks and what follows them: whoever comes next has their blocks."""


def patient(directory: Path, oracle: Oracle) -> Cluster:
    """Nodes that are stopped stay linked, and their sockets open, for a while; grants are given up soon."""
    return Cluster(
        directory,
        nodes={"kv_cache": POOL_BLOCKS * oracle.kv_spec.bytes_per_block, "prefix_cache": False},
        cluster={"heartbeat_s": 20.0},
        transfer={"lease_s": 2.0, "quiesce_s": 2.0, "user_timeout_s": 60.0},
    )


def prompts(oracle: Oracle, salt: int, options: dict[str, Any]) -> Work:
    return [(prompt_of(PROMPT_BLOCKS * 64 - 8, oracle, salt=salt + i), options) for i in range(NUM_PROMPTS)]


def listed(cluster: Cluster, node: str, state: str) -> list[dict[str, Any]]:
    return [one for one in cluster.get("/v1/debug/blocks").json()["blocks"] if (one["node"], one["state"]) == (node, state)]


def states(cluster: Cluster) -> dict[str, str]:
    return {node["name"]: node["state"] for node in cluster.get("/v1/debug/blocks").json()["nodes"]}


def test_blocks_with_a_new_owner_are_not_written_by_a_prefill_node_that_wakes_up(directory: Path, oracle: Oracle) -> None:
    with running(patient(directory, oracle)) as cluster:
        cluster.kill("p0", signal.SIGSTOP)
        old = prompts(oracle, 0, GREEDY)
        writers = InBackground(cluster, old, "remote")
        wait_until("blocks of two prompts are granted", lambda: cluster.blocks("granted") >= 2 * PROMPT_BLOCKS, 20)
        cluster.kill("d0", signal.SIGSTOP)
        cluster.kill("p0", signal.SIGCONT)
        wait_until("writes are in flight that nobody reads", lambda: cluster.blocks("held") > PROMPT_BLOCKS, 20)
        held = listed(cluster, "p0", "held")
        assert states(cluster) == {"p0": "answered", "d0": "silent"}
        assert {one["peer"] for one in held} == {"d0"} and all(one["request"] for one in held)
        cluster.kill("p0", signal.SIGSTOP)
        cluster.kill("d0", signal.SIGCONT)
        wait_until("grants are given up", lambda: listed(cluster, "d0", "quarantined"), 20)
        wait_until("d0 has fenced p0", lambda: not listed(cluster, "d0", "quarantined"), 20)
        new = prompts(oracle, 100, LONG)
        owners = InBackground(cluster, new, "local")
        wait_until("they compute in most of the pool", lambda: cluster.metric("disaggd_kv_blocks")["d0", "used"] > 2 * PROMPT_BLOCKS, 60)
        cluster.kill("p0", signal.SIGCONT)
        for reply, (prompt, options) in zip(owners.replies(), new, strict=True):
            check(reply, prompt, options, oracle)
        for reply, (prompt, options) in zip(writers.replies(), old, strict=True):
            check(reply, prompt, options, oracle)
        cluster.wait_idle(10)
        assert cluster.get("/v1/debug/blocks").json()["blocks"] == []
