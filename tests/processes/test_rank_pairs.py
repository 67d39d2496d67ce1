"""Nodes of any number of ranks hand over to each other, both ways: what comes out is the oracle's; and a rank that dies takes its node
along, and nothing else. By night. By day `test_block_sizes` and `test_fp8_wire` have ranks that hand over, `test_doctor` checks the ways
between them, and `test_ranks` kills one.

The model has two KV heads: ranks have one each, or share one.
"""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from tests.processes.test_ranks import ranks_of
from tests.support.clusters import Cluster, running, wait_until
from tests.support.completions import InBackground, Work, check, complete_all
from tests.support.oracle import Oracle, prompt_of

pytestmark = [pytest.mark.process, pytest.mark.nightly]

GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
BLOCK = 64
KV_HEADS = 2
PAIRS = ((2, 1), (1, 2), (2, 2), (4, 2), (2, 4), (4, 1), (1, 4), (4, 4))


def cluster_of(directory: Path, num_prefill: int, num_decode: int, **sections: dict[str, object]) -> Cluster:
    cluster = Cluster(directory, **sections)
    cluster.nodes["p0"].options["tp"], cluster.nodes["d0"].options["tp"] = num_prefill, num_decode
    return cluster


@pytest.mark.parametrize(("num_prefill", "num_decode"), PAIRS)
def test_a_hand_off_between_ranks_says_what_one_process_says(directory: Path, oracle: Oracle, num_prefill: int, num_decode: int) -> None:
    """And so does one whose prefix was pushed the other way before."""
    always = {"disaggregation": {"prefix_push": "always"}, "transfer": {"verify": True}}
    copies_there, copies_back = max(1, num_decode // KV_HEADS), max(1, num_prefill // KV_HEADS)
    with running(cluster_of(directory, num_prefill, num_decode, **always)) as cluster:
        work: Work = [(prompt_of(400 + 150 * i, oracle, salt=i), GREEDY) for i in range(3)]
        for reply, (prompt, sampling) in zip(asyncio.run(complete_all(cluster, work, "remote")), work, strict=True):
            check(reply, prompt, sampling, oracle)
        fresh = prompt_of(500, oracle, salt=77)
        (reply,) = asyncio.run(complete_all(cluster, [(fresh, GREEDY)], "local"))
        turn = fresh + prompt_of(300, oracle, salt=78)
        (reply,) = asyncio.run(complete_all(cluster, [(turn, GREEDY)], "remote"))
        check(reply, turn, GREEDY, oracle)
        receipt = cluster.receipt(reply["id"])
        num_pushed = len(fresh) // BLOCK * BLOCK
        assert receipt["prefix_push"]["outcome"] == "landed"
        assert receipt["prefix_push"]["kv_bytes"] == oracle.kv_bytes(num_pushed) * copies_back
        assert receipt["kv_bytes"] == (oracle.kv_bytes(len(turn)) - oracle.kv_bytes(num_pushed)) * copies_there
        cluster.wait_idle()


@pytest.mark.parametrize("victim", ["p0", "d0"])
def test_a_rank_that_is_killed_ends_its_node_and_requests_go_on(directory: Path, oracle: Oracle, victim: str) -> None:
    cluster = Cluster(directory, decode=2, transfer={"quiesce_s": 2.0, "lease_s": 2.0})
    cluster.nodes["p0"].options["tp"] = cluster.nodes["d0"].options["tp"] = 2
    with running(cluster):
        work: Work = [(prompt_of(1500 + 64 * i, oracle, salt=i), GREEDY) for i in range(6)]
        under_way = InBackground(cluster, work, "remote")
        wait_until("blocks are granted", lambda: cluster.blocks("granted") > 0, 20)
        (rank,) = ranks_of(cluster, victim)
        os.kill(rank, signal.SIGKILL)
        wait_until("the node has ended", lambda: not cluster.is_running(victim), 10)
        process = cluster.nodes[victim].process
        assert process is not None and process.returncode == 3
        assert "rank 1 of 2 has ended (-9), and this node cannot go on without it" in cluster.log(victim).read_text()
        for reply, (prompt, sampling) in zip(under_way.replies(), work, strict=True):
            check(reply, prompt, sampling, oracle)
        cluster.start_node(victim)
        wait_until("the node is back", cluster.is_whole, 120, every_s=0.1)
        (again,) = asyncio.run(complete_all(cluster, work[:1], "remote"))
        check(again, *work[0], oracle)
        cluster.wait_idle(10)
