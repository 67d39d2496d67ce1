"""`Rank`: what one rank computes and moves KV with, and how it comes to be. All of an engine are made by the same function, at the same
time: what it does together with the others, such as capturing decode steps, each does in the same order.

Knows nothing of processes: `Others` are spoken to.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from disaggd.engine.forward import Forward
from disaggd.engine.graphs import DecodeGraphs
from disaggd.engine.kv_repack import KVUnpacker, make_unpacker
from disaggd.engine.kv_staging import KVStaging, make_staging
from disaggd.engine.rank_orders import RankOrder
from disaggd.errors import ConfigError, ResourceError
from disaggd.log import StartProgress
from disaggd.model.directory import ModelDirectory
from disaggd.model.kv import allocate_kv
from disaggd.model.parallel import Ranks, part_of
from disaggd.model.spec import ModelSpec
from disaggd.model.transformer import Transformer
from disaggd.model.weights import load_weights
from disaggd.transfer.layout import KVSpec, PoolPlace, in_fp8, kv_spec
from disaggd.transfer.share import block_bytes
from disaggd.transfer.source import staging_blocks

_POOL_SHARE = 0.9
"""Of the memory that the weights leave free on a GPU: the rest is for activations, logits and captured graphs."""


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank of an engine."""

    forward: Forward
    staging: KVStaging | None
    """What a GPU's KV goes through."""
    unpacker: KVUnpacker | None
    """Where KV lands, in fp8."""

    @property
    def kv(self) -> Tensor:
        """[layers, num_blocks, kv_heads, 2, block_size, head_dim]: its heads of the pool."""
        return self.forward.kv

    @property
    def place(self) -> PoolPlace:
        """Where `kv` lies."""
        return PoolPlace(self.kv.data_ptr(), self.kv.shape[1])

    @property
    def landing(self) -> KVStaging | KVUnpacker | None:
        """What peers write in place of the pool, if they do."""
        return self.unpacker or self.staging

    @property
    def fp8_landing(self) -> PoolPlace | None:
        """Where peers write its KV in fp8, if they do."""
        return None if self.unpacker is None else self.unpacker.place


class Others(Protocol):
    """The other ranks, as one of them sees them while they are made."""

    def are_ready(self) -> None:
        """This rank has come so far; the first one's returns when all have. Raises ResourceError if one has a trouble instead."""

    def meet(self) -> Ranks | None:
        """What computes together, once all are there; None where there is one only."""

    def agree(self, num_blocks: int) -> int:
        """The fewest blocks of which any rank says that it has room for them."""


class NoOthers:
    """Of the only rank."""

    def are_ready(self) -> None:
        """There is nobody to wait for."""

    def meet(self) -> Ranks | None:
        return None

    def agree(self, num_blocks: int) -> int:
        return num_blocks


def load_rank(order: RankOrder, directory: ModelDirectory, spec: ModelSpec, others: Others, progress: StartProgress) -> Rank:
    """What the order says, on its device, whose `DeviceStream` this thread has entered.

    Raises ModelError, ConfigError, ResourceError, or RankLost where another rank is gone meanwhile.
    """
    where, part = torch.device(order.device), part_of(spec, order.rank, order.num_ranks)
    held = kv_spec(spec, order.block_size, len(part.kv_heads))
    kv: Tensor | None = None
    if order.num_blocks is not None:
        _landing_blocks(order, spec, order.num_blocks)  # that they are too few is said before the weights are read
        kv = allocate_kv(held, order.num_blocks, where)
    others.are_ready()
    ranks = others.meet()
    with memory_shortage_on(where, "the weights"):
        transformer = load_weights(directory, spec, where, progress.loading, order.weights, part, ranks)
    transformer.layer_group = order.layer_group
    if kv is None:
        kv = allocate_kv(held, others.agree(_blocks_that_fit(held, where)), where)
    staging_count, fp8_count = _landing_blocks(order, spec, kv.shape[1])
    rank = Rank(
        _forward(order, transformer, kv, progress),
        None if staging_count is None else make_staging(kv, held, staging_count),
        None if fp8_count is None else make_unpacker(kv, held, fp8_count),
    )
    others.are_ready()
    return rank


def _forward(order: RankOrder, transformer: Transformer, kv: Tensor, progress: StartProgress) -> Forward:
    """On a GPU with its decode steps captured."""
    if not kv.is_cuda:
        return Forward(transformer, kv, order.max_step_tokens)
    graphs = DecodeGraphs(
        transformer,
        kv,
        max_sequences=order.max_sequences,
        max_blocks=min(kv.shape[1], -(-order.max_model_len // order.block_size)),
        max_rows=order.max_step_tokens,
    )
    with memory_shortage_on(kv.device, "captured decode steps: lower kv_cache"):
        graphs.capture(progress.capturing)
    return Forward(transformer, kv, order.max_step_tokens, graphs)


def _blocks_that_fit(held: KVSpec, where: torch.device) -> int:
    free_bytes = int(torch.cuda.mem_get_info(where)[0] * _POOL_SHARE)
    return num_blocks_in(held, free_bytes)


def num_blocks_in(layout: KVSpec, kv_cache_bytes: int, num_ranks: int = 1) -> int:
    """Of a pool of so many bytes, on all ranks together. Raises ConfigError where there is none."""
    num_bytes = block_bytes(layout, num_ranks)
    if kv_cache_bytes < num_bytes:
        raise ConfigError(f"kv_cache: {kv_cache_bytes:,} bytes do not hold one block of {num_bytes:,}")
    return kv_cache_bytes // num_bytes


def _landing_blocks(order: RankOrder, spec: ModelSpec, pool_blocks: int) -> tuple[int | None, int | None]:
    """Of the staging memory, and of that for KV in fp8: the same on every rank, for block ids are. Raises ConfigError."""
    whole = kv_spec(spec, order.block_size)

    def blocks(layout: KVSpec, num_bytes: int | None) -> int | None:
        if num_bytes is None:
            return None
        return staging_blocks(
            layout,
            num_bytes,
            num_ranks=order.num_ranks,
            pool_blocks=pool_blocks,
            max_step_tokens=order.max_step_tokens,
            layer_group=order.layer_group,
        )

    return blocks(whole, order.memory.staging_bytes), blocks(in_fp8(whole), order.memory.fp8_bytes)


@contextmanager
def memory_shortage_on(where: torch.device, what: str) -> Iterator[None]:
    """That the device has no memory left in the body is a ResourceError that says for `what`."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise ResourceError(f"device {where}: no memory is left for {what} ({error})") from error
