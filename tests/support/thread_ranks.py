"""The ranks of a model as threads of one process: what they say to each other, without anything between them."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

DEADLINE_S = 60


class ThreadRanks:
    """One rank's view; all of them share `meeting`."""

    def __init__(self, rank: int, meeting: "Meeting") -> None:
        self._rank = rank
        self._meeting = meeting

    def sum(self, x: Tensor) -> Tensor:
        return torch.stack(self._meeting.exchange(self._rank, x)).sum(0)

    def collect(self, x: Tensor, widths: list[int]) -> Tensor:
        everyones = self._meeting.exchange(self._rank, x)
        assert [one.shape[1] for one in everyones] == widths
        return x if self._rank else torch.cat(everyones, dim=1)

    def spread(self, x: Tensor) -> None:
        x.copy_(self._meeting.exchange(self._rank, x)[0])

    def close(self) -> None:
        """They end with their threads."""


class Meeting:
    def __init__(self, num_ranks: int) -> None:
        self._barrier = threading.Barrier(num_ranks)
        self._slots: list[Tensor] = [torch.empty(0)] * num_ranks

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        """What every rank brought, by rank."""
        self._slots[rank] = x.clone()
        self._barrier.wait(DEADLINE_S)
        everyones = list(self._slots)
        self._barrier.wait(DEADLINE_S)
        return everyones


def on_every_rank(num_ranks: int, work: Callable[[int, ThreadRanks], Result]) -> list[Result]:
    """What `work(rank, ranks)` returns on each of them, all at the same time."""
    meeting = Meeting(num_ranks)
    with ThreadPoolExecutor(num_ranks) as threads:
        return list(threads.map(lambda rank: work(rank, ThreadRanks(rank, meeting)), range(num_ranks)))
