"""Tensor parallelism: which part of a model each rank holds, and what the ranks say to each other. The only home of
torch's process groups.

Projections that read the residual stream are cut by rows, those that write to it by columns (Shoeybi et al. 2019): each rank adds its
heads' and its neurons' share, and a sum over all ranks is what one process alone would have added. Query heads go with their KV
head. Where there are more ranks than KV heads, several ranks hold the same one and share its query heads.
"""

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

import msgspec
import torch
import torch._C._distributed_c10d as c10d
import torch.nn.functional as F
from torch import Tensor

from disaggd.errors import RankLost, ResourceError
from disaggd.model.spec import ModelSpec
from disaggd.transfer.reshape import heads_of

TCPStore = c10d.TCPStore
"""Where ranks meet."""

CLOSE_TIMEOUT_S = 1.0
REACH_TIMEOUT_S = 10.0
"""For the meeting place, which is on loopback and open before another rank is started. With torch's retries it may take half as long again;
the first rank, which waits for 30 s on a CPU, is there to hear of it."""
STORE_TIMEOUT_S = 300.0
"""For what another rank says at the meeting place, once it has come as far; torch's own."""

UNIT = 64
"""Neurons of an MLP are shared out by so many, as long as there are enough: kernels work in panels of them."""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank holds."""

    rank: int
    num_ranks: int
    heads: range
    """Query heads."""
    kv_heads: range
    neurons: range
    """Of every MLP."""
    vocabulary: range

    @property
    def adds_biases(self) -> bool:
        """To what is summed over all ranks: one of them must."""
        return self.rank == 0


def part_of(spec: ModelSpec, rank: int = 0, num_ranks: int = 1) -> Part:
    """Raises ModelError where a rank would have nothing to do."""
    spec.check_ranks(num_ranks)
    kv_heads = heads_of(rank, num_ranks, spec.num_kv_heads)
    unit = UNIT if spec.intermediate_size % UNIT == 0 and spec.intermediate_size >= UNIT * num_ranks else 1
    units = _share(spec.intermediate_size // unit, rank, num_ranks)
    return Part(
        rank=rank,
        num_ranks=num_ranks,
        heads=_query_heads(spec, kv_heads, rank, num_ranks),
        kv_heads=kv_heads,
        neurons=range(units.start * unit, units.stop * unit),
        vocabulary=_share(spec.vocab_size, rank, num_ranks),
    )


def _query_heads(spec: ModelSpec, kv_heads: range, rank: int, num_ranks: int) -> range:
    """Those of the rank's KV heads; of one that others hold too, this rank's share."""
    group = spec.num_heads // spec.num_kv_heads
    holders = [other for other in range(num_ranks) if heads_of(other, num_ranks, spec.num_kv_heads) == kv_heads]
    share = _share(group * len(kv_heads), holders.index(rank), len(holders))
    return range(kv_heads.start * group + share.start, kv_heads.start * group + share.stop)


def _share(total: int, rank: int, num_ranks: int) -> range:
    return range(rank * total // num_ranks, (rank + 1) * total // num_ranks)


class Ranks(Protocol):
    """Those that compute a model together, as one of them sees it. Each call is made by all of them, in the same order."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`; `x` may be changed."""

    def collect(self, x: Tensor, widths: list[int]) -> Tensor:
        """On rank 0 every rank's columns side by side: rank r's `x` is [n, widths[r]]. The others get their own back."""

    def spread(self, x: Tensor) -> None:
        """Overwrite every rank's `x` with rank 0's. On GPUs as part of what the device is asked to do; no host sees it."""

    def close(self) -> None:
        """Nothing is said any more, by none of them."""


class Alone:
    """The only rank."""

    def sum(self, x: Tensor) -> Tensor:
        return x

    def collect(self, x: Tensor, widths: list[int]) -> Tensor:
        return x

    def spread(self, x: Tensor) -> None:
        """It is what it is."""

    def close(self) -> None:
        """There is nobody to part from."""


class ProcessRanks:
    """Ranks in processes of their own: on CPUs over gloo, on GPUs, of which each has one, over NCCL.

    On CPUs a call returns what it says, and raises RankLost when another rank is gone, or takes longer than `timeout_s`. On GPUs it asks
    the device for it, in its turn, and may be captured in a graph; a device that misses another rank's part waits until `abort`.
    """

    def __init__(self, rank: int, num_ranks: int, store: TCPStore, timeout_s: float, where: torch.device) -> None:
        """Returns when all of them are there. Raises RankLost where one on a CPU does not come, ResourceError where NCCL cannot start."""
        self._rank = rank
        self._where = where
        self._sum, self._gather, self._broadcast = c10d.AllreduceOptions(), c10d.GatherOptions(), c10d.BroadcastOptions()
        for options in (self._sum, self._gather, self._broadcast):
            options.asyncOp = False  # NCCL's work is asked for where the model's is, on the same stream: nothing is to be waited for
        self._gather.rootRank = self._broadcast.rootRank = 0
        try:
            # Not the process's default group: that is a global, of which two engines in one process could not have one each.
            self._group = _group_on(where, rank, num_ranks, store, timeout_s)
            if where.type == "cuda":  # a communicator is made by its first use, which must not be in a capture
                _ask(self._group.broadcast, [torch.zeros(1, device=where)], self._broadcast)
                torch.cuda.synchronize(where)
        except RuntimeError as error:
            if where.type == "cuda":
                raise ResourceError(f"device {where}: NCCL cannot start: {error}") from error
            raise RankLost(f"another rank has not come: {error}") from error

    def sum(self, x: Tensor) -> Tensor:
        self._do(self._group.allreduce, [x], self._sum)
        return x

    def collect(self, x: Tensor, widths: list[int]) -> Tensor:
        padded = F.pad(x, (0, max(widths) - x.shape[1])).contiguous()
        gathered = [] if self._rank else [torch.empty_like(padded) for _ in widths]
        self._do(self._group.gather, [gathered] if gathered else [], [padded], self._gather)
        return torch.cat([one[:, :width] for one, width in zip(gathered, widths, strict=True)], dim=1) if gathered else x

    def spread(self, x: Tensor) -> None:
        self._do(self._group.broadcast, [x], self._broadcast)

    def _do(self, collective: Callable[..., c10d.Work | None], *arguments: object) -> None:
        try:
            _ask(collective, *arguments)
        except RuntimeError as error:  # the only kind that gloo has, and the base of NCCL's
            raise RankLost(f"another rank has not done its part: {error}") from error

    def abort(self) -> None:
        """Another rank is gone: have the device stop waiting for it. From any thread; returns at once.

        What the device gives from then on is nothing. On CPUs the connections have broken by themselves.
        """
        self._abort()

    def close(self) -> None:
        """A GPU's communicator is given up: no captured graph may hold it any more."""
        if (aborting := self._abort()) is not None:
            aborting.join(CLOSE_TIMEOUT_S)

    def _abort(self) -> threading.Thread | None:
        if self._where.type != "cuda":
            return None
        # On a thread, for it returns only when no captured graph holds the communicator any more.
        thread = threading.Thread(target=self._group.abort, name="abort", daemon=True)
        thread.start()
        return thread


def _ask(collective: Callable[..., c10d.Work | None], *arguments: object) -> None:
    work = collective(*arguments)
    if work is not None:  # else there is nothing to wait for
        work.wait()


def _group_on(where: torch.device, rank: int, num_ranks: int, store: TCPStore, timeout_s: float) -> c10d.ProcessGroup:
    """As torch's stubs have it: what a backend can do they say of a group only."""
    if where.type != "cuda":
        return c10d.ProcessGroupGloo(store, rank, num_ranks, timedelta(seconds=timeout_s))  # type: ignore[return-value]
    if not hasattr(c10d, "ProcessGroupNCCL"):
        raise ResourceError(f"device {where}: this torch has no NCCL, which {num_ranks} ranks on GPUs need")
    options = c10d.ProcessGroupNCCL.Options()
    # Whoever waits for a step finds out earlier, and says who is missing; torch would end the process, and say nothing of ranks.
    options._timeout = timedelta(seconds=2 * timeout_s)
    return c10d.ProcessGroupNCCL(store, rank, num_ranks, options)  # type: ignore[return-value]


def meeting_place(port: int | None = None) -> TCPStore:
    """Where the ranks of one node find each other, on loopback: rank 0 opens it without a port, and tells the others which it got.

    Raises ResourceError if it cannot be opened, or reached.
    """
    try:
        timeout = timedelta(seconds=REACH_TIMEOUT_S)
        store = TCPStore("127.0.0.1", port or 0, is_master=port is None, wait_for_workers=False, timeout=timeout)
    except RuntimeError as error:  # the base of all that c10d raises
        trouble = "be opened on 127.0.0.1" if port is None else f"be reached at 127.0.0.1:{port}"
        raise ResourceError(f"the place where the ranks meet cannot {trouble}: {error}") from error
    store.set_timeout(timedelta(seconds=STORE_TIMEOUT_S))
    return store
