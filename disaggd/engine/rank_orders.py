"""What goes between rank 0 of a tensor-parallel engine and another rank's process. Plain data: pickles do, for one program started both."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Literal

import msgspec

from disaggd.engine.batch import HostBatch
from disaggd.engine.patterns import PatternOrder
from disaggd.ids import BlockId
from disaggd.model.spec import Dtype, Weights
from disaggd.transfer.rank_kv import RankKV

Beside = Callable[[RankKV, Connection], AbstractContextManager[None]]
"""What runs beside a rank's computing: given the rank's KV, and its end of a pipe to the first rank's process. Named in its module, for it
is sent to another process."""


class HostMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of the host that KV goes through on its way to a pool or from one: bytes, of all ranks together."""

    staging_bytes: int | None = None
    """In blocks as the pool has them: for a pool that NIXL is not shown. None: there is none."""
    fp8_bytes: int | None = None
    """In blocks in fp8, which peers write. None: they write blocks as the pool has them."""


class RankOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank is to be. All of an engine differ in `rank` and `device` alone."""

    rank: int
    num_ranks: int
    port: int | None
    """Where the ranks meet; None: there is one only."""
    path: str
    dtype: Dtype | Literal["auto"]
    weights: Weights
    device: str
    block_size: int
    num_blocks: int | None
    """None: what fits the memory that the weights leave free, on the rank where that is the fewest."""
    max_step_tokens: int
    max_sequences: int
    max_model_len: int
    layer_group: int
    memory: HostMemory
    step_timeout_s: float


@dataclass(frozen=True, slots=True)
class CopyIn:
    """Blocks that have landed in memory of the host, and those of the pool that they are for. Answered when the copy is made."""

    landed: tuple[BlockId, ...]
    blocks: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True)
class AreYouThere:
    """Answered None."""


ToRank = HostBatch | CopyIn | PatternOrder | AreYouThere
"""What goes down a rank's pipe, and is begun in that order."""


@dataclass(frozen=True, slots=True)
class RankPipes:
    """One process's ends of the pipes between the first rank and another."""

    orders: Connection
    """`ToRank` one way, answers the other."""
    copied: Connection
    """None from the rank for each `CopyIn`, in their order."""
    side: Connection
    """For what runs beside."""
    last_words: Connection
    """Text from the rank before it ends, if it knows of what."""

    def close(self) -> None:
        for pipe in (self.orders, self.copied, self.side, self.last_words):
            pipe.close()


def rank_pipes() -> tuple[RankPipes, RankPipes]:
    """The first rank's ends, and the other's."""
    ours, theirs = (RankPipes(*ends) for ends in zip(*(Pipe() for _ in range(4)), strict=True))
    return ours, theirs
