"""Nodes that die under many requests: each completes with the oracle's tokens, and no block stays behind. One by one, and every day:
`test_failure_matrix.py`."""

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.clusters import Cluster, running, wait_until
from tests.support.completions import InBackground, check, complete_all
from tests.support.oracle import Oracle, prompt_of

pytestmark = [pytest.mark.process, pytest.mark.nightly]

QUICK = {"quiesce_s": 2.0, "lease_s": 2.0}
PATIENT = {"cluster": {"heartbeat_s": 5.0}, "transfer": {"quiesce_s": 2.0}}
"""For tests that stop a node: it stays linked, and leases last, for a while."""


def long_jobs(count: int, oracle: Oracle) -> list[tuple[list[int], dict[str, Any]]]:
    greedy = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
    seeded = {"temperature": 0.7, "seed": 11, "max_tokens": 12, "ignore_eos": True}
    return [(prompt_of(1800 + 64 * i, oracle, salt=i), greedy if i % 2 else seeded) for i in range(count)]


def is_pushing(cluster: Cluster) -> bool:
    return cluster.blocks("granted") > 0


def kill_amid_writes(cluster: Cluster, oracle: Oracle) -> None:
    """Kill p0 with writes in flight to d0, which reads none of them until p0 is dead: d0 lives, nothing is lost, the next pushes land.

    For a `PATIENT` cluster. Four prompts' KV, 25 MB, is more than the sockets between the two take.
    """
    work = long_jobs(8, oracle)
    cluster.kill("p0", signal.SIGSTOP)
    under_way = InBackground(cluster, work)
    wait_until("the blocks of four prompts are granted", lambda: cluster.blocks("granted") > 4 * 28, 10)
    cluster.kill("d0", signal.SIGSTOP)
    cluster.kill("p0", signal.SIGCONT)
    wait_until("writes are in flight that nobody reads", lambda: cluster.blocks("held") > 0, 12)
    cluster.kill("p0")
    cluster.kill("d0", signal.SIGCONT)
    cluster.start_node("p0")
    replies = under_way.replies()
    assert cluster.is_running("d0")
    for reply, (prompt, options) in zip(replies, work, strict=True):
        check(reply, prompt, options, oracle)
    assert sum(cluster.receipt(reply["id"])["retries"] for reply in replies) > 0, "the kill hit nothing"
    cluster.wait_idle(PATIENT["transfer"]["quiesce_s"] + 5)
    wait_until("the prefill node is back", cluster.is_whole, 120, every_s=0.1)
    prompt, options = long_jobs(9, oracle)[-1]
    (after,) = asyncio.run(complete_all(cluster, [(prompt, options)]))
    check(after, prompt, options, oracle)
    assert cluster.receipt(after["id"])["decision"] == "remote"
    cluster.wait_idle()


def test_requests_survive_their_prefill_node_and_its_replacement(directory: Path, oracle: Oracle) -> None:
    with running(Cluster(directory, transfer=QUICK)) as cluster:
        work = long_jobs(16, oracle)
        batches = []
        for round_ in (work[:8], work[8:]):
            batches.append(InBackground(cluster, round_))
            wait_until("the prefill node has work", lambda: is_pushing(cluster), 30)
            cluster.kill("p0")
            cluster.start_node("p0")
            wait_until("the prefill node is back", cluster.is_whole, 40, every_s=0.1)
        replies = [reply for batch in batches for reply in batch.replies()]
        for reply, (prompt, options) in zip(replies, work, strict=True):
            check(reply, prompt, options, oracle)
        retries = [cluster.receipt(reply["id"])["retries"] for reply in replies]
        assert sum(retries[:8]) > 0 and sum(retries[8:]) > 0, "a kill hit nothing"
        cluster.wait_idle(QUICK["quiesce_s"] + 5)


def test_a_decode_node_survives_a_prefill_node_killed_with_writes_in_flight(directory: Path, oracle: Oracle) -> None:
    with running(Cluster(directory, **PATIENT)) as cluster:
        kill_amid_writes(cluster, oracle)


def test_without_a_prefill_node_decode_prefills_by_itself(directory: Path, oracle: Oracle) -> None:
    with running(Cluster(directory, transfer=QUICK)) as cluster:
        work = long_jobs(6, oracle)
        under_way = InBackground(cluster, work)
        wait_until("the prefill node has work", lambda: is_pushing(cluster), 30)
        cluster.kill("p0")
        for reply, (prompt, options) in zip(under_way.replies(), work, strict=True):
            check(reply, prompt, options, oracle)
        later = cluster.complete(prompt_of(600, oracle), max_tokens=4)
        assert cluster.receipt(later["id"])["reason"].startswith("no_prefill_node")
        assert "no prefill node is left" in cluster.log("router").read_text()
        cluster.wait_idle(QUICK["quiesce_s"] + 5)  # the fence ends the quarantine: nobody is there to quiesce


def test_a_decode_node_that_dies_is_replaced_in_the_middle_of_a_stream(directory: Path, oracle: Oracle) -> None:
    with running(Cluster(directory, decode=2, transfer=QUICK)) as cluster:
        options = {"max_tokens": 400, "ignore_eos": True}
        work = [(prompt_of(50 + i, oracle, salt=i), {**options, "temperature": 0.6, "seed": i}) for i in range(4)]
        under_way = InBackground(cluster, work)
        wait_until("both decode nodes generate", lambda: all(n.get("running") for n in cluster.get("/v1/cluster").json()["nodes"][1:]), 30)
        cluster.kill("d0")
        for reply, (prompt, sampling) in zip(under_way.replies(), work, strict=True):
            check(reply, prompt, sampling, oracle)
        cluster.wait_idle()
