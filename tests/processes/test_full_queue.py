"""A prefill node that does not keep up: the queue fills, and clients hear of it at once; whoever leaves it is not computed."""

import json
import signal
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

from tests.support.clusters import Cluster, running, wait_until
from tests.support.oracle import Oracle, prompt_of

pytestmark = pytest.mark.process

REFUSED_S = 0.05
TRIES = 10
"""Other tests share the processors: the quickest counts."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(
        tmp_path_factory.mktemp("full"),
        model={"max_model_len": 1024},
        disaggregation={"policy": "always", "max_prefill_queue": 1},
        cluster={"heartbeat_s": 10.0},
        transfer={"lease_s": 120.0},
    )
    with running(cluster):
        yield cluster


@dataclass(frozen=True, slots=True)
class Job:
    """Under way; its client may go at any time."""

    request_id: str
    prompt: list[int]
    client: socket.socket


@pytest.fixture
def jobs(cluster: Cluster, oracle: Oracle) -> Iterator[list[Job]]:
    """p0 is stopped: it has two jobs in hand, which is all its credit, and a third fills the queue."""
    cluster.kill("p0", signal.SIGSTOP)
    jobs = [begin(cluster, prompt_of(1000, oracle)) for _ in range(3)]
    try:
        wait_until("a job waits", lambda: depth(cluster) == 1, 10)
        yield jobs
    finally:
        cluster.kill("p0", signal.SIGCONT)
        for job in jobs:
            job.client.close()
    wait_until("no job waits", lambda: depth(cluster) == 0, 10)
    cluster.wait_idle(30.0)


def begin(cluster: Cluster, prompt: list[int]) -> Job:
    request_id = f"job-{uuid.uuid4().hex}"
    raw = json.dumps({"model": "tiny", "prompt": prompt, "max_tokens": 4, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: router\r\nx-request-id: {request_id}\r\ncontent-length: {len(raw)}\r\n\r\n"
    client = socket.create_connection(("127.0.0.1", cluster.nodes["router"].port))
    client.sendall(head.encode() + raw)
    wait_until(f"{request_id} is decided", lambda: is_decided(cluster, request_id), 10)
    return Job(request_id, prompt, client)


def is_decided(cluster: Cluster, request_id: str) -> bool:
    reply = cluster.get(f"/v1/requests/{request_id}")
    return reply.status_code == 200 and reply.json()["decision"] is not None


def depth(cluster: Cluster) -> float:
    return cluster.metric("disaggd_prefill_queue_depth")[()]


def drops(cluster: Cluster, reason: str) -> float:
    return cluster.metric("disaggd_prefill_queue_drops_total").get((reason,), 0.0)


@pytest.mark.usefixtures("jobs")
def test_a_full_queue_is_a_429_at_once_that_says_when_to_come_again(cluster: Cluster, oracle: Oracle) -> None:
    before = drops(cluster, "full")
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
    wait_until("they are counted", lambda: drops(cluster, "full") == before + TRIES + 1, 5)
    assert cluster.complete(body["prompt"], max_tokens=4, headers={"x-disaggd-policy": "local"})["usage"]["completion_tokens"] == 4


def test_a_gone_clients_job_is_never_computed(cluster: Cluster, jobs: list[Job]) -> None:
    first, second, waiting = jobs
    before = drops(cluster, "gone")
    waiting.client.close()
    wait_until("the job has left the queue", lambda: depth(cluster) == 0 and drops(cluster, "gone") == before + 1, 10)
    cluster.kill("p0", signal.SIGCONT)
    for job in (first, second):
        assert job.client.recv(12) == b"HTTP/1.1 200"
    cluster.wait_idle()
    receipt = cluster.receipt(waiting.request_id)
    assert (receipt["finish_reason"], receipt["prefill_node"]) == ("abort", None)
    for job, num_cached in ((second, 960), (waiting, 0)):
        again = cluster.complete(job.prompt, max_tokens=1)
        assert cluster.receipt(again["id"])["cached_tokens"]["prefill"] == num_cached, job.request_id
