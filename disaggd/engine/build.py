"""An engine from what the config says: the model's files, the KV pool's memory, the limits. Knows nothing of roles."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import msgspec
import torch
from torch import Tensor

from disaggd.config import Config, NodeConfig
from disaggd.engine.blocks import BlockPool
from disaggd.engine.engine import Engine, generate
from disaggd.engine.graphs import DecodeGraphs
from disaggd.engine.kv_repack import KVUnpacker, make_unpacker
from disaggd.engine.patterns import PatternMemory, RankPatterns
from disaggd.engine.ranks import STEP_TIMEOUT_S, Beside, Followers, RankOrder, RanksUnpacker
from disaggd.engine.runner import ModelRunner
from disaggd.engine.scheduler import Limits
from disaggd.engine.step_cost import StepPace
from disaggd.engine.stream import DeviceStream
from disaggd.errors import ConfigError, ResourceError
from disaggd.log import StartProgress, start_progress
from disaggd.model.directory import ModelDirectory, open_directory
from disaggd.model.kv import allocate_kv
from disaggd.model.parallel import ProcessRanks, meeting_place, part_of
from disaggd.model.spec import Dtype, ModelSpec, Weights
from disaggd.model.transformer import Transformer
from disaggd.model.weights import load_weights
from disaggd.prefix import PrefixHasher
from disaggd.sampling import SamplingParams
from disaggd.transfer.layout import KVSpec, PoolPlace, in_fp8, kv_spec
from disaggd.transfer.source import staging_blocks

_POOL_SHARE = 0.9
"""Of the memory that the weights leave free on a GPU: the rest is for activations, logits and captured graphs."""


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """An engine, and what it was made of."""

    engine: Engine
    runner: ModelRunner
    """The engine's."""
    directory: ModelDirectory
    spec: ModelSpec
    kv_spec: KVSpec
    """Of the KV of all ranks."""
    kv: Tensor
    """[layers, num_blocks, kv_heads, 2, block_size, head_dim]: the pool; of several ranks the first one's heads."""
    stream: DeviceStream
    followers: Followers | None = None
    """The other ranks, if there are any."""
    unpacker: KVUnpacker | RanksUnpacker | None = None
    """Where KV lands, in fp8; None: in `kv`."""

    @property
    def patterns(self) -> RankPatterns:
        """What the pool is checked with."""
        return RankPatterns(PatternMemory(self.kv, range(self.kv.shape[2])), self.followers)

    @property
    def place(self) -> PoolPlace:
        """Where `kv` lies."""
        return PoolPlace(self.kv.data_ptr(), self.engine.pool.num_blocks)


def load_engine(config: Config, node: NodeConfig, beside: Beside | None = None, *, lands_in_fp8: bool = False) -> LoadedEngine:
    """The engine that the file describes for `node`, with progress bars on a terminal. Raises DisaggdError.

    `beside` runs in the process of every rank but the first. `lands_in_fp8`: KV that comes from elsewhere does.
    """
    with start_progress(config.model.served_name) as progress:
        return build_engine(
            config.model.path,
            dtype=config.model.dtype,
            weights=config.model.weights,
            device=node.device,
            kv_cache_bytes=node.kv_cache_bytes,
            block_size=node.block_size,
            max_step_tokens=node.max_step_tokens,
            max_sequences=node.max_sequences,
            max_model_len=config.model.max_model_len,
            layer_group=config.transfer.layer_group,
            tp=node.tp,
            beside=beside,
            fp8_staging=config.transfer.staging if lands_in_fp8 else None,
            prefix_cache=node.prefix_cache,
            itl_target_ms=config.disaggregation.itl_target_ms,
            progress=progress,
        )


def build_engine(
    path: str,
    *,
    dtype: Dtype | Literal["auto"] = "auto",
    weights: Weights = "auto",
    device: str = "cpu",
    kv_cache_bytes: int | None,
    block_size: int,
    max_step_tokens: int,
    max_sequences: int,
    max_model_len: int | None = None,
    layer_group: int = 4,
    itl_target_ms: float | None = None,
    prefix_cache: bool = False,
    tp: int = 1,
    beside: Beside | None = None,
    fp8_staging: int | None = None,
    progress: StartProgress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> LoadedEngine:
    """Load the model at `path` and make an engine for it, ready to serve. `max_model_len` None: the model's own.

    `kv_cache_bytes` None, on a GPU only: what the weights leave free, less a tenth for the work itself. `tp` ranks compute it, each but
    the first in a process of its own. `fp8_staging`: bytes, of all ranks together, for KV that lands in fp8; None: it lands in the pool.
    `clock`: seconds, to time steps by.

    What cannot be is found before the weights are read: ModelError, ConfigError, or ResourceError for missing memory or
    a missing device.
    """
    progress = progress or StartProgress(None, path)
    directory = open_directory(path)
    spec = directory.spec(dtype)
    layout = kv_spec(spec, block_size)
    limits = Limits(max_step_tokens, max_sequences, _model_len(spec, max_model_len))
    limits.check(block_size)
    where = _device(device)
    stream = DeviceStream(where)
    stream.enter()
    kv: Tensor | None = None
    followers: Followers | None = None
    fp8_blocks: int | None = None
    if fp8_staging is not None:
        assert kv_cache_bytes is not None, "the config refuses KV that lands in fp8 on other devices than CPUs"
        fp8_blocks = staging_blocks(
            in_fp8(layout),
            fp8_staging,
            pool_blocks=_num_blocks(layout, kv_cache_bytes),
            max_step_tokens=max_step_tokens,
            layer_group=layer_group,
        )
    if tp > 1:
        assert kv_cache_bytes is not None, "the config refuses ranks on other devices than CPUs"
        kv, transformer, followers = _with_others(
            directory, spec, where, weights, block_size, kv_cache_bytes, fp8_blocks, tp, beside, progress
        )
    else:
        if kv_cache_bytes is not None:
            kv = allocate_kv(layout, _num_blocks(layout, kv_cache_bytes), where)
        with _memory_shortage_on(where, "the weights"):
            transformer = load_weights(directory, spec, where, progress.loading, weights)
    transformer.layer_group = layer_group
    if kv is None:
        kv = allocate_kv(layout, _num_blocks(layout, int(torch.cuda.mem_get_info(where)[0] * _POOL_SHARE)), where)
    hasher = PrefixHasher(directory.served_id(weights), layout.dtype, block_size) if prefix_cache else None
    pool = BlockPool(kv.shape[1], block_size, hasher)
    pace = StepPace(None if itl_target_ms is None else itl_target_ms / 1e3, clock)
    runner = _runner(transformer, kv, limits, progress, followers)
    engine = Engine(runner, pool, limits, spec.eos_token_ids, pace)
    if where.type == "cuda":
        warm_up(engine, where)
    return LoadedEngine(engine, runner, directory, spec, layout, kv, stream, followers, _unpacker(spec, kv, fp8_blocks, followers))


def _unpacker(spec: ModelSpec, kv: Tensor, fp8_blocks: int | None, followers: Followers | None) -> KVUnpacker | RanksUnpacker | None:
    if fp8_blocks is None:
        return None
    first = make_unpacker(kv, kv_spec(spec, kv.shape[4], kv.shape[2]), fp8_blocks)
    return first if followers is None else RanksUnpacker(first, followers)


def _with_others(
    directory: ModelDirectory,
    spec: ModelSpec,
    where: torch.device,
    weights: Weights,
    block_size: int,
    kv_cache_bytes: int,
    fp8_blocks: int | None,
    tp: int,
    beside: Beside | None,
    progress: StartProgress,
) -> tuple[Tensor, Transformer, Followers]:
    """The first rank's KV and part of the model, and the other ranks, which are loaded at the same time."""
    part = part_of(spec, 0, tp)
    num_blocks = _num_blocks(kv_spec(spec, block_size), kv_cache_bytes)
    kv = allocate_kv(kv_spec(spec, block_size, len(part.kv_heads)), num_blocks, where)
    place = meeting_place()
    order = RankOrder(
        rank=0,
        num_ranks=tp,
        port=place.port,
        path=str(directory.root),
        dtype=spec.dtype,
        weights=weights,
        device=str(where),
        block_size=block_size,
        num_blocks=num_blocks,
        fp8_blocks=fp8_blocks,
        step_timeout_s=STEP_TIMEOUT_S,
    )
    followers = Followers([msgspec.structs.replace(order, rank=rank) for rank in range(1, tp)], beside)
    try:
        followers.wait()
        ranks = ProcessRanks(0, tp, place, STEP_TIMEOUT_S)
        transformer = load_weights(directory, spec, where, progress.loading, weights, part, ranks)
        followers.wait()
    except BaseException:
        followers.close()
        raise
    return kv, transformer, followers


def _runner(
    transformer: Transformer, kv: Tensor, limits: Limits, progress: StartProgress, followers: Followers | None = None
) -> ModelRunner:
    """On a GPU with its decode steps captured."""
    if not kv.is_cuda:
        return ModelRunner(transformer, kv, limits.max_step_tokens, followers=followers)
    num_blocks, block_size = kv.shape[1], kv.shape[4]
    graphs = DecodeGraphs(
        transformer,
        kv,
        max_sequences=limits.max_sequences,
        max_blocks=min(num_blocks, -(-limits.max_model_len // block_size)),
        max_rows=limits.max_step_tokens,
    )
    with _memory_shortage_on(kv.device, "captured decode steps: lower kv_cache"):
        graphs.capture(progress.capturing)
    return ModelRunner(transformer, kv, limits.max_step_tokens, graphs)


def warm_up(engine: Engine, where: torch.device) -> None:
    """Run the longest prefill step and each way to sample once: kernels are compiled, and memory is found missing, before requests come."""
    longest = min(engine.limits.max_step_tokens, engine.context_limit - 2)
    ways = (SamplingParams(temperature=0.0), SamplingParams(top_k=20, top_p=0.9, top_logprobs=5, presence_penalty=0.1))
    with _memory_shortage_on(where, "a step's work: lower kv_cache or max_step_tokens"):
        for sampling in ways:
            limited = msgspec.structs.replace(sampling, max_tokens=2, ignore_eos=True)
            for _ in generate(engine, [0] * longest, limited):
                pass
            engine.pool.clear()  # else the next has nothing to compute


@contextmanager
def _memory_shortage_on(where: torch.device, what: str) -> Iterator[None]:
    """That the device has no memory left in the body is a ResourceError that says for `what`."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise ResourceError(f"device {where}: no memory is left for {what} ({error})") from error


def _model_len(spec: ModelSpec, wanted: int | None) -> int:
    limit = spec.max_position_embeddings
    if wanted is not None and wanted > limit:
        raise ConfigError(f"max_model_len: {wanted} is more than the model's {limit} positions")
    return wanted or limit


def _num_blocks(layout: KVSpec, kv_cache_bytes: int) -> int:
    if kv_cache_bytes < layout.bytes_per_block:
        raise ConfigError(f"kv_cache: {kv_cache_bytes:,} bytes do not hold one block of {layout.bytes_per_block:,}")
    return kv_cache_bytes // layout.bytes_per_block


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if not (device.index or 0) < torch.cuda.device_count():
        raise ResourceError(f"device {name}: this host has {torch.cuda.device_count()} CUDA devices that torch can use")
    return torch.device("cuda", device.index or 0)
