"""The environment of a node's process, and the one re-execution that gives it."""

import os
import sys

import msgspec
import pytest

from disaggd.config import Config, NodeConfig, parse_config
from disaggd.errors import ConfigError, ResourceError
from disaggd.launch import node_environment, pin, reexec_with

SECRET = '[cluster]\nsecret = "0123456789abcdef"\n'
CLUSTER = """
[[node]]
name = "router"
role = "router"
listen = "127.0.0.1:8000"

[[node]]
name = "d0"
role = "decode"
listen = "127.0.0.1:8102"
threads = 3
"""


class Execs:
    """Stands in for `os.execve`, which would not return."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[str], dict[str, str]]] = []

    def __call__(self, path: str, arguments: list[str], environ: dict[str, str]) -> None:
        self.calls.append((path, arguments, environ))


def decode_node(text: str = CLUSTER) -> tuple[Config, NodeConfig]:
    config = parse_config(text)
    return config, config.node("d0")


def test_an_engine_node_gets_threads_malloc_and_a_pinned_transport() -> None:
    wanted = node_environment(*decode_node())
    assert wanted["OMP_NUM_THREADS"] == "3"
    assert wanted["MALLOC_MMAP_MAX_"] == "0"
    assert wanted["UCX_TLS"].removesuffix(",cuda_copy") == "tcp", "more where the host has a GPU"
    assert wanted["UCX_NET_DEVICES"] == "lo"


def test_a_node_on_a_gpu_may_copy_to_and_from_it() -> None:
    config, node = decode_node()
    assert node_environment(config, msgspec.structs.replace(node, device="cuda:0"))["UCX_TLS"] == "tcp,cuda_copy"


def test_ranks_on_gpus_meet_on_loopback() -> None:
    config, node = decode_node()
    assert not any(name.startswith("NCCL") for name in node_environment(config, msgspec.structs.replace(node, device="cuda:0", tp=1)))
    environment = node_environment(config, msgspec.structs.replace(node, devices=("cuda:0", "cuda:1"), tp=2))
    assert environment["NCCL_SOCKET_IFNAME"] == "lo" and environment["UCX_TLS"] == "tcp,cuda_copy"


def test_a_router_needs_nothing() -> None:
    config, _ = decode_node()
    assert node_environment(config, config.node("router")) == {}


def test_beyond_loopback_the_devices_must_be_named() -> None:
    remote = CLUSTER.replace("127.0.0.1:8102", "10.0.0.2:8102")
    with pytest.raises(ConfigError, match="name the network devices"):
        node_environment(*decode_node(SECRET + remote))
    assert node_environment(*decode_node(SECRET + '[transfer]\ndevices = "eth1"\n' + remote))["UCX_NET_DEVICES"] == "eth1"


def test_the_process_is_replaced_once() -> None:
    execs = Execs()
    wanted = {"OMP_NUM_THREADS": "3"}
    reexec_with(wanted, {"PATH": "/bin", "OMP_NUM_THREADS": "8"}, execs)
    [(path, arguments, environ)] = execs.calls
    assert (path, arguments) == (sys.executable, [sys.executable, *sys.orig_argv[1:]])
    assert environ == {"PATH": "/bin", "OMP_NUM_THREADS": "3"}
    reexec_with(wanted, environ, execs)
    assert len(execs.calls) == 1


def test_the_replacement_keeps_the_interpreters_options(monkeypatch: pytest.MonkeyPatch) -> None:
    execs = Execs()
    monkeypatch.setattr(sys, "orig_argv", ["python", "-P", "-m", "disaggd", "--role", "decode"])
    reexec_with({"OMP_NUM_THREADS": "3"}, {}, execs)
    assert execs.calls[0][1] == [sys.executable, "-P", "-m", "disaggd", "--role", "decode"]


def test_a_stray_port_range_of_ucx_is_taken_away() -> None:
    execs = Execs()
    reexec_with({"UCX_TLS": "tcp"}, {"UCX_TLS": "tcp", "UCX_TCP_PORT_RANGE": "1-2"}, execs)
    assert execs.calls[0][2] == {"UCX_TLS": "tcp"}


def test_nothing_wanted_is_no_reason_to_start_again() -> None:
    execs = Execs()
    reexec_with({}, {"UCX_TCP_PORT_RANGE": "1-2"}, execs)
    assert execs.calls == []


def test_a_process_is_pinned_to_its_cpus() -> None:
    before = os.sched_getaffinity(0)
    one = min(before)
    try:
        pin(msgspec.structs.replace(decode_node()[1], cpus=(one,)))
        assert os.sched_getaffinity(0) == {one}
    finally:
        os.sched_setaffinity(0, before)


def test_cpus_that_the_host_lacks_are_a_resource_error() -> None:
    with pytest.raises(ResourceError, match=r"node 'd0': cannot run on cpus \[1023\]; this process may use"):
        pin(msgspec.structs.replace(decode_node()[1], cpus=(1023,)))
