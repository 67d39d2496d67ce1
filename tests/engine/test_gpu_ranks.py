"""Ranks on GPUs: their tokens are one GPU's, captured or launched, and none waits for another that is gone.

NCCL refuses two ranks of one host that share a GPU: each wants one of its own, or a host of its own, which is what `NCCL_HOSTID` says. Then
they speak over the loopback interface, and take turns on the GPU: slow, but nothing else is different. What of it needs no GPU,
tests/engine/test_forward.py and test_ranks.py run over gloo, graphs apart.
"""

import os
import queue
import signal
import time
from collections.abc import Iterator

import pytest
import torch

from disaggd.engine.build import LoadedEngine, build_engine
from disaggd.engine.graphs import CudaCapture, Made
from disaggd.engine.rank_orders import Beside, HostMemory, RankOrder
from disaggd.engine.ranks import LOST_RANK_TIMEOUT_S, Followers
from disaggd.engine.stream import DeviceStream
from disaggd.errors import RankLost, ResourceError
from disaggd.ids import BlockId
from disaggd.launch import NCCL
from disaggd.model.parallel import ProcessRanks, meeting_place
from disaggd.sampling import SamplingParams
from tests.engine.test_graphs import WAYS, run
from tests.support.clusters import wait_until

pytestmark = pytest.mark.process

NUM_GPUS = torch.cuda.device_count()
wants_a_gpu = pytest.mark.skipif(NUM_GPUS < 1, reason="no CUDA device")
wants_two_gpus = pytest.mark.skipif(NUM_GPUS < 2, reason="wants two GPUs")

VALUES = {
    "path": "builtin:tiny",
    "dtype": "float32",
    "kv_cache_bytes": 40 * 4 * 2 * 2 * 16 * 64 * 4,
    "block_size": 16,
    "max_step_tokens": 128,
    "max_sequences": 6,
    "max_model_len": 600,
}
TWO = ("cuda:0", "cuda:1")
CARDS = [pytest.param(TWO, id="two cards", marks=wants_two_gpus), pytest.param(("cuda:0", "cuda:0"), id="one card", marks=wants_a_gpu)]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


class OnAnotherHost(Followers):
    """Than the first rank, so far as NCCL can tell."""

    def __init__(self, orders: list[RankOrder], beside: Beside | None = None) -> None:
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("NCCL_HOSTID", "another")
            super().__init__(orders, beside)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node's: loopback, which NCCL would not look at by itself, and nothing of torch's that ends a process."""
    for name, value in NCCL.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=CARDS)
def two(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoadedEngine]:
    if request.param != TWO:
        monkeypatch.setattr("disaggd.engine.build.Followers", OnAnotherHost)
    loaded = build_engine(**VALUES, devices=request.param, memory=HostMemory(staging_bytes=2**22))
    yield loaded
    loaded.close()


@wants_a_gpu
def test_one_rank_speaks_with_itself_launched_and_captured_and_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """So much of NCCL a single GPU can show by itself: nothing is sent, but all of it is asked for, captured, and given up."""
    where = torch.device("cuda:0")
    DeviceStream(where).enter()
    ranks = ProcessRanks(0, 1, meeting_place(), 30.0, where)
    first = torch.arange(6.0, device=where).view(2, 3)
    x = first.clone()

    def step() -> Made:
        ranks.spread(x)
        doubled = ranks.sum(2 * x)
        return doubled, ranks.collect(doubled + 1, [3])

    doubled, collected = step()
    assert torch.equal(doubled, 2 * first) and torch.equal(collected, 2 * first + 1)
    replay, (doubled, collected) = CudaCapture()(step)
    for factor in (1, 10):
        x.copy_(factor * first)
        replay()
        assert torch.equal(doubled, 2 * factor * first) and torch.equal(collected, 2 * factor * first + 1)
    del replay  # and with it the graph, which holds the communicator
    monkeypatch.setattr("disaggd.model.parallel.CLOSE_TIMEOUT_S", 30.0)
    began = time.monotonic()
    ranks.close()
    assert time.monotonic() - began < 5


def test_two_ranks_say_what_the_cpu_says(two: LoadedEngine) -> None:
    """In float32, greedy and drawn, chunked, preempted, padded; sampled tokens reach the second rank without a host."""
    said = run(two.engine, WAYS)
    assert two.engine.gauges().preemptions > 0
    assert said == run(build_engine(**VALUES).engine, WAYS)


@wants_two_gpus
def test_the_pool_takes_what_the_fuller_gpu_has_free() -> None:
    hog = torch.empty(torch.cuda.mem_get_info(1)[0] // 2, dtype=torch.uint8, device="cuda:1")
    loaded = build_engine(**(VALUES | {"kv_cache_bytes": None}), devices=TWO)
    assert loaded.rank.kv.nbytes < torch.cuda.mem_get_info(1)[1] / 2
    last = [BlockId(loaded.rank.kv.shape[1] - 1)]
    loaded.patterns.fill(last, 1)
    assert loaded.patterns.compare(last, loaded.rank.kv.shape[4], 1) == [None, None], "it is there on both"
    loaded.close()
    del hog


def test_what_lands_comes_into_the_pools_of_both(two: LoadedEngine) -> None:
    assert two.landing is not None
    two.patterns.fill([BlockId(6), BlockId(4)], 1)
    wait_until("it is on both", two.landing.copy_in([BlockId(1), BlockId(0)], [BlockId(6), BlockId(4)]), 10)
    assert None not in two.patterns.compare([BlockId(6), BlockId(4)], 2 * two.rank.kv.shape[4], 1)


def test_a_step_whose_rank_dies_fails_within_a_second(two: LoadedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    alarms = queue.Queue[int]()
    monkeypatch.setattr("disaggd.engine.ranks.signal.alarm", alarms.put)  # it would end this process
    assert two.followers is not None
    deaths = queue.Queue[ResourceError]()
    two.followers.watch(deaths.put)
    (pid,) = two.followers.pids
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(RankLost, match=r"rank 1 of 2 has ended \(-9\)"):
        run(two.engine, [GREEDY])
    assert time.monotonic() - began < 1
    assert "rank 1 of 2 has ended" in str(deaths.get(timeout=10))
    assert alarms.get(timeout=10) == LOST_RANK_TIMEOUT_S
