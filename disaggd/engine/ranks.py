"""The other ranks of a tensor-parallel engine, as the first sees them: child processes that compute their part of every step.

Rank 0 is the node's own process. It alone schedules and samples; it sends each step's arrays down a pipe to every other rank, and then all
of them compute it together. A rank has its weights and its heads' KV to itself, and block ids are the same on all.

Nothing waits for a rank that is gone. On CPUs its pipe, and the ranks' own connections, break at once, and a step that lacks a rank's part
fails on every other. On GPUs the others' devices would wait: the communicator is aborted, and the first rank looks for losses while it
waits for a step; what still waits for a device then, an alarm of the kernel's ends. Either way it finds out whose part is missing
(`naming_the_lost`), and the node ends (`watch`). A rank whose node is gone ends too.

Something else may run in every rank's process beside its computing, with a pipe of its own to rank 0's; what it is, its owner knows.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, TypeVar

import torch

from disaggd.engine.batch import HostBatch
from disaggd.engine.follower import follow
from disaggd.engine.patterns import PatternOrder
from disaggd.engine.rank_orders import AreYouThere, Beside, CopyIn, RankOrder, RankPipes, ToRank, rank_pipes
from disaggd.engine.stream import DeviceStream
from disaggd.errors import RankLost, ResourceError
from disaggd.ids import BlockId
from disaggd.model.parallel import ProcessRanks, Ranks, TCPStore
from disaggd.transfer.landing_memory import LandingMemory
from disaggd.transfer.layout import PoolPlace
from disaggd.transfer.messages import IsReady, at_once
from disaggd.transfer.pattern import Mismatch

log = logging.getLogger(__name__)

STEP_TIMEOUT_S = 30.0
"""A rank that does not do its part of a step in so long is given up, and the node with it."""
START_TIMEOUT_S = 600.0
"""Reading the weights of a large model from a slow disk takes minutes."""
STOP_TIMEOUT_S = 5.0
LOST_RANK_TIMEOUT_S = 3
"""A process on GPUs that has lost a rank: whatever waits for a device that waits for that rank, the kernel ends it then."""
GOES_NOT_ON = "and this node cannot go on without it"
LAST_WORDS_S = 2.0
"""When one rank is lost, the others have noticed within so long."""
DEVICE_POLL_S = 1e-4
"""A device that waits for another rank's cannot be waited for, only asked. The step after is launched by then: nothing stands still."""


Made = TypeVar("Made")


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
        self._last_words: dict[int, str] = {}
        context = get_context("spawn")
        for order in orders:
            ours, theirs = rank_pipes()
            process = context.Process(target=follow, args=(order, theirs, beside), name=f"rank {order.rank}", daemon=True)
            process.start()
            theirs.close()  # else the process's end would not end the pipes
            self._pipes.append(ours)
            self._processes.append(process)
        # Whatever this process ends of: it waits for its children, who take no notice of the signal by which it would end them.
        self._ending = Finalize(self, _close, args=(self._closed, self._pipes), exitpriority=0)
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
        return [self._answer_in_loading(index) for index in range(len(self._orders))]

    def agree(self, num_blocks: int) -> int:
        """The fewest blocks that each has room for, and `num_blocks`; all are told. Raises ResourceError."""
        agreed = min([num_blocks, *(fitting for fitting in self.wait() if fitting is not None)])
        for index, pipes in enumerate(self._pipes):
            try:
                pipes.orders.send(agreed)
            except OSError as error:
                raise self._trouble_of(index) from error
        return agreed

    def unless_one_ends(self, make: Callable[[], Made]) -> Made:
        """What `make` returns, which may wait for them; raises ResourceError as soon as one of them has ended, or has before, or if it
        takes longer than they may take to start.

        It runs on a thread of its own, which then is left to itself.
        """
        made: Future[Made] = Future()

        def run() -> None:
            try:
                made.set_result(make())
            except BaseException as error:  # noqa: BLE001  carried to whoever waits
                made.set_exception(error)

        threading.Thread(target=run, name="meeting", daemon=True).start()
        either: list[Future[Any]] = [made, self._death]
        wait(either, START_TIMEOUT_S, FIRST_COMPLETED)
        if made.done():
            return made.result()
        if self._death.done():
            raise self._death.result()
        raise ResourceError(f"the {self._orders[0].num_ranks} ranks have not met within {START_TIMEOUT_S:g} s")

    def trouble(self) -> ResourceError | None:
        """Of the first of them that has ended, or ends soon: what it said of that, or how."""
        try:
            return self._death.result(LAST_WORDS_S / 2)
        except TimeoutError:
            return None

    def _answer_in_loading(self, index: int) -> int | None:
        order, pipe = self._orders[index], self._pipes[index].orders
        try:
            if not pipe.poll(START_TIMEOUT_S):
                raise ResourceError(f"{_name(order)}: has not loaded its part within {START_TIMEOUT_S:g} s")
            answer: int | None = pipe.recv()
        except (EOFError, OSError) as error:
            raise self._trouble_of(index) from error
        return answer

    def _trouble_of(self, index: int) -> ResourceError:
        """Its pipe has ended; another may have before, and this one of that."""
        return self.trouble() or ResourceError(f"{_name(self._orders[index])} ended before it was ready")

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
                raise RankLost(f"{_name(order)} is gone") from error
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
                raise RankLost(f"{_name(order)} has not answered, {GOES_NOT_ON}")
            answer = pipe.recv()
        except (EOFError, OSError) as error:
            raise RankLost(f"{_name(order)} is gone") from error
        assert answer is None or isinstance(answer, Mismatch), answer
        return answer

    def _tell(self, what: ToRank) -> None:
        for order, pipes in zip(self._orders, self._pipes, strict=True):
            try:
                pipes.orders.send(what)
            except OSError as error:
                raise RankLost(f"{_name(order)} is gone") from error

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
            return self._end_of(next(index for index, process in enumerate(self._processes) if process.sentinel in ended))
        if self._orders[0].device != "cpu":
            self._tell(AreYouThere())  # their devices miss it, and they do not notice
        silent = [
            str(order.rank) for order, pipes in zip(self._orders, self._pipes, strict=True) if not pipes.orders.poll(LAST_WORDS_S / 2)
        ]
        if not silent:
            return None
        return RankLost(f"rank {', '.join(silent)} of {self._orders[0].num_ranks} has not done its part of a step, {GOES_NOT_ON}")

    def _end_of(self, index: int) -> RankLost:
        """Of one that has ended: what it said of that, or how."""
        name, process, pipe = _name(self._orders[index]), self._processes[index], self._pipes[index].last_words
        with self._reaping:
            process.join()
            with suppress(EOFError, OSError):
                if pipe.poll(LAST_WORDS_S / 2):
                    self._last_words[index] = pipe.recv()
            if index in self._last_words:
                return RankLost(f"{name}: {self._last_words[index]}")
            return RankLost(f"{name} has ended ({process.exitcode}), {GOES_NOT_ON}")

    def watch(self, on_death: Callable[[ResourceError], None]) -> None:
        """`on_death` is called as soon as one of them has ended, on the thread that sees it, or on the caller's if one has by now."""
        self._death.add_done_callback(lambda death: on_death(death.result()))

    def _watch(self) -> None:
        indices = {process.sentinel: index for index, process in enumerate(self._processes)}
        error = self._end_of(indices[connection.wait(list(indices))[0]])  # type: ignore[index]
        if self._closed.is_set():
            return
        if self._orders[0].device != "cpu":
            log.error("%s", error)  # who is ended by the alarm says nothing more
            signal.alarm(LOST_RANK_TIMEOUT_S)
        self._death.set_result(error)

    def close(self, mark: Callable[[], IsReady] = lambda: at_once) -> None:
        """End them, once the first rank's device has done all that it needs them for, which `mark()` tells of. Idempotent.

        A device that has failed raises RuntimeError whatever it is asked, and does nothing more.
        """
        with suppress(RuntimeError):
            self._comes(mark(), STOP_TIMEOUT_S)
        self._closed.set()
        for pipes in self._pipes:
            pipes.orders.close()
        give_up_at = time.monotonic() + STOP_TIMEOUT_S
        for process in self._processes:
            process.join(max(0.0, give_up_at - time.monotonic()))
        for process in self._processes:
            process.kill()  # nothing to one that has ended
        for process in self._processes:
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
        ranks = self._followers.unless_one_ends(self._meet)
        self._followers.watch(lambda _: ranks.abort())
        return ranks

    def agree(self, num_blocks: int) -> int:
        return self._followers.agree(num_blocks)

    def _meet(self) -> ProcessRanks:
        order, where = self._order, torch.device(self._order.device)
        DeviceStream(where).enter()
        return ProcessRanks(order.rank, order.num_ranks, self._place, order.step_timeout_s, where)


class RanksLanding:
    """Such memory of all ranks: each has its heads' part, and block ids are the same."""

    def __init__(self, first: LandingMemory, followers: Followers) -> None:
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


def _close(closed: threading.Event, each: list[RankPipes]) -> None:
    closed.set()  # their ends are no losses from now on
    for pipes in each:
        pipes.close()


def _name(order: RankOrder) -> str:
    return f"rank {order.rank} of {order.num_ranks}"
