"""What a rank does with what comes down its pipe, in its own thread here: in order, and without waiting for its copies."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from disaggd.engine import follower
from disaggd.engine.batch import HostBatch
from disaggd.engine.follower import obey_all
from disaggd.engine.patterns import CompareBlocks, FillBlocks, PatternMemory
from disaggd.engine.rank_orders import AreYouThere, CopyIn, RankPipes, rank_pipes
from disaggd.errors import ResourceError
from disaggd.ids import BlockId
from disaggd.model import parallel
from disaggd.transfer.messages import IsReady, at_once
from tests.support.copies import Late
from tests.support.rank_order import ORDER

PATIENT_S = 10.0
FIRST, SECOND = CopyIn((BlockId(1),), (BlockId(3),)), CopyIn((BlockId(0), BlockId(2)), (BlockId(4), BlockId(5)))


class LateLanding:
    """Copies nothing, when it is told to."""

    def __init__(self, patience: int | None = None) -> None:
        self.asked: list[tuple[tuple[BlockId, ...], tuple[BlockId, ...]]] = []
        self.late = Late(patience)

    def copy_in(self, landed: tuple[BlockId, ...], blocks: tuple[BlockId, ...]) -> IsReady:
        self.asked.append((landed, blocks))
        return self.late.add(lambda: None)


@contextmanager
def rank_with(landing: Any, mark: Callable[[], IsReady] = lambda: at_once) -> Iterator[tuple[RankPipes, list[HostBatch]]]:
    """The first rank's ends of a rank's pipes, and the steps that it has computed."""
    steps: list[HostBatch] = []
    ours, theirs = rank_pipes()
    rank: Any = SimpleNamespace(landing=landing, forward=steps.append)
    patterns = PatternMemory(torch.zeros(2, 6, 1, 2, 4, 8), range(1))
    thread = threading.Thread(target=obey_all, args=(rank, patterns, theirs, mark))
    thread.start()
    yield ours, steps
    ours.orders.close()
    thread.join(PATIENT_S)
    assert not thread.is_alive(), "the pipe's end ends it"


def answered(pipes: RankPipes) -> None:
    """It has done what came before."""
    pipes.orders.send(AreYouThere())
    assert pipes.orders.poll(PATIENT_S) and pipes.orders.recv() is None


def step() -> HostBatch:
    longs, ints = np.zeros(1, np.int64), np.zeros(1, np.int32)
    return HostBatch(longs, longs, longs, np.zeros(2, np.int32), ints, np.zeros((1, 1), np.int32), longs, longs)


def test_a_copy_is_answered_when_it_is_made_and_steps_go_on_meanwhile() -> None:
    landing = LateLanding()
    with rank_with(landing) as (pipes, steps):
        for order in (FIRST, step(), SECOND, step()):
            pipes.orders.send(order)
        answered(pipes)
        assert len(steps) == 2
        assert landing.asked == [(FIRST.landed, FIRST.blocks), (SECOND.landed, SECOND.blocks)]
        assert not pipes.copied.poll()
        landing.late.make()
        assert pipes.copied.poll(PATIENT_S), "it looks after its copies though nobody tells it anything"
        assert pipes.copied.recv() is None
        assert not pipes.copied.poll(0.05), "the second is not made"
        landing.late.make()
        assert pipes.copied.poll(PATIENT_S)


def test_copies_are_answered_one_by_one() -> None:
    with rank_with(LateLanding(patience=3)) as (pipes, _):
        for order in (FIRST, SECOND, FIRST):
            pipes.orders.send(order)
        for _ in range(3):
            assert pipes.copied.poll(PATIENT_S) and pipes.copied.recv() is None
        assert not pipes.copied.poll(0.01)


def test_patterns_are_answered_in_order() -> None:
    blocks, num_tokens = (BlockId(2), BlockId(0)), 8
    with rank_with(None) as (pipes, _):
        for order in (FillBlocks(blocks, 3), CompareBlocks(blocks, num_tokens, 3), CompareBlocks(blocks, num_tokens, 4)):
            pipes.orders.send(order)
        answers = [pipes.orders.recv() for _ in range(3) if pipes.orders.poll(PATIENT_S)]
        assert answers[:2] == [None, None] and answers[2] is not None


def test_a_pattern_is_answered_when_the_device_has_it_for_the_first_ranks_says_nothing_of_that() -> None:
    is_done = threading.Event()
    with rank_with(None, lambda: is_done.is_set) as (pipes, _):
        pipes.orders.send(FillBlocks((BlockId(2),), 3))
        assert not pipes.orders.poll(0.1)
        is_done.set()
        assert pipes.orders.poll(PATIENT_S) and pipes.orders.recv() is None


class Left(BaseException):
    """Of a process, with this code."""


@pytest.mark.parametrize(
    ("trouble", "exit_code", "last_words"),
    [(EOFError(), 0, None), (ResourceError("no memory is left"), 0, "no memory is left"), (RuntimeError("CUDA error"), 1, None)],
    ids=lambda value: type(value).__name__,
)
def test_a_rank_on_a_gpu_waits_for_nothing_on_its_way_out_whatever_ends_it(
    trouble: Exception,
    exit_code: int,
    last_words: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def leave(code: int) -> None:
        raise Left(code)

    def load(*_: object) -> None:
        raise trouble

    monkeypatch.setattr(follower.os, "_exit", leave)
    monkeypatch.setattr(follower.signal, "signal", lambda *_: None)
    monkeypatch.setattr(follower, "_end_with_the_node", lambda: None)
    monkeypatch.setattr(follower, "_loaded", load)
    monkeypatch.setattr(follower, "DeviceStream", lambda where: SimpleNamespace(enter=lambda: None))
    ours, theirs = rank_pipes()
    order: Any = SimpleNamespace(device="cuda:1")
    with pytest.raises(Left, match=f"^{exit_code}$"):
        follower.follow(order, theirs, None)
    assert (ours.last_words.recv() if ours.last_words.poll() else None) == last_words
    assert ("RuntimeError: CUDA error" in capsys.readouterr().err) == (exit_code == 1)


def test_why_a_rank_cannot_meet_the_others_is_said_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no route to host")

    monkeypatch.setattr(parallel, "TCPStore", fail)
    ours, theirs = rank_pipes()
    follower._be(msgspec.structs.replace(ORDER, port=4321), theirs, None)
    assert ours.orders.recv() is None, "it has come as far as the meeting"
    assert ours.last_words.poll()
    assert ours.last_words.recv() == "the place where the ranks meet cannot be reached at 127.0.0.1:4321: no route to host"


@pytest.mark.parametrize("patience", [None, 1])
def test_the_end_of_the_first_rank_ends_it_with_a_copy_under_way_or_made(patience: int | None) -> None:
    landing = LateLanding(patience)
    with rank_with(landing) as (pipes, _):
        pipes.copied.close()
        pipes.orders.send(FIRST)
