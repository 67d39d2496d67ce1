"""Signals to nodes that are busy: what they have begun ends well, nothing new comes, and a second signal ends them at once."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.processes.test_exactness import run
from tests.support.clusters import STOP_S, Cluster, running, wait_until
from tests.support.completions import InBackground, check
from tests.support.oracle import Oracle, prompt_of
from tests.support.streams import Stream

pytestmark = pytest.mark.process

TERM = signal.SIGTERM
GREEDY = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
DRAWN = {"temperature": 0.7, "seed": 5, "ignore_eos": True}


def wait_logged(cluster: Cluster, name: str, text: str) -> None:
    wait_until(f"{name} says {text!r}", lambda: text in cluster.log(name).read_text(), 20, every_s=0.002)


def exit_code(cluster: Cluster, name: str) -> int:
    process = cluster.nodes[name].process
    assert process is not None
    code = process.wait(STOP_S)
    assert "Traceback" not in cluster.log(name).read_text()
    return code


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """2P2D, whose nodes the tests below, in their order, stop one after the other. Links outlast a node that is stopped for a while."""
    with running(Cluster(tmp_path_factory.mktemp("cluster"), prefill=2, decode=2, cluster={"heartbeat_s": 5.0})) as cluster:
        yield cluster


def test_2p2d_equals_the_oracle_as_long_as_all_are_there(cluster: Cluster, oracle: Oracle) -> None:
    receipts = run(cluster, oracle, 32, 8)
    assert {receipt["prefill_node"] for receipt in receipts} == {None, "p0", "p1"}
    assert {receipt["decode_node"] for receipt in receipts} == {"d0", "d1"}


def test_a_second_signal_ends_an_engine_node_that_cannot_drain(cluster: Cluster) -> None:
    cluster.kill("router", signal.SIGSTOP)  # it lets nobody go
    try:
        cluster.kill("p1", TERM)
        wait_logged(cluster, "p1", "draining")
        cluster.kill("p1", signal.SIGINT)
        assert exit_code(cluster, "p1") == 130
        assert "ended at once by a second signal" in cluster.log("p1").read_text()
    finally:
        cluster.kill("router", signal.SIGCONT)


def test_a_prefill_node_finishes_and_pushes_its_jobs(cluster: Cluster, oracle: Oracle) -> None:
    """It is told while it still has all of them to do, some of them not even read from its link."""
    wait_until("p1 is gone", lambda: cluster.metric("disaggd_node_up")["p1", "prefill"] == 0, 20)
    work = [(prompt_of(600 + 64 * i, oracle), GREEDY) for i in range(8)]
    cluster.kill("p0", signal.SIGSTOP)
    under_way = InBackground(cluster, work)
    wait_until("it has all jobs", lambda: phases(cluster) == ["prefilling"] * 8, 20)
    cluster.kill("p0", TERM)
    cluster.kill("p0", signal.SIGCONT)
    replies = under_way.replies()
    for reply, (prompt, options) in zip(replies, work, strict=True):
        check(reply, prompt, options, oracle)
        receipt = cluster.receipt(reply["id"])
        assert (receipt["decision"], receipt["prefill_node"], receipt["retries"], len(receipt["attempts"])) == ("remote", "p0", 0, 1)
    assert exit_code(cluster, "p0") == 0
    later = cluster.complete(prompt_of(600, oracle), max_tokens=2)
    assert cluster.receipt(later["id"])["reason"].startswith("no_prefill_node")
    cluster.wait_idle()


def phases(cluster: Cluster) -> list[str]:
    return [receipt["phase"] for receipt in cluster.get("/v1/requests?limit=8").json()["data"]]


def test_a_decode_node_finishes_its_streams_and_new_ones_go_elsewhere(cluster: Cluster, oracle: Oracle) -> None:
    prompt = prompt_of(40, oracle)
    options = {**DRAWN, "max_tokens": 150}
    old = Stream(cluster, "old", prompt, **options).wait_begun()
    name = cluster.receipt("old")["decode_node"]
    cluster.kill(name, signal.SIGSTOP)
    assert not old.is_done
    cluster.kill(name, TERM)
    cluster.kill(name, signal.SIGCONT)
    wait_logged(cluster, "router", f"{name} is draining")
    new = cluster.complete(prompt_of(40, oracle), max_tokens=2)
    assert cluster.receipt(new["id"])["decode_node"] not in (None, name)
    old.join()
    assert old.is_done
    check(old.reply, prompt, options, oracle)
    assert [attempt["decode_node"] for attempt in cluster.receipt("old")["attempts"]] == [name]
    assert exit_code(cluster, name) == 0


def test_a_router_refuses_what_is_new_finishes_what_is_not_and_ends_at_a_second_signal(cluster: Cluster, oracle: Oracle) -> None:
    endless = Stream(cluster, "endless", prompt_of(20, oracle), **DRAWN, max_tokens=4000).wait_begun()
    short = Stream(cluster, "short", prompt_of(40, oracle), **DRAWN, max_tokens=150).wait_begun()
    cluster.kill("router", TERM)
    wait_logged(cluster, "router", "draining: ")
    refused = httpx.post(cluster.url + "/v1/completions", json={"model": "tiny", "prompt": "def", "max_tokens": 2}, timeout=10)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert refused.json()["error"]["message"] == "the router is stopping"
    assert [cluster.get(path).status_code for path in ("/ready", "/health")] == [503, 200]
    short.join()
    assert short.is_done and len(short.tokens) == 150
    cluster.kill("router", TERM)
    endless.join()
    assert endless.error is not None and endless.error["message"] == "the router is stopping"
    assert exit_code(cluster, "router") == 0


def test_what_is_left_at_the_limit_goes_on_elsewhere_or_ends_with_an_error(directory: Path, oracle: Oracle) -> None:
    with running(Cluster(directory, prefill=0, decode=2, cluster={"drain_s": 0.5})) as cluster:
        prompt = prompt_of(40, oracle)
        options = {**DRAWN, "max_tokens": 300}
        moved = Stream(cluster, "moved", prompt, **options).wait_begun()
        name = cluster.receipt("moved")["decode_node"]
        cluster.kill(name, TERM)
        wait_logged(cluster, "router", f"{name} is draining")
        told_at = time.monotonic()
        cluster.kill(name, signal.SIGSTOP)  # it cannot be quick enough
        wait_until("its time is up", lambda: time.monotonic() > told_at + 0.5, 5)
        cluster.kill(name, signal.SIGCONT)
        assert exit_code(cluster, name) == 0
        assert "not drained within 0.5 s" in cluster.log(name).read_text()
        moved.join()
        assert moved.is_done
        check(moved.reply, prompt, options, oracle)
        receipt = cluster.receipt("moved")
        assert (len(receipt["attempts"]), receipt["retries"]) == (2, 0)
        endless = Stream(cluster, "endless", prompt_of(20, oracle), **DRAWN, max_tokens=4000).wait_begun()
        ending = [name for name in cluster.nodes if cluster.is_running(name)]
        for name in ending:  # the whole cluster at once: its router cannot move the stream, and waits for nobody
            cluster.kill(name, TERM)
        endless.join()
        assert endless.error is not None and endless.error["message"] == "the router is stopping"
        assert [exit_code(cluster, name) for name in ending] == [0, 0]
