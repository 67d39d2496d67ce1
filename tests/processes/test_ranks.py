"""A decode node of two ranks: it says what one process says, and ends as one."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from tests.support.clusters import Cluster, running, wait_until
from tests.support.completions import check, complete_all
from tests.support.oracle import Oracle, prompt_of

pytestmark = pytest.mark.process


def ranks_of(cluster: Cluster, name: str) -> list[int]:
    """Processes of its other ranks; multiprocessing has one of its own beside them."""
    children = Path(f"/proc/{cluster.nodes[name].pid}/task").glob("*/children")
    pids = [int(pid) for child in children for pid in child.read_text().split()]
    return [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_node_of_two_ranks_answers_and_ends_with_either(directory: Path, oracle: Oracle) -> None:
    with running(Cluster(directory, prefill=0, nodes={"tp": 2})) as cluster:
        options = {"max_tokens": 16, "ignore_eos": True}
        work = [(prompt_of(200 + i, oracle, salt=i), {**options, "temperature": 0.7 * (i % 2), "seed": i}) for i in range(4)]
        for reply, (prompt, sampling) in zip(asyncio.run(complete_all(cluster, work)), work, strict=True):
            check(reply, prompt, sampling, oracle)
        (rank,) = ranks_of(cluster, "d0")
        os.kill(rank, signal.SIGKILL)
        wait_until("the node has ended", lambda: not cluster.is_running("d0"), 10)
        assert cluster.nodes["d0"].process is not None and cluster.nodes["d0"].process.returncode == 3
        log = cluster.log("d0").read_text()
        assert "rank 1 of 2 has ended (-9), and this node cannot go on without it" in log and "Traceback" not in log
        assert "tokens, 2 ranks\n" in log
        cluster.start_node("d0")
        cluster.wait_ready()
        (again,) = asyncio.run(complete_all(cluster, work[:1]))
        check(again, *work[0], oracle)
        (rank,) = ranks_of(cluster, "d0")
        cluster.kill("d0")
        wait_until("its rank has ended with it", lambda: not Path(f"/proc/{rank}").exists(), 10)
