"""A cluster with everything locked: HTTPS with API keys, links over TLS with a secret. Who may, is served; who may not, is refused."""

import contextlib
import random
import socket
import ssl
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from disaggd.api_keys import key_table, new_key
from tests.support.certificates import Certificates, make_certificates
from tests.support.clusters import Cluster, running, wait_until

pytestmark = pytest.mark.process

SECRET = "correct-horse-battery"
WAIT_S = 20.0


class LockedCluster(Cluster):
    """Asked over HTTPS, with an admin's key."""

    def __init__(self, directory: Path, made: Certificates, **sections: Any) -> None:
        self.made = made
        self.trust = ssl.create_default_context(cafile=made.path("ca.pem"))
        self.key, self.alice = new_key(), new_key()
        router = {"api_keys": "keys.toml", "tls_cert": made.path("router.pem"), "tls_key": made.path("router.key")}
        super().__init__(directory, router=router, cluster={"secret": SECRET, **made.links("p0")}, **sections)
        self.write_keys(key_table("root", self.key) + "admin = true\n" + key_table("alice", self.alice))

    def write_keys(self, text: str) -> None:
        (self.directory / "keys.toml").write_text(text)

    @property
    def url(self) -> str:
        return super().url.replace("http://", "https://")

    def ask(self, method: str, path: str, key: str | None, **options: Any) -> httpx.Response:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.request(method, self.url + path, headers=headers, verify=self.trust, timeout=60, **options)

    def get(self, path: str) -> httpx.Response:
        return self.ask("GET", path, self.key)

    def status(self, key: str | None) -> int:
        """Of a request that is prefilled by one node and decoded by the other."""
        prompt = [random.randrange(100, 4000) for _ in range(300)]  # nobody has it cached
        body = {"prompt": prompt, "max_tokens": 4, "temperature": 0}
        return self.ask("POST", "/v1/completions", key, json=body).status_code

    def refused(self, by: str, cause: str) -> float:
        return self.metric("disaggd_refused_links_total").get((by, cause), 0.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, made: Certificates) -> Iterator[LockedCluster]:
    with running(LockedCluster(tmp_path_factory.mktemp("locked"), made)) as locked:
        yield locked


@contextlib.contextmanager
def another_router(locked: LockedCluster, directory: Path, **sections: Any) -> Iterator[Cluster]:
    """A second router for the same engine nodes, by a file that says something else."""
    other = Cluster(directory, prefill=0, decode=0, **{"cluster": {"secret": SECRET, **locked.made.links("router")}, **sections})
    other.nodes |= {name: replace(node, process=None) for name, node in locked.nodes.items() if name != "router"}
    other.write_config()
    other.start_node("router")
    try:
        yield other
    finally:
        other.close()


def test_only_who_has_a_key_is_served(cluster: LockedCluster) -> None:
    assert [cluster.status(key) for key in (cluster.alice, cluster.key, new_key(), None)] == [200, 200, 401, 401]
    assert [cluster.ask("GET", "/v1/cluster", key).status_code for key in (cluster.key, cluster.alice, None)] == [200, 403, 401]
    assert cluster.ask("GET", "/health", None).status_code == 200
    assert cluster.metric("disaggd_unauthorized_total") == {("wrong",): 1.0, ("missing",): 2.0}
    decided = cluster.metric("disaggd_decisions_total")
    assert {decision for decision, _ in decided} == {"remote"}, "KV moved"
    log = cluster.log("router").read_text()
    assert log.count("wrong API key") == log.count("missing API key") == 1
    assert "sk-disaggd" not in log


def test_keys_are_added_and_withdrawn_while_it_runs_and_a_broken_file_changes_nothing(cluster: LockedCluster) -> None:
    file, new = (cluster.directory / "keys.toml").read_text(), new_key()
    cluster.write_keys(file + "[[key]")
    wait_until("the broken file is noticed", lambda: "the API keys stay as they were" in cluster.log("router").read_text(), WAIT_S)
    assert cluster.status(cluster.alice) == 200
    cluster.write_keys(key_table("root", cluster.key) + "admin = true\n" + key_table("bob", new))
    wait_until("bob is let in", lambda: cluster.status(new) == 200, WAIT_S)
    assert cluster.status(cluster.alice) == 401
    cluster.write_keys(file)


def test_plain_http_finds_nobody(cluster: LockedCluster) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(cluster.url.replace("https", "http") + "/health", timeout=WAIT_S)
    assert cluster.status(cluster.key) == 200


def test_a_router_with_another_secret_or_model_is_refused_and_counted_and_the_cluster_serves_on(
    cluster: LockedCluster, tmp_path: Path
) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "model").mkdir()
    other_secret = {"secret": "wrong-horse-battery", **cluster.made.links("router")}
    with (
        another_router(cluster, tmp_path / "secret", cluster=other_secret) as stranger,
        another_router(cluster, tmp_path / "model", model={"weights": "int8"}) as other_model,
    ):
        for node in ("p0", "d0"):
            for cause in ("secret", "model_id"):
                wait_until(f"{node} has refused a router over its {cause}", lambda n=node, c=cause: cluster.refused(n, c) > 0, WAIT_S)  # type: ignore[misc]
        wait_until("told why", lambda: "the cluster secrets differ" in stranger.log("router").read_text(), WAIT_S)
        wait_until("told why", lambda: "model_id differs" in other_model.log("router").read_text(), WAIT_S)
        assert stranger.get("/ready").status_code == 503
        assert cluster.status(cluster.key) == 200
    for node in ("p0", "d0"):
        log = cluster.log(node).read_text()
        assert log.count("wrong cluster secret") == log.count("model_id differs") == 1
        assert "horse" not in log


def test_who_reaches_a_nodes_port_without_a_certificate_gets_nothing(cluster: LockedCluster) -> None:
    with socket.create_connection(("127.0.0.1", cluster.nodes["d0"].port), timeout=WAIT_S) as plain:
        plain.sendall(b"GET /link HTTP/1.1\r\nHost: d0\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert not plain.recv(100).startswith(b"HTTP")
    assert cluster.status(cluster.key) == 200
