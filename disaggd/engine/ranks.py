"""The other ranks of a tensor-parallel engine, as the first sees them: child processes that compute their part of every step.

Rank 0 is the node's own process. It alone schedules and samples; it sends each step's arrays down a pipe to every other rank, and then all
of them compute it together. A rank has its weights and its heads' KV to itself, and block ids are the same on all.

Nothing waits for a rank that is gone. On CPUs its pipe, and the ranks' own connections, break at once, and a step that lacks a rank's part
fails on every other. On GPUs the others' devices would wait: the communicator is aborted, and the first rank looks for losses while it
waits for a step. Either way it finds out whose part is missing (`naming_the_lost`), and the node ends (`watch`). A rank whose node is gone
ends too.

Something else may run in every rank's process beside its computing, with a pipe of its own to rank 0's; what it is, its owner knows.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Protocol

import torch

from disaggd.engine.batch import HostBatch
from disaggd.engine.follower import follow
from disaggd.engine.patterns import PatternOrder
from disaggd.engine.rank_orders import AreYouThere, Beside, CopyIn, RankOrder, RankPipes, ToRank
from disaggd.errors import RankLost, ResourceError
from disaggd.ids import BlockId
from disaggd.model.parallel import ProcessRanks, Ranks, TCPStore
from disaggd.transfer.layout import PoolPlace
from disaggd.transfer.messages import IsReady, at_once
from disaggd.transfer.pattern import Mismatch

STEP_TIMEOUT_S = 30.0
"""A rank that does not do its part of a step in so long is given up, and the node with it."""
START_TIMEOUT_S = 600.0
"""Reading the weights of a large model from a slow disk takes minutes."""
STOP_TIMEOUT_S = 5.0
GOES_NOT_ON = "and this node cannot go on without it"
LAST_WORDS_S = 2.0
"""When one rank is lost, the others have noticed within so long."""
DEVICE_POLL_S = 1e-4
"""A device that waits for another rank's cannot be waited for, only asked. The step after is launched by then: nothing stands still."""


class Followers:
    """Ranks 1 … n−1, as rank 0 sees them: started when this is made."""

    def __init__(self, orders: list[RankOrder], beside: Beside | None = None) -> None:
        self._orders = orders
        self._pipes: list[RankPipes] = []
        self._processes: list[BaseProcess] = []
        self._num_copies = 0
        self._num_copied = [0] * len(orders)
        self._closed = threading.Event()
        self._death: Future[ResourceError] = Future()
        self._reaping = threading.Lock()  # of two threads that wait for one child, the system tells only one how it ended
        context = get_context("spawn")
        for order in orders:
            ours, theirs = (RankPipes(*ends) for ends in zip(*(context.Pipe() for _ in range(3)), strict=True))
            process = context.Process(target=follow, args=(order, theirs, beside), name=f"rank {order.rank}", daemon=True)
            process.start()
            theirs.close()  # else the process's end would not end the pipes
            self._pipes.append(ours)
            self._processes.append(process)
        # Whatever this process ends of: it waits for its children, who take no notice of the signal by which it would end them.
        self._ending = Finalize(self, _close, args=(self._pipes,), exitpriority=0)
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes if process.pid is not None]

    @property
    def side_pipes(self) -> list[Connection]:
        """By rank, from the second: our ends, for what runs `beside` their computing."""
        return [pipes.side for pipes in self._pipes]

    # ── while they are made ──────────────────────────────────────────────────────────────────────────────────────────

    def wait(self) -> list[int | None]:
        """For the next answer of each. Raises ResourceError if one of them has a trouble instead."""
        return [_unless_trouble(order, pipes.orders) for order, pipes in zip(self._orders, self._pipes, strict=True)]

    def agree(self, num_blocks: int) -> int:
        """The fewest blocks that each has room for, and `num_blocks`; all are told. Raises ResourceError."""
        agreed = min([num_blocks, *(fitting for fitting in self.wait() if fitting is not None)])
        for order, pipes in zip(self._orders, self._pipes, strict=True):
            try:
                pipes.orders.send(agreed)
            except OSError as error:
                raise _trouble(order, "ended before it was ready") from error
        return agreed

    def trouble(self) -> ResourceError | None:
        """What one of them has said, or that it has ended, instead of its next answer."""
        for order, pipes in zip(self._orders, self._pipes, strict=True):
            try:
                if pipes.orders.poll(LAST_WORDS_S / 2):
                    _unless_trouble(order, pipes.orders)
            except ResourceError as error:
                return error
        return None

    # ── a step ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def compute(self, batch: HostBatch) -> None:
        """Have every rank compute its part of the step. Raises RankLost if one is gone."""
        self._tell(batch)

    def copy_in(self, landed: Sequence[BlockId], blocks: Sequence[BlockId]) -> IsReady:
        """Have every rank copy its heads of what has landed into the pool: whether all have. Both raise RankLost if one is gone."""
        self._tell(CopyIn(tuple(landed), tuple(blocks)))
        self._num_copies += 1
        return partial(self._have_copied, self._num_copies)

    def _have_copied(self, count: int) -> bool:
        for index, (order, pipes) in enumerate(zip(self._orders, self._pipes, strict=True)):
            try:
                while self._num_copied[index] < count and pipes.copied.poll():
                    pipes.copied.recv()
                    self._num_copied[index] += 1
            except (EOFError, OSError) as error:
                raise RankLost(f"rank {order.rank} of {order.num_ranks} is gone") from error
        return min(self._num_copied) >= count

    def order(self, order: PatternOrder) -> None:
        """Have every rank do that, in order with its steps; `answers` come next. Raises RankLost if one is gone."""
        self._tell(order)

    def answers(self) -> list[Mismatch | None]:
        """Of every rank, to the last `order`. Raises RankLost if one is gone, or does not answer in a step's time."""
        return [self._answer_of(order, pipes.orders) for order, pipes in zip(self._orders, self._pipes, strict=True)]

    def _answer_of(self, order: RankOrder, pipe: Connection) -> Mismatch | None:
        try:
            if not pipe.poll(order.step_timeout_s):
                raise RankLost(f"rank {order.rank} of {order.num_ranks} has not answered, {GOES_NOT_ON}")
            answer = pipe.recv()
        except (EOFError, OSError) as error:
            raise RankLost(f"rank {order.rank} of {order.num_ranks} is gone") from error
        assert answer is None or isinstance(answer, Mismatch), answer
        return answer

    def _tell(self, what: ToRank) -> None:
        for order, pipes in zip(self._orders, self._pipes, strict=True):
            try:
                pipes.orders.send(what)
            except OSError as error:
                raise RankLost(f"rank {order.rank} of {order.num_ranks} is gone") from error

    def wait_for(self, is_done: IsReady) -> None:
        """For the first rank's device to have done a step. Raises RankLost where it waits for another in vain."""
        with self.naming_the_lost():
            if not self._comes(is_done, self._orders[0].step_timeout_s):
                raise RankLost(f"a step of {self._orders[0].num_ranks} ranks is not done")

    def _comes(self, is_done: IsReady, within_s: float) -> bool:
        """False: not so soon, or another rank has ended: what an aborted step gives is nothing."""
        give_up_at = time.monotonic() + within_s
        while not is_done():
            if self._death.done() or time.monotonic() > give_up_at:
                return False
            time.sleep(DEVICE_POLL_S)
        return not self._death.done()

    # ── losses ───────────────────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """The body is a step; RankLost out of it says which rank is meant."""
        try:
            yield
        except RankLost as error:
            raise self._lost() or error from error

    def _lost(self) -> RankLost | None:
        """One that has ended, else those that do not say that they miss another."""
        ended = connection.wait([process.sentinel for process in self._processes], LAST_WORDS_S / 2)
        if ended:
            return self._end_of(next(process for process in self._processes if process.sentinel in ended))
        if self._orders[0].device != "cpu":
            self._tell(AreYouThere())  # their devices miss it, and they do not notice
        silent = [
            str(order.rank) for order, pipes in zip(self._orders, self._pipes, strict=True) if not pipes.orders.poll(LAST_WORDS_S / 2)
        ]
        if not silent:
            return None
        return RankLost(f"rank {', '.join(silent)} of {self._orders[0].num_ranks} has not done its part of a step, {GOES_NOT_ON}")

    def _end_of(self, process: BaseProcess) -> RankLost:
        with self._reaping:
            process.join()
            return RankLost(f"{process.name} of {self._orders[0].num_ranks} has ended ({process.exitcode}), {GOES_NOT_ON}")

    def watch(self, on_death: Callable[[ResourceError], None]) -> None:
        """`on_death` is called, on a thread of its own, as soon as one of them has ended."""
        self._death.add_done_callback(lambda death: on_death(death.result()))

    def _watch(self) -> None:
        sentinels = {process.sentinel: process for process in self._processes}
        error = self._end_of(sentinels[connection.wait(list(sentinels))[0]])  # type: ignore[index]
        if not self._closed.is_set():
            self._death.set_result(error)

    def close(self, is_done: IsReady = at_once) -> None:
        """End them, once the first rank's device has done all that it needs them for: `is_done`. Idempotent."""
        self._comes(is_done, STOP_TIMEOUT_S)
        self._closed.set()
        for pipes in self._pipes:
            pipes.orders.close()
        for process in self._processes:
            process.join(STOP_TIMEOUT_S)
            if process.exitcode is None:
                process.kill()
                process.join()
        self._ending()


class Companions:
    """`rank.Others` of the first rank: the followers, who meet it at `place`."""

    def __init__(self, order: RankOrder, place: TCPStore, followers: Followers) -> None:
        self._order = order
        self._place = place
        self._followers = followers

    def are_ready(self) -> None:
        self._followers.wait()

    def meet(self) -> Ranks:
        order = self._order
        ranks = ProcessRanks(order.rank, order.num_ranks, self._place, order.step_timeout_s, torch.device(order.device))
        self._followers.watch(lambda _: ranks.abort())
        return ranks

    def agree(self, num_blocks: int) -> int:
        return self._followers.agree(num_blocks)


class Landing(Protocol):
    """Memory of the host that peers write in place of a pool: `KVStaging`, `KVUnpacker`, or a test's."""

    @property
    def place(self) -> PoolPlace: ...

    def copy_in(self, landed: Sequence[BlockId], blocks: Sequence[BlockId]) -> IsReady:
        """Copy blocks of this memory to blocks of the pool, all layers of them, which no launched step writes."""


class RanksLanding:
    """Such memory of all ranks: each has its heads' part, and block ids are the same."""

    def __init__(self, first: Landing, followers: Followers) -> None:
        self._first = first
        self._followers = followers

    @property
    def place(self) -> PoolPlace:
        """Of the first rank's part."""
        return self._first.place

    def copy_in(self, landed: Sequence[BlockId], blocks: Sequence[BlockId]) -> IsReady:
        """Done when it is on every rank: only then may a step read the blocks, or a peer write the memory. Both may raise RankLost."""
        others_have = self._followers.copy_in(landed, blocks)
        first_has = self._first.copy_in(landed, blocks)
        return lambda: first_has() and others_have()


def _close(each: list[RankPipes]) -> None:
    for pipes in each:
        pipes.close()


def _unless_trouble(order: RankOrder, pipe: Connection) -> int | None:
    """A rank's answer. Raises ResourceError."""
    try:
        if not pipe.poll(START_TIMEOUT_S):
            raise _trouble(order, f"has not loaded its part within {START_TIMEOUT_S:g} s")
        answer: int | str | None = pipe.recv()
    except (EOFError, OSError) as error:
        raise _trouble(order, "ended before it was ready") from error
    if isinstance(answer, str):
        raise _trouble(order, answer)
    return answer


def _trouble(order: RankOrder, what: str) -> ResourceError:
    return ResourceError(f"rank {order.rank} of {order.num_ranks}: {what}")
