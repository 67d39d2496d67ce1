"""KV over a link of 20 Mbit/s: the client has its first token long before the transfer ends.

By night: by day the scenes of `test_failure_matrix` have a client whose first token is there while nobody reads its KV.
"""

import ctypes
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.clusters import Cluster, is_root, running, wait_until
from tests.support.oracle import Oracle, prompt_of

pytestmark = [
    pytest.mark.process,
    pytest.mark.nightly,
    pytest.mark.skipif(not is_root() or shutil.which("tc") is None, reason="network namespaces want root, ip and tc"),
]

NEAR, FAR = f"disaggd-near-{os.getpid()}", f"disaggd-far-{os.getpid()}"


def sh(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def link() -> Iterator[None]:
    """Two namespaces joined by one link `kv0` of 20 Mbit/s; gone again afterwards."""
    sh("ip", "netns", "add", NEAR)
    sh("ip", "netns", "add", FAR)
    try:
        sh("ip", "link", "add", "kv0", "netns", NEAR, "type", "veth", "peer", "name", "kv0", "netns", FAR)
        for space, address in ((NEAR, "10.77.0.1/24"), (FAR, "10.77.0.2/24")):
            inside = ("ip", "netns", "exec", space)
            sh(*inside, "ip", "address", "add", address, "dev", "kv0")
            sh(*inside, "ip", "link", "set", "kv0", "up")
            sh(*inside, "ip", "link", "set", "lo", "up")
            sh(*inside, "tc", "qdisc", "add", "dev", "kv0", "root", "tbf", "rate", "20mbit", "burst", "32kbit", "latency", "200ms")
        yield
    finally:
        sh("ip", "netns", "del", NEAR)
        sh("ip", "netns", "del", FAR)


class InNamespace(threading.Thread):
    """Runs a function in a network namespace: its sockets are there."""

    def __init__(self, space: str, function: object) -> None:
        super().__init__()
        self._space = space
        self._function = function
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            space = os.open(f"/run/netns/{self._space}", os.O_RDONLY)
            assert ctypes.CDLL(None, use_errno=True).setns(space, 0) == 0, os.strerror(ctypes.get_errno())
            os.close(space)
            self._function()  # type: ignore[operator]
        except BaseException as error:  # noqa: BLE001  raised again in the test's thread
            self.error = error


def test_the_first_token_does_not_wait_for_the_transfer(directory: Path, oracle: Oracle, link: None) -> None:
    cluster = Cluster(directory, transfer={"devices": "kv0"}, cluster={"secret": "between two namespaces".replace(" ", "-")})
    cluster.nodes["d0"].host = "10.77.0.2"
    for name, space in (("router", NEAR), ("p0", NEAR), ("d0", FAR)):  # `exec` also mounts /sys anew, where UCX looks for its device
        cluster.nodes[name].prefix = ("ip", "netns", "exec", space)
    thread = InNamespace(NEAR, lambda: first_token_comes_first(cluster, oracle))
    thread.start()
    thread.join(200)
    assert not thread.is_alive()
    if thread.error is not None:
        raise thread.error


def first_token_comes_first(cluster: Cluster, oracle: Oracle) -> None:
    num_tokens = 1500
    with running(cluster):
        body = {"model": "tiny", "prompt": prompt_of(num_tokens, oracle), "max_tokens": 4, "ignore_eos": True, "stream": True}
        begun = time.monotonic()
        with httpx.stream("POST", cluster.url + "/v1/completions", json=body, timeout=60) as stream:
            arrivals = [time.monotonic() - begun for line in stream.iter_lines() if line.startswith("data: {")]
            request_id = stream.headers["x-request-id"]
        wait_until("the push is reported", lambda: cluster.receipt(request_id)["kv_bytes"] > 0, 20)
        receipt = cluster.receipt(request_id)
        print(f"{arrivals=} {receipt}")
        wire_s = receipt["kv_bytes"] / 2.5e6
        clock = receipt["prefill_clock_ms"]
        assert receipt["kv_bytes"] == oracle.kv_bytes(num_tokens)
        assert clock["first_token_reported"] < clock["last_handle_done"]
        assert arrivals[0] < arrivals[1] - wire_s / 4, f"{arrivals}: the first token waited for the wire ({wire_s:.1f} s)"
