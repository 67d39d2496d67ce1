"""A prefill node that lacks what decode has cached gets it by a push; and no block is lost when either dies over it."""

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from disaggd.sampling import SamplingParams
from tests.support.clusters import Cluster, running, wait_until
from tests.support.completions import InBackground, Work, check, complete_all
from tests.support.oracle import Oracle, prompt_of

pytestmark = pytest.mark.process

GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
ALWAYS = {"disaggregation": {"prefix_push": "always"}}
PATIENT = {**ALWAYS, "cluster": {"heartbeat_s": 10.0}, "transfer": {"quiesce_s": 2.0, "lease_s": 30.0}}
"""For tests that stop a node: it stays linked, and leases last, for a while."""
BLOCK = 64


def replies_to(cluster: Cluster, work: Work, policy: str) -> list[dict[str, Any]]:
    return asyncio.run(complete_all(cluster, work, policy))


def follow_up(first: list[int], num_tokens: int, oracle: Oracle, salt: int = 0) -> list[int]:
    """The next turn of a conversation: its prompt so far, what was answered to that, and something new."""
    answer = oracle.continue_(first, SamplingParams(**GREEDY))
    return first + answer + prompt_of(num_tokens, oracle, salt=1000 + salt)


def test_a_long_second_turn_is_computed_behind_what_decode_pushes(directory: Path, oracle: Oracle) -> None:
    with running(Cluster(directory, **ALWAYS)) as cluster:
        first = prompt_of(700, oracle)
        replies_to(cluster, [(first, GREEDY)], "local")
        second = follow_up(first, 300, oracle)
        (reply,) = replies_to(cluster, [(second, GREEDY)], "remote")
        check(reply, second, GREEDY, oracle)
        receipt = cluster.receipt(reply["id"])
        num_pushed = (len(first) + GREEDY["max_tokens"] - 1) // BLOCK * BLOCK
        assert receipt["prefix_push"] == {
            "outcome": "landed",
            "tokens": num_pushed,
            "kv_bytes": oracle.kv_bytes(num_pushed),
            "ms": receipt["prefix_push"]["ms"],
        }
        assert receipt["cached_tokens"] == {"decode": num_pushed, "prefill": num_pushed}
        assert receipt["kv_bytes"] == oracle.kv_bytes(len(second)) - oracle.kv_bytes(num_pushed)
        cluster.wait_idle()
        third = follow_up(second, 300, oracle)
        (reply,) = replies_to(cluster, [(third, GREEDY)], "remote")
        check(reply, third, GREEDY, oracle)
        assert cluster.receipt(reply["id"])["cached_tokens"]["prefill"] >= len(second) // BLOCK * BLOCK
        cluster.wait_idle()


@pytest.mark.nightly
def test_two_of_each_push_to_each_other_and_equal_the_oracle(directory: Path, oracle: Oracle) -> None:
    with running(Cluster(directory, prefill=2, decode=2, **ALWAYS)) as cluster:
        work = [(prompt_of(200 + 30 * i, oracle, salt=i), GREEDY) for i in range(12)]
        replies_to(cluster, work, "local")
        turns = [(first + prompt_of(200, oracle, salt=100 + salt), GREEDY) for salt, (first, _) in enumerate(work)]
        replies = replies_to(cluster, turns, "remote")
        for reply, (prompt, options) in zip(replies, turns, strict=True):
            check(reply, prompt, options, oracle)
        receipts = [cluster.receipt(reply["id"]) for reply in replies]
        assert {receipt["prefix_push"]["outcome"] for receipt in receipts if receipt["prefix_push"] is not None} == {"landed"}
        assert sum(cluster.metric("disaggd_prefix_push_tokens_total").values()) >= 12 * 128
        cluster.wait_idle()


# ── who dies over it ─────────────────────────────────────────────────────────────────────────────────────────────────


def unsent_bytes(cluster: Cluster, node: str) -> int:
    """In the node's sockets, because nobody reads them at the other end."""
    links = (descriptor.readlink() for descriptor in Path(f"/proc/{cluster.nodes[node].pid}/fd").iterdir())
    inodes = {str(link).removeprefix("socket:[").removesuffix("]") for link in links}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(int(row[4].partition(":")[0], 16) for row in rows if row[9] in inodes)


def granted(cluster: Cluster, node: str) -> float:
    return cluster.metric("disaggd_kv_blocks")[node, "granted"]


def stopped_amid_pushes(cluster: Cluster, oracle: Oracle) -> tuple[InBackground, Work]:
    """Second turns, whose prefixes d0 and d1 write to p0, which is stopped and reads none of them: more than the sockets take."""
    firsts = [(prompt_of(1800 + BLOCK * i, oracle, salt=i), GREEDY) for i in range(6)]
    replies_to(cluster, firsts, "local")
    turns = [(first + prompt_of(300, oracle, salt=100 + salt), GREEDY) for salt, (first, _) in enumerate(firsts)]
    cluster.kill("p0", signal.SIGSTOP)
    under_way = InBackground(cluster, turns, "remote")
    wait_until("d0 has granted blocks for the rest", lambda: granted(cluster, "d0") > 0, 30)
    cluster.kill("d0", signal.SIGSTOP)
    cluster.kill("p0", signal.SIGCONT)
    wait_until("p0 has granted blocks for the prefixes", lambda: granted(cluster, "p0") >= 28, 30)
    cluster.kill("p0", signal.SIGSTOP)
    cluster.kill("d0", signal.SIGCONT)
    wait_until("writes are in flight that nobody reads", lambda: unsent_bytes(cluster, "d0") > 100_000, 30)
    return under_way, turns


@pytest.mark.nightly
@pytest.mark.parametrize("victim", ["d0", "p0"])
def test_a_node_killed_amid_a_push_leaves_no_block_behind(directory: Path, oracle: Oracle, victim: str) -> None:
    """d1 is there so that somebody can go on."""
    with running(Cluster(directory, decode=2, **PATIENT)) as cluster:
        under_way, turns = stopped_amid_pushes(cluster, oracle)
        cluster.kill(victim)
        cluster.start_node(victim)
        if victim != "p0":
            cluster.kill("p0", signal.SIGCONT)
        for reply, (prompt, options) in zip(under_way.replies(), turns, strict=True):
            check(reply, prompt, options, oracle)
        assert all(cluster.is_running(name) for name in ("p0", "d0", "d1"))
        wait_until("the cluster is whole", cluster.is_whole, 120, every_s=0.1)
        cluster.wait_idle(PATIENT["transfer"]["quiesce_s"] + 5)
        first = prompt_of(600, oracle, salt=77)
        replies_to(cluster, [(first, GREEDY)], "local")
        after = first + prompt_of(300, oracle, salt=78)
        (reply,) = replies_to(cluster, [(after, GREEDY)], "remote")
        check(reply, after, GREEDY, oracle)
        assert cluster.receipt(reply["id"])["prefix_push"]["outcome"] == "landed"
        cluster.wait_idle()
