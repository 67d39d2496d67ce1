"""Engines of several ranks, each a process: their tokens are those of one rank, and none outlives another."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from disaggd.engine.build import LoadedEngine, build_engine
from disaggd.engine.engine import generate
from disaggd.engine.rank_orders import HostMemory
from disaggd.engine.ranks import LOST_RANK_TIMEOUT_S, Companions, Followers
from disaggd.engine.runner import ModelRunner
from disaggd.engine.stream import DeviceStream
from disaggd.errors import ModelError, RankLost, ResourceError
from disaggd.ids import BlockId
from disaggd.model.parallel import ProcessRanks, Ranks
from disaggd.sampling import SamplingParams
from tests.support.clusters import wait_until
from tests.support.rank_order import ORDER

VALUES = {
    "path": "builtin:tiny",
    "dtype": "float32",
    "kv_cache_bytes": 16 * 2**20,
    "block_size": 16,
    "max_step_tokens": 64,
    "max_sequences": 4,
}
PROMPT = list(range(5, 95))
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.8, seed=7, top_p=0.9, max_tokens=24, ignore_eos=True)
ANY_WORD = SamplingParams(temperature=2, seed=7, max_tokens=24, ignore_eos=True)
"""Of either rank's part of the vocabulary."""

pytestmark = pytest.mark.process


def tokens_of(loaded: LoadedEngine, sampling: SamplingParams) -> list[int]:
    return [token for output in generate(loaded.engine, PROMPT, sampling) for token in output.tokens]


@pytest.fixture(scope="module")
def two() -> Iterator[LoadedEngine]:
    loaded = build_engine(**VALUES, tp=2)
    yield loaded
    loaded.close()


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED])
def test_two_ranks_say_what_one_says(two: LoadedEngine, sampling: SamplingParams) -> None:
    assert tokens_of(two, sampling) == tokens_of(build_engine(**VALUES), sampling)


@pytest.mark.parametrize("sampling", [GREEDY, ANY_WORD])
def test_a_step_that_is_launched_before_the_host_has_the_last_ones_tokens_says_the_same(
    two: LoadedEngine, sampling: SamplingParams
) -> None:
    """As where devices compute: the other rank gets the tokens from the first one, not with the step's arrays."""
    two.runner.lookahead = 1
    assert tokens_of(two, sampling) == tokens_of(build_engine(**VALUES), sampling)
    two.runner.lookahead = 0


def test_each_rank_holds_its_heads_of_every_block(two: LoadedEngine) -> None:
    one = build_engine(**VALUES)
    assert two.rank.kv.shape[1] == one.rank.kv.shape[1] == two.engine.pool.num_blocks
    assert 2 * two.rank.kv.shape[2] == one.rank.kv.shape[2]


def test_patterns_are_filled_and_compared_on_every_rank_in_order_with_its_steps(two: LoadedEngine) -> None:
    blocks, num_tokens = [BlockId(5), BlockId(2)], 2 * two.rank.kv.shape[4]
    for salt in range(3):
        two.patterns.fill(blocks, salt)
        assert two.patterns.compare(blocks, num_tokens, salt) == [None, None]
        [mine, theirs] = two.patterns.compare(blocks, num_tokens, salt + 1)
        assert mine is not None and theirs is not None
        num_heads = two.rank.kv.shape[2]
        assert (mine.heads, theirs.heads) == (tuple(range(num_heads)), tuple(range(num_heads, 2 * num_heads)))
        tokens_of(two, GREEDY)


def test_what_lands_on_all_ranks_is_there_when_it_is_on_each() -> None:
    """Into the pool from memory that no peer has written: zeros over a pattern."""
    loaded = build_engine(**VALUES, tp=2, memory=HostMemory(staging_bytes=2**20))
    assert loaded.landing is not None and loaded.rank.staging is not None and loaded.followers is not None
    assert loaded.landing.place == loaded.rank.staging.place
    landed, blocks = [BlockId(1), BlockId(0)], [BlockId(6), BlockId(4)]
    loaded.patterns.fill([BlockId(6), BlockId(4), BlockId(5)], 1)
    is_done = loaded.landing.copy_in(landed, blocks)
    wait_until("it is on all", is_done, 10)
    num_tokens = loaded.rank.kv.shape[4]
    assert None not in loaded.patterns.compare(blocks, 2 * num_tokens, 1), "the pattern is gone, on both"
    assert loaded.rank.staging.place.num_blocks == 2**20 // loaded.kv_spec.bytes_per_block
    loaded.patterns.fill([BlockId(5)], 2)
    assert loaded.patterns.compare([BlockId(5)], num_tokens, 2) == [None, None]
    os.kill(loaded.followers.pids[0], signal.SIGKILL)

    def is_noticed() -> bool:
        try:
            loaded.landing.copy_in(landed, blocks)()
        except RankLost as error:
            return "rank 1 of 2 is gone" in str(error)
        return False

    wait_until("a copy that a rank does not make is not waited for", is_noticed, 10)
    loaded.close()


ENDS_WITHOUT_CLOSING = f"""
from disaggd.engine.build import build_engine
if __name__ == "__main__":
    loaded = build_engine(**{VALUES!r}, tp=2, on_rank_lost=lambda error: print("lost:", error, flush=True))
    raise SystemExit(7)
"""


def test_a_process_that_ends_without_closing_its_ranks_ends_and_has_lost_none(tmp_path: Path) -> None:
    """Whatever it ends of: ranks have no ear for the signal by which Python ends its children."""
    script = tmp_path / "script.py"
    script.write_text(ENDS_WITHOUT_CLOSING)
    ended = subprocess.run([sys.executable, script], timeout=60, check=False, stdout=subprocess.PIPE)
    assert (ended.returncode, ended.stdout) == (7, b"")


def test_what_fails_when_the_ranks_are_loaded_ends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a warm-up may, for which a GPU has no memory left."""
    made: list[Followers] = []

    def fail(runner: ModelRunner, *_: object) -> None:
        assert runner._followers is not None
        made.append(runner._followers)
        raise ResourceError("no memory is left")

    monkeypatch.setattr("disaggd.engine.build.Engine", fail)
    with pytest.raises(ResourceError, match="no memory is left"):
        build_engine(**VALUES, tp=2)
    with pytest.raises(ProcessLookupError):
        os.kill(made[0].pids[0], 0)


def test_a_rank_that_dies_is_told_of_and_no_step_waits_for_it() -> None:
    loaded = build_engine(**VALUES, tp=2)
    assert loaded.followers is not None
    deaths = queue.Queue[ResourceError]()
    loaded.followers.watch(deaths.put)
    (pid,) = loaded.followers.pids
    os.kill(pid, signal.SIGKILL)
    assert "rank 1 of 2 has ended" in str(deaths.get(timeout=10))
    with pytest.raises(RankLost, match=r"rank 1 of 2 has ended \(-9\)"):
        tokens_of(loaded, GREEDY)
    with pytest.raises(RankLost, match="rank 1 of 2 is gone"):
        loaded.patterns.fill([BlockId(0)], 1)
    loaded.followers.close()


def test_a_device_that_waits_for_a_dead_rank_is_not_waited_for() -> None:
    loaded = build_engine(**VALUES, tp=2)
    assert loaded.followers is not None
    os.kill(loaded.followers.pids[0], signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(RankLost, match=r"rank 1 of 2 has ended \(-9\)"):
        loaded.followers.wait_for(lambda: False)
    assert time.monotonic() - began < 1
    with pytest.raises(RankLost, match=r"rank 1 of 2 has ended \(-9\)"):
        loaded.followers.wait_for(lambda: True)  # what it has done since is worth nothing
    loaded.close()


def test_a_rank_is_lost_while_it_is_made_and_that_is_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one, which the others wait for, has come no further than the meeting."""

    class Killing(Companions):
        def meet(self) -> Ranks:
            ranks = super().meet()
            os.kill(self._followers.pids[0], signal.SIGKILL)
            return ranks

    monkeypatch.setattr("disaggd.engine.build.Companions", Killing)
    with pytest.raises(ResourceError, match=r"rank 1 of 2 has ended \(-9\)"):
        build_engine(**VALUES, tp=2)


def test_what_a_rank_ends_of_is_what_is_said_and_told() -> None:
    followers = Followers([msgspec.structs.replace(ORDER, path="nowhere")])
    deaths = queue.Queue[ResourceError]()
    followers.watch(deaths.put)
    with pytest.raises(ResourceError, match=r"rank 1 of 2: .*nowhere") as raised:
        followers.wait()
    assert str(deaths.get(timeout=10)) == str(raised.value)
    followers.close()


def test_nobody_waits_for_a_rank_that_ends_before_they_meet_or_meanwhile_or_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    followers = Followers([ORDER])
    os.kill(followers.pids[0], signal.SIGSTOP)
    with monkeypatch.context() as patched, pytest.raises(ResourceError, match=r"the 2 ranks have not met within 0\.1 s"):
        patched.setattr("disaggd.engine.ranks.START_TIMEOUT_S", 0.1)
        followers.unless_one_ends(threading.Event().wait)
    threading.Timer(0.2, os.kill, (followers.pids[0], signal.SIGKILL)).start()
    for _ in ("meanwhile", "before"):
        began = time.monotonic()
        with pytest.raises(ResourceError, match=r"rank 1 of 2 has ended \(-9\)"):
            followers.unless_one_ends(threading.Event().wait)
        assert time.monotonic() - began < 5
    followers.close()


def test_on_gpus_a_lost_rank_is_logged_and_sets_the_alarm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """It cannot start: no host has that GPU."""
    alarms = queue.Queue[int]()
    monkeypatch.setattr("disaggd.engine.ranks.signal.alarm", alarms.put)
    followers = Followers([msgspec.structs.replace(ORDER, device="cuda:99")])
    try:
        assert alarms.get(timeout=60) == LOST_RANK_TIMEOUT_S
        assert "rank 1 of 2 has ended (1)" in str(followers.trouble())
        assert "rank 1 of 2 has ended (1)" in caplog.text
        assert "Traceback" in capfd.readouterr().err
    finally:
        followers.close()


@pytest.mark.parametrize("tp", [pytest.param(2, marks=pytest.mark.nightly), 3])
def test_a_rank_that_stands_still_is_named_when_its_time_is_up(tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disaggd.engine.build.STEP_TIMEOUT_S", 3.0)
    monkeypatch.setattr("disaggd.engine.ranks.STOP_TIMEOUT_S", 0.5)  # it does not end by itself
    loaded = build_engine(**VALUES, tp=tp)
    assert loaded.followers is not None
    os.kill(loaded.followers.pids[0], signal.SIGSTOP)
    try:
        with pytest.raises(RankLost, match=f"rank 1 of {tp} has not done its part of a step"):
            tokens_of(loaded, GREEDY)
        with pytest.raises(RankLost, match=f"rank 1 of {tp} has not answered"):
            loaded.patterns.compare([BlockId(0)], 1, 1)
    finally:
        loaded.followers.close()


def test_a_closed_engines_ranks_are_gone_and_nobody_is_told_of_a_death() -> None:
    loaded = build_engine(**VALUES, tp=2)
    assert loaded.followers is not None
    deaths = queue.Queue[ResourceError]()
    loaded.followers.watch(deaths.put)
    (pid,) = loaded.followers.pids
    loaded.followers.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert deaths.empty()


@pytest.mark.parametrize("who_fails", ["the mark", "the query"])
def test_a_device_that_has_failed_keeps_no_engine_from_closing(who_fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = build_engine(**VALUES, tp=2)
    assert loaded.followers is not None

    def fail(*_: object) -> bool:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(DeviceStream, "mark", fail if who_fails == "the mark" else lambda stream: fail)
    closed: list[str] = []
    monkeypatch.setattr(ProcessRanks, "close", lambda ranks: closed.append("what the ranks have in common"))
    loaded.close()
    assert closed
    with pytest.raises(ProcessLookupError):
        os.kill(loaded.followers.pids[0], 0)


def test_ranks_that_stand_still_are_waited_for_together_and_then_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disaggd.engine.ranks.STOP_TIMEOUT_S", 1.0)
    followers = Followers([msgspec.structs.replace(ORDER, rank=rank, num_ranks=5) for rank in range(1, 5)])
    for pid in followers.pids:
        os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    followers.close()
    assert time.monotonic() - began < 2.5
    for pid in followers.pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_more_ranks_than_heads_are_refused_before_any_is_started() -> None:
    with pytest.raises(ModelError, match="heads, too few for so many ranks"):
        build_engine(**VALUES, tp=64)
