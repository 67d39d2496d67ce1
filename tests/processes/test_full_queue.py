"""A prefill node that does not keep up: the queue fills, and clients hear of it at once; whoever leaves it is not computed."""

import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.clusters import Cluster, running, wait_until
from tests.support.oracle import Oracle, prompt_of

pytestmark = pytest.mark.process

REFUSED_S = 0.05
TRIES = 10
"""Other tests share the processors: the quickest counts."""


@pytest.fixture
def full(directory: Path, oracle: Oracle) -> Iterator[tuple[Cluster, list[socket.socket]]]:
    """p0 is stopped: it has two jobs in hand, which is all its credit, and a third fills the queue."""
    cluster = Cluster(
        directory,
        model={"max_model_len": 1024},
        disaggregation={"policy": "always", "max_prefill_queue": 1},
        cluster={"heartbeat_s": 10.0},
        transfer={"lease_s": 120.0},
    )
    with running(cluster):
        cluster.kill("p0", signal.SIGSTOP)
        clients = [begin(cluster, f"job-{i}", prompt_of(1000, oracle, salt=i)) for i in range(3)]
        try:
            wait_until("a job waits", lambda: depth(cluster) == 1, 10)
            yield cluster, clients
        finally:
            cluster.kill("p0", signal.SIGCONT)
            for client in clients:
                client.close()
        cluster.wait_idle(30.0)


def begin(cluster: Cluster, request_id: str, prompt: list[int]) -> socket.socket:
    """A request under way, whose client may go at any time."""
    raw = json.dumps({"model": "tiny", "prompt": prompt, "max_tokens": 4, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: router\r\nx-request-id: {request_id}\r\ncontent-length: {len(raw)}\r\n\r\n"
    client = socket.create_connection(("127.0.0.1", cluster.nodes["router"].port))
    client.sendall(head.encode() + raw)
    wait_until(f"{request_id} is decided", lambda: is_decided(cluster, request_id), 10)
    return client


def is_decided(cluster: Cluster, request_id: str) -> bool:
    reply = cluster.get(f"/v1/requests/{request_id}")
    return reply.status_code == 200 and reply.json()["decision"] is not None


def depth(cluster: Cluster) -> float:
    return cluster.metric("disaggd_prefill_queue_depth")[()]


def drops(cluster: Cluster, reason: str) -> float:
    return cluster.metric("disaggd_prefill_queue_drops_total").get((reason,), 0.0)


def test_a_full_queue_is_a_429_at_once_that_says_when_to_come_again(full: tuple[Cluster, list[socket.socket]], oracle: Oracle) -> None:
    cluster, _ = full
    body = {"model": "tiny", "prompt": prompt_of(900, oracle, salt=9), "max_tokens": 4}
    took_s = []
    with httpx.Client(base_url=cluster.url, timeout=30) as http:
        for _ in range(TRIES):
            begun = time.perf_counter()
            reply = http.post("/v1/completions", json=body)
            took_s.append(time.perf_counter() - begun)
            assert reply.status_code == 429, reply.text
            assert reply.json()["error"]["type"] == "rate_limit_error"
            assert int(reply.headers["retry-after"]) >= 1
        print(f"429 after {min(took_s) * 1e3:.1f} ms at best, {max(took_s) * 1e3:.1f} at worst of {TRIES}")
        assert min(took_s) < REFUSED_S
        with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as streamed:
            assert streamed.status_code == 429, "no stream has begun"
    wait_until("they are counted", lambda: drops(cluster, "full") == TRIES + 1, 5)
    assert cluster.complete(body["prompt"], max_tokens=4, headers={"x-disaggd-policy": "local"})["usage"]["completion_tokens"] == 4


def test_a_gone_clients_job_is_never_computed(full: tuple[Cluster, list[socket.socket]], oracle: Oracle) -> None:
    cluster, clients = full
    clients[2].close()
    wait_until("the job has left the queue", lambda: depth(cluster) == 0 and drops(cluster, "gone") == 1, 10)
    cluster.kill("p0", signal.SIGCONT)
    for client in clients[:2]:
        assert client.recv(12) == b"HTTP/1.1 200"
    cluster.wait_idle()
    assert (cluster.receipt("job-2")["finish_reason"], cluster.receipt("job-2")["prefill_node"]) == ("abort", None)
    for i, num_cached in ((1, 960), (2, 0)):
        again = cluster.complete(prompt_of(1000, oracle, salt=i), max_tokens=1)
        assert cluster.receipt(again["id"])["cached_tokens"]["prefill"] == num_cached, f"job-{i}"
