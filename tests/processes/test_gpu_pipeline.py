"""Two nodes on one GPU: prefilled there or here, a prompt is continued as one engine on that GPU continues it."""

import asyncio
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from disaggd.sampling import SamplingParams
from tests.processes.test_failures import PATIENT, kill_amid_writes
from tests.processes.test_ranks import ranks_of
from tests.support.clusters import Cluster, running, wait_until
from tests.support.completions import check, complete_all
from tests.support.oracle import Oracle, prompt_of

pytestmark = [pytest.mark.process, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = "cuda:0"
CHUNKED = {"kv_cache": "128MiB", "max_step_tokens": 512}
"""The longest prompt takes four steps, and its layers' pushes wait for a GPU that is behind."""

OPTIONS = {"temperature": 0.0, "max_tokens": 32, "ignore_eos": True}


LENGTHS = [65, 700, 2000]


@pytest.fixture(scope="module")
def gpu_oracle() -> Oracle:
    """Has compiled the kernels by its first answers: the nodes find them in Triton's cache, and need not let a lease run out over it."""
    oracle = Oracle(DEVICE)
    for num_tokens in LENGTHS:
        oracle.continue_(prompt_of(num_tokens, oracle), SamplingParams(**OPTIONS))
    return oracle


@pytest.fixture(scope="module", params=[(DEVICE, DEVICE), (DEVICE, "cpu"), ("cpu", DEVICE)], ids="-".join)
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, gpu_oracle: Oracle) -> Iterator[Cluster]:
    """1P1D, by the devices of the prefill and the decode node; both have computed something.

    A GPU's staging memory holds the longest prompt, of 32 blocks, and little more: pushes and grants wait for room in it.
    """
    staging = 40 * gpu_oracle.kv_spec.bytes_per_block
    made = Cluster(tmp_path_factory.mktemp("gpu"), nodes=CHUNKED, transfer={"staging": staging})
    made.nodes["p0"].options["device"], made.nodes["d0"].options["device"] = request.param
    with running(made) as cluster:
        for policy in ("local", "remote"):
            cluster.complete(prompt_of(2000, gpu_oracle), **OPTIONS, headers={"x-disaggd-policy": policy})
        cluster.wait_idle(30)
        yield cluster


@pytest.mark.parametrize("policy", ["local", "remote"])
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_long_prompt_is_continued_as_the_oracle_does(cluster: Cluster, gpu_oracle: Oracle, num_tokens: int, policy: str) -> None:
    prompt = prompt_of(num_tokens, gpu_oracle)
    reply = cluster.complete(prompt, **OPTIONS, logprobs=0, headers={"x-disaggd-policy": policy})
    receipt = cluster.receipt(reply["id"])
    assert receipt["decision"] == policy
    assert receipt["kv_bytes"] == (gpu_oracle.kv_bytes(num_tokens) if policy == "remote" else 0)
    assert reply["usage"]["completion_tokens"] == OPTIONS["max_tokens"]
    check(reply, prompt, OPTIONS, gpu_oracle)
    cluster.wait_idle()


def test_prompts_that_are_prefilled_at_once_do_not_mix(cluster: Cluster, gpu_oracle: Oracle) -> None:
    """Their chunks share steps and their pushes the wire."""
    work = [(prompt_of(200 + 90 * i, gpu_oracle, salt=i), OPTIONS) for i in range(8)]
    for reply, (prompt, options) in zip(asyncio.run(complete_all(cluster, work)), work, strict=True):
        check(reply, prompt, options, gpu_oracle)
        assert cluster.receipt(reply["id"])["decision"] == "remote"
    cluster.wait_idle()


def test_a_prompt_that_cannot_land_at_once_is_prefilled_where_it_is_decoded(cluster: Cluster, gpu_oracle: Oracle) -> None:
    if cluster.nodes["d0"].options["device"] == "cpu":
        pytest.skip("it lands in the pool")
    prompt = prompt_of(41 * 64, gpu_oracle)
    reply = cluster.complete(prompt, **OPTIONS, logprobs=0)
    assert cluster.receipt(reply["id"])["reason"] == "staging: 2624 uncached tokens > 2560 that can be received"
    check(reply, prompt, OPTIONS, gpu_oracle)
    cluster.wait_idle()


def test_a_decode_node_survives_a_prefill_node_killed_with_writes_in_flight(tmp_path: Path, gpu_oracle: Oracle) -> None:
    with running(Cluster(tmp_path, nodes={"device": DEVICE, **CHUNKED}, **PATIENT)) as cluster:
        kill_amid_writes(cluster, gpu_oracle)


@pytest.mark.parametrize(("wire_dtype", "prefill_size", "decode_device"), [("auto", 16, DEVICE), ("auto", 48, "cpu"), ("fp8", 64, DEVICE)])
def test_other_blocks_come_out_of_a_gpu_and_into_one(
    tmp_path: Path, gpu_oracle: Oracle, wire_dtype: str, prefill_size: int, decode_device: str
) -> None:
    """The GPU makes them in its host's memory, and unpacks those in fp8 from there. In fp8 an answer is not the oracle's to the token."""
    made = Cluster(tmp_path, nodes={"device": DEVICE, **CHUNKED}, transfer={"wire_dtype": wire_dtype})
    made.nodes["p0"].options["block_size"], made.nodes["d0"].options["device"] = prefill_size, decode_device
    prompt = prompt_of(700, gpu_oracle)
    with running(made) as cluster:
        ready = re.search("p0 → d0: KV path is ready: checked .*, repacked,", cluster.log("router").read_text())
        assert ready, "a pattern comes as it was"
        reply = cluster.complete(prompt, **OPTIONS, logprobs=0, headers={"x-disaggd-policy": "remote"})
        receipt = cluster.receipt(reply["id"])
        assert receipt["decision"] == "remote"
        if wire_dtype == "auto":
            check(reply, prompt, OPTIONS, gpu_oracle)
        else:
            assert receipt["kv_bytes"] < gpu_oracle.kv_bytes(700) * 0.3
            assert reply["usage"]["completion_tokens"] == OPTIONS["max_tokens"]
        cluster.wait_idle()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="wants two GPUs: NCCL refuses two ranks on one")
@pytest.mark.parametrize("victim", ["p0", "d0"])
def test_two_gpus_to_a_node_hand_over_and_end_with_either_rank(tmp_path: Path, gpu_oracle: Oracle, victim: str) -> None:
    two = {"tp": 2, "devices": ["cuda:0", "cuda:1"], "threads": 1}
    prompt = prompt_of(700, gpu_oracle)
    with running(Cluster(tmp_path, nodes={**two, **CHUNKED})) as cluster:
        reply = cluster.complete(prompt, **OPTIONS, logprobs=0, headers={"x-disaggd-policy": "remote"})
        check(reply, prompt, OPTIONS, gpu_oracle)
        (rank,) = ranks_of(cluster, victim)
        os.kill(rank, signal.SIGKILL)
        wait_until("the node has ended", lambda: not cluster.is_running(victim), 6)
        assert "rank 1 of 2 has ended (-9), and this node cannot go on without it" in cluster.log(victim).read_text()
