"""Ranks on GPUs, each on one of its own: their tokens are one GPU's, captured or launched, and none waits for another that is gone.

NCCL lets no two ranks share a GPU, so all of this wants two of them and is skipped where there is one: what of it needs no GPU,
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
from disaggd.engine.rank_orders import HostMemory
from disaggd.engine.ranks import LOST_RANK_TIMEOUT_S
from disaggd.errors import RankLost, ResourceError
from disaggd.ids import BlockId
from disaggd.sampling import SamplingParams
from tests.engine.test_graphs import WAYS, run
from tests.support.clusters import wait_until

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="wants two GPUs: NCCL refuses two ranks on one"),
]

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
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture
def two() -> Iterator[LoadedEngine]:
    loaded = build_engine(**VALUES, devices=TWO, memory=HostMemory(staging_bytes=2**22))
    yield loaded
    loaded.close()


def test_two_gpus_say_what_the_cpu_says(two: LoadedEngine) -> None:
    """In float32, greedy and drawn, chunked, preempted, padded; sampled tokens reach the second GPU without a host."""
    said = run(two.engine, WAYS)
    assert two.engine.gauges().preemptions > 0
    assert said == run(build_engine(**VALUES).engine, WAYS)


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
