"""`disaggd doctor` on real clusters: whole ones, and ones in which something is deliberately wrong, which it names for what it is."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from disaggd.observe.checkup import Checkup
from tests.support.clusters import Block, Cluster, is_root, running, wait_until
from tests.support.oracle import Oracle, prompt_of

pytestmark = pytest.mark.process

NIGHTLY = pytest.mark.nightly
WAIT_S = 120.0
NEAR, FAR, DEVICE = f"disaggd-near-{os.getpid()}", f"disaggd-far-{os.getpid()}", "kv0"


@dataclass
class Examined:
    code: int
    text: str
    took_s: float

    @property
    def rows(self) -> list[list[str]]:
        """Of the table: writer, target, …, verdict."""
        return [line.split() for line in self.text.splitlines() if line.startswith((" p", " d"))]


def doctor(cluster: Cluster, *arguments: str, prefix: tuple[str, ...] = ()) -> Examined:
    begun = time.monotonic()
    command = [*prefix, sys.executable, "-m", "disaggd", "doctor", "--config", str(cluster.config), *arguments]
    process = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    print(process.stdout, process.stderr)
    return Examined(process.returncode, process.stdout + process.stderr, time.monotonic() - begun)


def start_unready(cluster: Cluster, links: tuple[str, ...]) -> None:
    """Nodes of which some cannot be linked or paired: until these links are up."""
    cluster.write_config()
    for name in cluster.nodes:
        cluster.start_node(name)
    for name in links:
        wait_until(f"{name} is linked", lambda n=name: f"link to {n} is up" in cluster.log("router").read_text(), WAIT_S, 0.2)  # type: ignore[misc]


@contextlib.contextmanager
def ended(cluster: Cluster) -> Iterator[Cluster]:
    """`running`, for a cluster that is never whole."""
    try:
        yield cluster
    except BaseException:
        for name in cluster.nodes:
            print(cluster.tail(name))
        raise
    finally:
        cluster.close()


# ── what is well ──


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Nodes of one and of two ranks, one of which has blocks of its own size. The model has two KV heads."""
    cluster = Cluster(tmp_path_factory.mktemp("whole"), prefill=2)
    cluster.nodes["p0"].options["tp"] = cluster.nodes["d0"].options["tp"] = 2
    cluster.nodes["p1"].options["block_size"] = 16
    with running(cluster):
        yield cluster


def legs(cluster: Cluster, writer: str, target: str) -> set[tuple[str, str, str]]:
    """Ranks of the two between which KV goes, and by which path."""
    ranks, heads = [int(cluster.nodes[name].options.get("tp", 1)) for name in (writer, target)], range(2)
    path = "repacked" if "p1" in (writer, target) else "direct"
    return {(*(str(head * count // 2) for count in ranks), path) for head in heads}  # type: ignore[misc]


def test_a_healthy_cluster_is_shown_way_by_way_within_ten_seconds(whole: Cluster) -> None:
    examined = doctor(whole)
    assert examined.code == 0 and "all is well" in examined.text
    ways = [("p0", "d0"), ("p1", "d0")]
    ways += [(d, p) for p, d in ways]
    assert {(row[0], row[1], row[2], row[4], row[8]) for row in examined.rows} == {
        (*way, *leg) for way in ways for leg in legs(whole, *way)
    }
    assert {(*row[5:8], row[-1]) for row in examined.rows} == {("tcp", "over", "lo", "ok")}
    assert all(float(row[9]) > 0 and float(row[10]) > 0 for row in examined.rows)
    assert examined.took_s < 10
    whole.wait_idle()


def test_it_harms_no_request_and_no_request_harms_it(whole: Cluster, oracle: Oracle) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "disaggd", "doctor", "--config", str(whole.config), "--json"], stdout=subprocess.PIPE
    ) as process:
        while process.poll() is None:
            prompt = prompt_of(300, oracle, salt=int(time.monotonic() * 1e3))
            assert whole.complete(prompt, max_tokens=8)["usage"]["completion_tokens"] == 8
        assert process.stdout is not None
        checkup = msgspec.json.decode(process.stdout.read(), type=Checkup)
    assert {way.verdict for way in checkup.ways} <= {"ok", "unchecked"}
    assert len(checkup.ways) == 4
    whole.wait_idle()


def test_new_pairs_were_checked_before_they_were_used(whole: Cluster) -> None:
    log = whole.log("router").read_text()
    assert log.count("KV path is ready: checked ") == 4


def test_without_a_router_it_says_so(directory: Path) -> None:
    cluster = Cluster(directory)
    cluster.write_config()
    examined = doctor(cluster)
    assert (examined.code, examined.text) == (3, f"disaggd: no router at {cluster.url}: Connection refused\n")


# ── what is not ──


class MixedCluster(Cluster):
    """One of whose nodes, `d1`, reads a file of its own, which says something else: in its sections, and of all its engine nodes."""

    def __init__(self, directory: Path, sections: dict[str, Block], nodes: Block) -> None:
        super().__init__(directory, prefill=1, decode=2)
        self._others = Cluster(directory, prefill=1, decode=2, nodes=nodes, **sections)
        self._others.nodes |= {name: replace(node, options=self._others.nodes[name].options) for name, node in self.nodes.items()}
        self._others.port_range = self.port_range

    def config_of(self, name: str) -> Path:
        return self.directory / "other.toml" if name == "d1" else self.config

    def write_config(self) -> None:
        self._others.write_config()
        self.config.rename(self.config_of("d1"))
        super().write_config()


@pytest.mark.parametrize(
    ("sections", "nodes", "words"),
    [
        ({"model": {"weights": "int8"}}, {}, "it serves another model"),
        pytest.param({}, {"block_size": 16}, "its block_size is 16, and by this router's file 64: its own file differs", marks=NIGHTLY),
        pytest.param({}, {"block_size": 2048, "max_step_tokens": 4096}, "nothing listens at", marks=NIGHTLY),
    ],
    ids=["model", "block_size", "block_size_cap"],
)
def test_a_node_that_does_not_fit_is_named_and_the_rest_serves(
    directory: Path, sections: dict[str, Block], nodes: Block, words: str
) -> None:
    with ended(MixedCluster(directory, sections, nodes)) as cluster:
        start_unready(cluster, ("p0", "d0"))
        wait_until("the router has heard of d1", lambda: words in doctor_json(cluster)["nodes"][2]["reason"], WAIT_S, 0.5)
        examined = doctor(cluster)
        assert examined.code == 1
        assert any(line.startswith("d1 (decode, ") and words in line for line in examined.text.splitlines())
        assert {(row[0], row[1], row[-1]) for row in examined.rows} == {("p0", "d0", "ok"), ("d0", "p0", "ok")}
        assert cluster.complete("hello", max_tokens=4)["usage"]["completion_tokens"] == 4
        if words.startswith("nothing listens"):  # its own log says why it has not started
            assert "block_size" in cluster.log("d1").read_text() and "1024" in cluster.log("d1").read_text()


def doctor_json(cluster: Cluster) -> dict[str, Any]:
    return dict(httpx.post(cluster.url + "/v1/cluster/check", timeout=60).json())


@pytest.mark.nightly
def test_a_wire_that_garbles_is_found_out_before_any_request_goes_over_it(directory: Path) -> None:
    """The first write of each process arrives otherwise than it was sent: then the wire is well again."""
    cluster = Cluster(directory, module="tests.support.corrupting_node", disaggregation={"prefix_push": "never"})
    with ended(cluster):
        start_unready(cluster, ("p0", "d0"))
        wait_until("the pair has failed", lambda: cluster.get("/v1/cluster").json()["pairs"][0]["state"] == "failed", WAIT_S, 0.2)
        [pair] = cluster.get("/v1/cluster").json()["pairs"]
        assert pair["reason"].startswith("what lands in rank 0 of d0 is not what was written: ")
        assert "numbers differ, first in layer 0, head 0, token 0, keys[0]" in pair["reason"]
        prompt = list(range(100, 400))
        reply = cluster.complete(prompt, max_tokens=4)
        assert cluster.receipt(reply["id"])["decision"] == "local", "and the cluster serves with the rest"
        examined = doctor(cluster)
        assert examined.code == 0 and [row[-1] for row in examined.rows] == ["ok"]
        assert cluster.get("/v1/cluster").json()["pairs"][0]["state"] == "ready", "whoever finds it well again has it used"
        cluster.wait_idle()


def sh(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def firewall(request: pytest.FixtureRequest) -> Iterator[None]:
    """Two namespaces joined by a link; the far one lets nothing in from it to the ports of the cluster's KV (`close_ports`)."""
    sh("ip", "netns", "add", NEAR)
    sh("ip", "netns", "add", FAR)
    try:
        sh("ip", "link", "add", DEVICE, "netns", NEAR, "type", "veth", "peer", "name", DEVICE, "netns", FAR)
        for space, address in ((NEAR, "10.77.0.1/24"), (FAR, "10.77.0.2/24")):
            sh("ip", "-n", space, "address", "add", address, "dev", DEVICE)
            sh("ip", "-n", space, "link", "set", DEVICE, "up")
            sh("ip", "-n", space, "link", "set", "lo", "up")
        yield
    finally:
        sh("ip", "netns", "del", NEAR)
        sh("ip", "netns", "del", FAR)


def close_ports(ports: str) -> None:
    """A route to nowhere for what comes in to them, before the kernel looks whether it is for this host."""
    sh("ip", "-n", FAR, "rule", "add", "pref", "10", "iif", DEVICE, "ipproto", "tcp", "dport", ports, "blackhole")
    sh("ip", "-n", FAR, "rule", "add", "pref", "100", "lookup", "local")
    sh("ip", "-n", FAR, "rule", "del", "pref", "0")


@pytest.mark.nightly
@pytest.mark.skipif(not is_root() or shutil.which("ip") is None, reason="network namespaces want root and ip")
def test_a_port_that_a_firewall_closes_is_named_with_its_device(directory: Path, firewall: None) -> None:
    cluster = Cluster(
        directory, transfer={"devices": DEVICE}, cluster={"secret": "between-two-namespaces"}, disaggregation={"prefix_push": "never"}
    )
    cluster.nodes["d0"].host = "10.77.0.2"
    for name, space in (("router", NEAR), ("p0", NEAR), ("d0", FAR)):
        cluster.nodes[name].prefix = ("ip", "netns", "exec", space)
    close_ports(cluster.port_range)
    with ended(cluster):
        start_unready(cluster, ("p0", "d0"))
        examined = doctor(cluster, prefix=("ip", "netns", "exec", NEAR))
        assert examined.code == 1
        assert [(row[0], row[1], row[-1]) for row in examined.rows] == [("p0", "d0", "unreachable")]
        [line] = [line for line in examined.text.splitlines() if line.startswith("p0 → d0: unreachable: ")]
        first, last = map(int, cluster.port_range.split("-"))
        port = int(line.partition(", port ")[2].partition(" on ")[0])
        assert first <= port <= last and f" on {DEVICE}: " in line
        assert line.endswith(f"does a firewall close {cluster.port_range}?"), "before UCX has given up, and after"
