"""The other ranks of a tensor-parallel engine: child processes that compute their part of every step.

Rank 0 is the node's own process. It alone schedules and samples; it sends each step's arrays down a pipe to every other rank, and then all
of them compute it together. A rank has its weights and its heads' KV to itself, and block ids are the same on all.

Nothing waits for a rank that is gone: its pipe, or the ranks' own connections, break at once, and the node ends (`watch`). A step that
lacks a rank's part fails on every other, and the first finds out whose (`naming_the_lost`). A rank whose node is gone ends too.

Something else may run in every rank's process beside its computing, with a pipe of its own to rank 0's; what it is, its owner knows.
"""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Literal

import msgspec
import torch

from disaggd.engine.batch import HostBatch
from disaggd.engine.kv_repack import KVUnpacker, make_repacker, make_unpacker
from disaggd.engine.patterns import PatternMemory, PatternOrder, obey
from disaggd.engine.staging import upload
from disaggd.errors import DisaggdError, RankLost, ResourceError
from disaggd.ids import BlockId
from disaggd.model.batch import Batch
from disaggd.model.directory import open_directory
from disaggd.model.kv import allocate_kv
from disaggd.model.parallel import ProcessRanks, meeting_place, part_of
from disaggd.model.spec import Dtype, Weights
from disaggd.model.weights import load_weights
from disaggd.transfer.layout import PoolPlace, kv_spec
from disaggd.transfer.messages import IsReady
from disaggd.transfer.pattern import Mismatch
from disaggd.transfer.rank_kv import RankKV

STEP_TIMEOUT_S = 30.0
"""A rank that does not do its part of a step in so long is given up, and the node with it."""
START_TIMEOUT_S = 600.0
"""Reading the weights of a large model from a slow disk takes minutes."""
STOP_TIMEOUT_S = 5.0
GOES_NOT_ON = "and this node cannot go on without it"
LAST_WORDS_S = 2.0
"""When one rank is lost, the others have noticed within so long."""


Beside = Callable[[RankKV, Connection], AbstractContextManager[None]]
"""What runs beside a rank's computing: given the rank's KV, and its end of a pipe to the first rank's process. Named in its module, for it
is sent to another process."""


class Unpack(msgspec.Struct, frozen=True):
    """Blocks that have landed in fp8, and those of the pool that they are for."""

    landed: tuple[BlockId, ...]
    blocks: tuple[BlockId, ...]


ToRank = HostBatch | Unpack | PatternOrder
"""What goes down a rank's pipe, and is done in that order."""


class RankOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank is to be."""

    rank: int
    num_ranks: int
    port: int
    """Where the ranks meet."""
    path: str
    dtype: Dtype | Literal["auto"]
    weights: Weights
    device: str
    block_size: int
    num_blocks: int
    fp8_blocks: int | None
    """Of memory that KV lands in, in fp8; None: it lands in the pool."""
    step_timeout_s: float


class Followers:
    """Ranks 1 … n−1, as rank 0 sees them: started when this is made.

    They answer twice: when each has found its part and made room for its KV, and when all have met and each has read its weights.
    """

    def __init__(self, orders: list[RankOrder], beside: Beside | None = None) -> None:
        self._orders = orders
        self._pipes: list[Connection] = []
        self.side_pipes: list[Connection] = []
        """By rank, from the second: our ends, for what runs `beside` their computing."""
        self._processes: list[BaseProcess] = []
        self._closed = threading.Event()
        self._reaping = threading.Lock()  # of two threads that wait for one child, the system tells only one how it ended
        context = get_context("spawn")
        for order in orders:
            (ours, theirs), (side, other_side) = context.Pipe(), context.Pipe()
            arguments = order, theirs, beside, other_side
            process = context.Process(target=follow, args=arguments, name=f"rank {order.rank}", daemon=True)
            process.start()
            theirs.close()  # else its end would not end the pipe
            other_side.close()
            self._pipes.append(ours)
            self.side_pipes.append(side)
            self._processes.append(process)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes if process.pid is not None]

    def wait(self) -> None:
        """For the next answer of each. Raises ResourceError if one of them has a trouble instead."""
        for order, pipe in zip(self._orders, self._pipes, strict=True):
            trouble = _answer(pipe)
            if trouble is not None:
                raise ResourceError(f"rank {order.rank} of {order.num_ranks}: {trouble}")

    def compute(self, batch: HostBatch) -> None:
        """Have every rank compute its part of the step. Raises RankLost if one is gone."""
        self._tell(batch)

    def unpack(self, landed: Sequence[BlockId], blocks: Sequence[BlockId]) -> None:
        """Have every rank unpack its heads of what has landed, before any later step. Raises RankLost if one is gone."""
        self._tell(Unpack(tuple(landed), tuple(blocks)))

    def order(self, order: PatternOrder) -> None:
        """Have every rank do that, in order with its steps; `answers` come next. Raises RankLost if one is gone."""
        self._tell(order)

    def answers(self) -> list[Mismatch | None]:
        """Of every rank, to the last `order`. Raises RankLost if one is gone, or does not answer in a step's time."""
        return [self._answer_of(order, pipe) for order, pipe in zip(self._orders, self._pipes, strict=True)]

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
        for order, pipe in zip(self._orders, self._pipes, strict=True):
            try:
                pipe.send(what)
            except OSError as error:
                raise RankLost(f"rank {order.rank} of {order.num_ranks} is gone") from error

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
        silent = [str(order.rank) for order, pipe in zip(self._orders, self._pipes, strict=True) if not pipe.poll(LAST_WORDS_S / 2)]
        if not silent:
            return None
        return RankLost(f"rank {', '.join(silent)} of {self._orders[0].num_ranks} has not done its part of a step, {GOES_NOT_ON}")

    def _end_of(self, process: BaseProcess) -> RankLost:
        with self._reaping:
            process.join()
            return RankLost(f"{process.name} of {self._orders[0].num_ranks} has ended ({process.exitcode}), {GOES_NOT_ON}")

    def watch(self, on_death: Callable[[ResourceError], None]) -> None:
        """`on_death` is called, on a thread of its own, as soon as one of them has ended."""
        threading.Thread(target=self._watch, args=(on_death,), name="ranks", daemon=True).start()

    def _watch(self, on_death: Callable[[ResourceError], None]) -> None:
        sentinels = {process.sentinel: process for process in self._processes}
        error = self._end_of(sentinels[connection.wait(list(sentinels))[0]])  # type: ignore[index]
        if not self._closed.is_set():
            on_death(error)

    def close(self) -> None:
        """End them. Idempotent."""
        self._closed.set()
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(STOP_TIMEOUT_S)
            if process.exitcode is None:
                process.kill()
                process.join()
        for pipe in self.side_pipes:
            pipe.close()


class RanksUnpacker:
    """Memory in which KV lands in fp8, of all ranks: each has its heads' part, and block ids are the same."""

    def __init__(self, first: KVUnpacker, followers: Followers) -> None:
        self._first = first
        self._followers = followers

    @property
    def place(self) -> PoolPlace:
        """Of the first rank's part."""
        return self._first.place

    def copy_in(self, landed: Sequence[BlockId], blocks: Sequence[BlockId]) -> IsReady:
        """Unpack blocks into the pool on all ranks; the others do so before any step that reads them. Raises RankLost if one is gone."""
        self._followers.unpack(landed, blocks)
        return self._first.copy_in(landed, blocks)


def _answer(pipe: Connection) -> str | None:
    """What went wrong with a rank, if anything did."""
    try:
        if not pipe.poll(START_TIMEOUT_S):
            return f"has not loaded its part within {START_TIMEOUT_S:g} s"
        trouble: str | None = pipe.recv()
    except (EOFError, OSError):
        return "ended before it was ready"
    return trouble


# ── the rank's own process ───────────────────────────────────────────────────────────────────────────────────────────


def follow(order: RankOrder, pipe: Connection, beside: Beside | None, side_pipe: Connection) -> None:
    """Load the rank's part of the model, and compute its part of every step, until the pipe ends."""
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # a terminal and systemd send them to all of a node's processes: the pipe's end says more
        signal.signal(number, signal.SIG_IGN)
    where = torch.device(order.device)
    try:
        directory = open_directory(order.path)
        spec = directory.spec(order.dtype)
        part = part_of(spec, order.rank, order.num_ranks)
        held = kv_spec(spec, order.block_size, len(part.kv_heads))
        kv = allocate_kv(held, order.num_blocks, where)
        unpacker = None if order.fp8_blocks is None else make_unpacker(kv, held, order.fp8_blocks)
        pipe.send(None)
        ranks = ProcessRanks(order.rank, order.num_ranks, meeting_place(order.port), order.step_timeout_s)
        transformer = load_weights(directory, spec, where, weights=order.weights, part=part, ranks=ranks)
    except DisaggdError as error:
        pipe.send(str(error))
        return
    pipe.send(None)
    mine = RankKV(
        kv=kv_spec(spec, order.block_size),
        rank=order.rank,
        num_ranks=order.num_ranks,
        place=PoolPlace(kv.data_ptr(), order.num_blocks),
        num_bytes=kv.nbytes,
        make_repacker=partial(make_repacker, kv),
        fp8_landing=None if unpacker is None else unpacker.place,
    )
    memory = PatternMemory(kv, part.kv_heads)
    with nullcontext() if beside is None else beside(mine, side_pipe), torch.inference_mode():
        while (told := _next(pipe)) is not None:
            if isinstance(told, Unpack):
                assert unpacker is not None
                unpacker.copy_in(told.landed, told.blocks)
                continue
            if not isinstance(told, HostBatch):
                pipe.send(obey(memory, told))
                continue
            *fields, _ = upload(told.arrays(), where)
            try:
                transformer.forward(Batch(*fields), kv)
            except RankLost as error:
                with suppress(OSError):  # it may be the first rank that is gone
                    pipe.send(str(error))  # and the pipe's end is next


def _next(pipe: Connection) -> ToRank | None:
    try:
        told: ToRank = pipe.recv()
    except (EOFError, OSError):
        return None
    return told
