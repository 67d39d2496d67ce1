"""The other ranks of a tensor-parallel engine: child processes that compute their part of every step.

Rank 0 is the node's own process. It alone schedules and samples; it sends each step's arrays down a pipe to every other rank, and then all
of them compute it together. A rank has its weights and its heads' KV to itself, and block ids are the same on all.

Nothing waits for a rank that is gone: its pipe, or the ranks' own connections, break at once, and the node ends (`watch`). A rank whose
node is gone ends too.
"""

import signal
import threading
from collections.abc import Callable
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Literal

import msgspec
import torch

from disaggd.engine.batch import HostBatch
from disaggd.engine.staging import upload
from disaggd.errors import DisaggdError, ResourceError
from disaggd.model.batch import Batch
from disaggd.model.directory import open_directory
from disaggd.model.kv import allocate_kv
from disaggd.model.parallel import ProcessRanks, meeting_place, part_of
from disaggd.model.spec import Dtype, Weights
from disaggd.model.weights import load_weights
from disaggd.transfer.layout import kv_spec

STEP_TIMEOUT_S = 30.0
"""A rank that does not do its part of a step in so long is given up, and the node with it."""
START_TIMEOUT_S = 600.0
"""Reading the weights of a large model from a slow disk takes minutes."""
STOP_TIMEOUT_S = 5.0


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


class Followers:
    """Ranks 1 … n−1, as rank 0 sees them: started when this is made.

    They answer twice: when each has found its part and made room for its KV, and when all have met and each has read its weights.
    """

    def __init__(self, orders: list[RankOrder]) -> None:
        self._orders = orders
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self._closed = threading.Event()
        context = get_context("spawn")
        for order in orders:
            ours, theirs = context.Pipe()
            process = context.Process(target=follow, args=(order, theirs), name=f"rank {order.rank}", daemon=True)
            process.start()
            theirs.close()  # else its end would not end the pipe
            self._pipes.append(ours)
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
        """Have every rank compute its part of the step. Raises ResourceError if one is gone."""
        for order, pipe in zip(self._orders, self._pipes, strict=True):
            try:
                pipe.send(batch)
            except OSError as error:
                raise ResourceError(f"rank {order.rank} of {order.num_ranks} is gone") from error

    def watch(self, on_death: Callable[[ResourceError], None]) -> None:
        """`on_death` is called, on a thread of its own, as soon as one of them has ended."""
        threading.Thread(target=self._watch, args=(on_death,), name="ranks", daemon=True).start()

    def _watch(self, on_death: Callable[[ResourceError], None]) -> None:
        sentinels = {process.sentinel: process for process in self._processes}
        dead = sentinels[connection.wait(list(sentinels))[0]]  # type: ignore[index]
        dead.join()
        if not self._closed.is_set():
            of, code = self._orders[0].num_ranks, dead.exitcode
            on_death(ResourceError(f"{dead.name} of {of} has ended ({code}), and this node cannot go on without it"))

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


def follow(order: RankOrder, pipe: Connection) -> None:
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
        kv = allocate_kv(kv_spec(spec, order.block_size, len(part.kv_heads)), order.num_blocks, where)
        pipe.send(None)
        ranks = ProcessRanks(order.rank, order.num_ranks, meeting_place(order.port), STEP_TIMEOUT_S)
        transformer = load_weights(directory, spec, where, weights=order.weights, part=part, ranks=ranks)
    except DisaggdError as error:
        pipe.send(str(error))
        return
    pipe.send(None)
    with torch.inference_mode():
        while (batch := _next_step(pipe)) is not None:
            *fields, _ = upload(batch.arrays(), where)
            transformer.forward(Batch(*fields), kv)


def _next_step(pipe: Connection) -> HostBatch | None:
    try:
        batch: HostBatch = pipe.recv()
    except (EOFError, OSError):
        return None
    return batch
