"""A rank's own process, but for the first's: it loads its part of the model, and computes its part of every step, until the pipe ends.

It decides nothing. On a GPU it asks its device for one step after another and waits for none: that the first rank's device has done a step
says that all have. What is no step, and no sum over all ranks says anything of, it waits for itself: a pattern.
"""

import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from time import sleep

import torch

from disaggd.engine.batch import HostBatch
from disaggd.engine.kv_repack import KVUnpacker, make_repacker
from disaggd.engine.kv_staging import KVStaging
from disaggd.engine.patterns import PatternMemory, obey
from disaggd.engine.rank import Rank, load_rank
from disaggd.engine.rank_orders import AreYouThere, Beside, CopyIn, RankOrder, RankPipes, ToRank
from disaggd.engine.stream import DeviceStream
from disaggd.errors import EXIT_RESOURCE, DisaggdError, RankLost
from disaggd.log import StartProgress
from disaggd.model.directory import open_directory
from disaggd.model.parallel import ProcessRanks, Ranks, meeting_place
from disaggd.transfer.layout import kv_spec
from disaggd.transfer.messages import IsReady
from disaggd.transfer.rank_kv import RankKV

ORPHAN_TIMEOUT_S = 3.0
"""For so long at most: a device may wait for ever for that of a rank that is gone, and a thread for the device."""
COPY_POLL_S = 0.001
DEVICE_POLL_S = 0.001


def follow(order: RankOrder, pipes: RankPipes, beside: Beside | None) -> None:
    """Be the rank of that order."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # A terminal and systemd send them to all of a node's processes: the pipe's end says more.
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_node, name="node", daemon=True).start()
    if torch.device(order.device).type != "cuda":
        return _be(order, pipes, beside)
    exit_code = 1
    try:
        _be(order, pipes, beside)
        exit_code = 0
    except BaseException:  # noqa: BLE001  there is nobody above
        traceback.print_exc()
    finally:
        # What NCCL, and torch about it, wait for on their way out may never come; nobody waits for anything here.
        os._exit(exit_code)


def _be(order: RankOrder, pipes: RankPipes, beside: Beside | None) -> None:
    stream = DeviceStream(torch.device(order.device))
    stream.enter()
    try:
        rank = _loaded(order, pipes.orders)
    except (EOFError, BrokenPipeError):
        return  # the first rank has given up
    except DisaggdError as error:
        with suppress(OSError):
            pipes.last_words.send(str(error))
        return
    held = _held(order, rank, stream)
    with nullcontext() if beside is None else beside(held, pipes.side), torch.inference_mode():
        obey_all(rank, PatternMemory(rank.kv, held.share.heads), pipes, stream.mark)


def obey_all(rank: Rank, patterns: PatternMemory, pipes: RankPipes, mark: Callable[[], IsReady]) -> None:
    """Do what comes down the pipe, in that order, until it ends. `mark()`: whether the rank's device has done all so far."""
    copies = _Copies(rank.landing, pipes.copied)
    while (told := _next(pipes.orders, copies)) is not None:
        if isinstance(told, HostBatch):
            _compute(rank, told, pipes.orders)
        elif isinstance(told, CopyIn):
            copies.begin(told)
        elif isinstance(told, AreYouThere):
            pipes.orders.send(None)
        else:
            answer = obey(patterns, told)
            _wait_for(mark())
            pipes.orders.send(answer)


def _wait_for(is_done: IsReady) -> None:
    """If that is for ever, the first rank gives this one up."""
    while not is_done():
        sleep(DEVICE_POLL_S)


class _Copies:
    """Out of memory of the host into the pool, each of which is answered when it is made."""

    def __init__(self, landing: KVStaging | KVUnpacker | None, answers: Connection) -> None:
        self._landing = landing
        self._answers = answers
        self._begun: deque[IsReady] = deque()

    @property
    def are_begun(self) -> bool:
        return bool(self._begun)

    def begin(self, order: CopyIn) -> None:
        assert self._landing is not None, "peers write into the pool"
        self._begun.append(self._landing.copy_in(order.landed, order.blocks))

    def answer(self) -> None:
        while self._begun and self._begun[0]():
            self._begun.popleft()
            self._answers.send(None)


def _next(orders: Connection, copies: _Copies) -> ToRank | None:
    """None: there will be no more."""
    try:
        copies.answer()
        while copies.are_begun and not orders.poll(COPY_POLL_S):
            copies.answer()
        told: ToRank = orders.recv()
    except (EOFError, OSError):
        return None
    return told


def _compute(rank: Rank, batch: HostBatch, orders: Connection) -> None:
    try:
        rank.forward(batch)
    except RankLost as error:
        with suppress(OSError):  # it may be the first rank that is gone
            orders.send(str(error))  # and the pipe's end is next


def _loaded(order: RankOrder, orders: Connection) -> Rank:
    directory = open_directory(order.path)
    return load_rank(order, directory, directory.spec(order.dtype), _First(order, orders), StartProgress(None, order.path))


class _First:
    """The first rank, and through it the others, while all are made."""

    def __init__(self, order: RankOrder, orders: Connection) -> None:
        self._order = order
        self._orders = orders

    def are_ready(self) -> None:
        self._orders.send(None)

    def meet(self) -> Ranks:
        order = self._order
        place = meeting_place(order.port)
        return ProcessRanks(order.rank, order.num_ranks, place, order.step_timeout_s, torch.device(order.device))

    def agree(self, num_blocks: int) -> int:
        self._orders.send(num_blocks)
        agreed: int = self._orders.recv()
        return agreed


def _held(order: RankOrder, rank: Rank, stream: DeviceStream) -> RankKV:
    spec = open_directory(order.path).spec(order.dtype)
    return RankKV(
        kv=kv_spec(spec, order.block_size),
        rank=order.rank,
        num_ranks=order.num_ranks,
        place=rank.place,
        num_bytes=rank.kv.nbytes,
        is_hosts=not rank.kv.is_cuda,
        make_repacker=partial(make_repacker, rank.kv),
        staging=rank.staging,
        fp8_landing=rank.fp8_landing,
        on_start=stream.enter,
    )


def _end_with_the_node() -> None:
    """Whatever this process waits for."""
    node = parent_process()
    assert node is not None
    node.join()
    sleep(ORPHAN_TIMEOUT_S)
    os._exit(EXIT_RESOURCE)
