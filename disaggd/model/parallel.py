"""Tensor parallelism: which part of a model each rank holds, and what the ranks say to each other. The only home of
torch's process groups.

Projections that read the residual stream are cut by rows, those that write to it by columns (Shoeybi et al. 2019): each rank adds its
heads' and its neurons' share, and a sum over all ranks is what one process alone would have added. Query heads go with their KV
head. Where there are more ranks than KV heads, several ranks hold the same one and share its query heads.
"""

from datetime import timedelta
from typing import Protocol

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._distributed_c10d import GatherOptions, ProcessGroup, ProcessGroupGloo, TCPStore, Work

from disaggd.errors import RankLost
from disaggd.model.spec import ModelSpec
from disaggd.transfer.reshape import heads_of

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


class Alone:
    """The only rank."""

    def sum(self, x: Tensor) -> Tensor:
        return x

    def collect(self, x: Tensor, widths: list[int]) -> Tensor:
        return x


class ProcessRanks:
    """Ranks in processes of their own, over gloo. Raises RankLost when another one is gone, or takes longer than `timeout_s`."""

    def __init__(self, rank: int, num_ranks: int, store: TCPStore, timeout_s: float) -> None:
        """Returns when all of them are there."""
        self._rank = rank
        # Not the process's default group: that is a global, of which two engines in one process could not have one each.
        self._group: ProcessGroup = ProcessGroupGloo(store, rank, num_ranks, timedelta(seconds=timeout_s))  # type: ignore[assignment]

    def sum(self, x: Tensor) -> Tensor:
        _finish(self._group.allreduce([x]))
        return x

    def collect(self, x: Tensor, widths: list[int]) -> Tensor:
        padded = F.pad(x, (0, max(widths) - x.shape[1])).contiguous()
        gathered = [] if self._rank else [torch.empty_like(padded) for _ in widths]
        options = GatherOptions()
        options.rootRank = 0
        _finish(self._group.gather([gathered] if gathered else [], [padded], options))
        return torch.cat([one[:, :width] for one, width in zip(gathered, widths, strict=True)], dim=1) if gathered else x


def _finish(work: Work) -> None:
    try:
        work.wait()
    except RuntimeError as error:  # the only kind that gloo has
        raise RankLost(f"another rank has not done its part: {error}") from error


def meeting_place(port: int | None = None) -> TCPStore:
    """Where the ranks of one node find each other, on loopback: rank 0 opens it without a port, and tells the others which it got."""
    return TCPStore("127.0.0.1", port or 0, is_master=port is None, wait_for_workers=False)
