"""An engine from what the config says: the model's files, the KV pool's memory, the limits. Knows nothing of roles."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import msgspec
import torch

from disaggd.config import Config, NodeConfig
from disaggd.engine.blocks import BlockPool
from disaggd.engine.engine import Engine
from disaggd.engine.patterns import PatternMemory, RankPatterns
from disaggd.engine.rank import NoOthers, Others, Rank, load_rank, memory_shortage_on, num_blocks_in
from disaggd.engine.rank_orders import Beside, HostMemory, RankOrder
from disaggd.engine.ranks import STEP_TIMEOUT_S, Companions, Followers, RanksLanding
from disaggd.engine.runner import ModelRunner
from disaggd.engine.scheduler import Chunk, Limits, StepPlan
from disaggd.engine.sequence import Sequence
from disaggd.engine.step_cost import StepPace
from disaggd.engine.stream import DeviceStream
from disaggd.errors import ConfigError, ResourceError
from disaggd.ids import SeqId
from disaggd.log import StartProgress, start_progress
from disaggd.model.directory import ModelDirectory, open_directory
from disaggd.model.parallel import meeting_place, part_of
from disaggd.model.spec import Dtype, ModelSpec, Weights
from disaggd.prefix import PrefixHasher
from disaggd.sampling import SamplingParams
from disaggd.transfer.landing_memory import LandingMemory
from disaggd.transfer.layout import KVSpec, kv_spec

NO_HOST_MEMORY = HostMemory()

OnRankLost = Callable[[ResourceError], None]

WAYS_TO_SAMPLE = (
    SamplingParams(temperature=0.0),
    SamplingParams(),
    SamplingParams(top_k=20),
    SamplingParams(top_p=0.9),
    SamplingParams(top_k=20, top_p=0.9, top_logprobs=5, presence_penalty=0.1),
)
"""A kernel is compiled for each mixture of top-k and top-p."""


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
    rank: Rank
    """The first one, which is of this process: its pool, and what its KV goes through."""
    stream: DeviceStream
    followers: Followers | None = None
    """The other ranks, if there are any."""

    def close(self) -> None:
        """Nothing is computed any more: the other ranks end, and what the ranks have in common. Idempotent."""
        self.runner.close()

    @property
    def patterns(self) -> RankPatterns:
        """What the pool is checked with."""
        kv = self.rank.kv
        return RankPatterns(PatternMemory(kv, range(kv.shape[2])), self.followers)

    @property
    def landing(self) -> LandingMemory | None:
        """What peers write in place of the pool, if they do, on all ranks."""
        first = self.rank.landing
        return first if first is None or self.followers is None else RanksLanding(first, self.followers)


def load_engine(
    config: Config,
    node: NodeConfig,
    beside: Beside | None = None,
    memory: HostMemory = NO_HOST_MEMORY,
    on_rank_lost: OnRankLost | None = None,
) -> LoadedEngine:
    """The engine that the file describes for `node`, with progress bars on a terminal. Raises DisaggdError.

    `beside` runs in the process of every rank but the first. `memory` is for KV that comes from elsewhere, or goes there. `on_rank_lost`
    is called when another rank has ended, from the start on, on any thread. On GPUs an alarm ends the process 3 s after that: a device may
    wait for such a rank for ever, and a thread for the device.
    """
    _check_devices(node)
    with start_progress(config.model.served_name) as progress:
        return build_engine(
            config.model.path,
            dtype=config.model.dtype,
            weights=config.model.weights,
            devices=node.rank_devices,
            kv_cache_bytes=node.kv_cache_bytes,
            block_size=node.block_size,
            max_step_tokens=node.max_step_tokens,
            max_sequences=node.max_sequences,
            max_model_len=config.model.max_model_len,
            layer_group=config.transfer.layer_group,
            beside=beside,
            memory=memory,
            on_rank_lost=on_rank_lost,
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
    devices: tuple[str, ...] | None = None,
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
    memory: HostMemory = NO_HOST_MEMORY,
    on_rank_lost: OnRankLost | None = None,
    progress: StartProgress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> LoadedEngine:
    """Load the model at `path` and make an engine for it, ready to serve. `max_model_len` None: the model's own.

    `kv_cache_bytes` are of all ranks; None, on GPUs only: what the weights leave free, less a tenth for the work itself. One rank on each
    of `devices`, or `tp` on `device`, computes it, each but the first in a process of its own. `memory`, `beside`, `on_rank_lost`: see
    `load_engine`. `clock`: seconds, to time steps by.

    What cannot be is found before the weights are read: ModelError, ConfigError, or ResourceError for missing memory or
    a missing device.
    """
    progress = progress or StartProgress(None, path)
    directory = open_directory(path)
    spec = directory.spec(dtype)
    layout = kv_spec(spec, block_size)
    limits = Limits(max_step_tokens, max_sequences, _model_len(spec, max_model_len))
    limits.check(block_size)
    wheres = [_device(name) for name in devices or (device,) * tp]
    part_of(spec, 0, len(wheres))
    stream = DeviceStream(wheres[0])
    stream.enter()
    place = meeting_place() if len(wheres) > 1 else None
    order = RankOrder(
        rank=0,
        num_ranks=len(wheres),
        port=None if place is None else place.port,
        path=str(directory.root),
        dtype=spec.dtype,
        weights=weights,
        device=str(wheres[0]),
        block_size=block_size,
        num_blocks=None if kv_cache_bytes is None else num_blocks_in(layout, kv_cache_bytes, len(wheres)),
        max_step_tokens=max_step_tokens,
        max_sequences=max_sequences,
        max_model_len=limits.max_model_len,
        layer_group=layer_group,
        memory=memory,
        step_timeout_s=STEP_TIMEOUT_S,
    )
    followers: Followers | None = None
    if place is not None:
        orders = [msgspec.structs.replace(order, rank=number, device=str(where)) for number, where in enumerate(wheres[1:], 1)]
        followers = Followers(orders, beside)
        if on_rank_lost is not None:
            followers.watch(on_rank_lost)
    with _ended_by_trouble(followers):
        others: Others = NoOthers() if followers is None or place is None else Companions(order, place, followers)
        rank = load_rank(order, directory, spec, others, progress)
        hasher = PrefixHasher(directory.served_id(weights), layout.dtype, block_size) if prefix_cache else None
        pool = BlockPool(rank.kv.shape[1], block_size, hasher)
        pace = StepPace(None if itl_target_ms is None else itl_target_ms / 1e3, clock)
        runner = ModelRunner(rank.forward, followers)
        engine = Engine(runner, pool, limits, spec.eos_token_ids, pace)
        if wheres[0].type == "cuda":
            warm_up(engine, wheres[0])
    return LoadedEngine(
        engine=engine,
        runner=runner,
        directory=directory,
        spec=spec,
        kv_spec=layout,
        rank=rank,
        stream=stream,
        followers=followers,
    )


@contextmanager
def _ended_by_trouble(followers: Followers | None) -> Iterator[None]:
    """The body makes an engine together with the followers; what goes wrong with one of them is what went wrong. They are ended then."""
    try:
        yield
    except BaseException as error:
        if followers is None:
            raise
        trouble = followers.trouble() if isinstance(error, ResourceError) else None  # NCCL may not start for the want of one
        followers.close()
        if trouble is not None and trouble is not error:
            raise trouble from error
        raise


def warm_up(engine: Engine, where: torch.device) -> None:
    """Compute what requests will ask for, so that kernels are compiled, and memory is found missing, before they come.

    That is the longest prefill step, one of a context too short to be split, and a decode step with each way to sample. Nothing is learned
    of what they take, which is what compiling takes.
    """
    longest = min(engine.limits.max_step_tokens, engine.context_limit - 2)
    blocks = engine.pool.allocate(engine.pool.blocks_for(longest + 1))
    assert blocks is not None, "the pool is empty at the start"

    def rehearse(num_prompt_tokens: int, start: int, end: int, sampling: SamplingParams) -> None:
        sequence = Sequence(SeqId("warm-up"), [0] * (longest + 1), sampling, num_prompt_tokens=num_prompt_tokens)
        sequence.block_table = blocks[: engine.pool.blocks_for(end)]
        engine.rehearse(StepPlan((Chunk(sequence, start, end, samples=True),)), 1, learns=False)

    with memory_shortage_on(where, "a step's work: lower kv_cache or max_step_tokens"):
        for length in (longest, 2):
            rehearse(length, 0, length, WAYS_TO_SAMPLE[0])
        for sampling in WAYS_TO_SAMPLE:
            rehearse(longest, longest, longest + 1, sampling)
    engine.pool.release(blocks)


def _model_len(spec: ModelSpec, wanted: int | None) -> int:
    limit = spec.max_position_embeddings
    if wanted is not None and wanted > limit:
        raise ConfigError(f"max_model_len: {wanted} is more than the model's {limit} positions")
    return wanted or limit


def _check_devices(node: NodeConfig) -> None:
    """Raises ResourceError naming the one that is not there."""
    for device in node.rank_devices:
        try:
            _device(device)
        except ResourceError as error:
            raise ResourceError(f"node {node.name!r}: {'device' if node.devices is None else 'devices'}: {error}") from error


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if not (device.index or 0) < torch.cuda.device_count():
        raise ResourceError(f"device {name}: this host has {torch.cuda.device_count()} CUDA devices that torch can use")
    return torch.device("cuda", device.index or 0)
