"""An engine from what the config says: the model's files, the KV pool's memory, the limits. Knows nothing of roles."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from disaggd.config import Config, NodeConfig
from disaggd.engine.blocks import BlockPool
from disaggd.engine.engine import Engine
from disaggd.engine.runner import ModelRunner
from disaggd.engine.scheduler import Limits
from disaggd.errors import ConfigError, ResourceError
from disaggd.log import loading_progress
from disaggd.model.directory import ModelDirectory, open_directory
from disaggd.model.kv import allocate_kv
from disaggd.model.spec import Dtype, ModelSpec
from disaggd.model.weights import load_weights
from disaggd.transfer.layout import KVSpec, kv_spec


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """An engine, and what it was made of."""

    engine: Engine
    directory: ModelDirectory
    spec: ModelSpec
    kv_spec: KVSpec
    kv: Tensor
    """[layers, num_blocks, kv_heads, 2, block_size, head_dim]: what other nodes' pushes write into."""


def load_engine(config: Config, node: NodeConfig) -> LoadedEngine:
    """The engine that the file describes for `node`, with a progress bar on a terminal. Raises DisaggdError."""
    with loading_progress(config.model.served_name) as progress:
        return build_engine(
            config.model.path,
            dtype=config.model.dtype,
            device=node.device,
            kv_cache_bytes=node.kv_cache,
            block_size=node.block_size,
            max_step_tokens=node.max_step_tokens,
            max_sequences=node.max_sequences,
            max_model_len=config.model.max_model_len,
            layer_group=config.transfer.layer_group,
            progress=progress,
        )


def build_engine(
    path: str,
    *,
    dtype: Dtype | Literal["auto"] = "auto",
    device: str = "cpu",
    kv_cache_bytes: int,
    block_size: int,
    max_step_tokens: int,
    max_sequences: int,
    max_model_len: int | None = None,
    layer_group: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedEngine:
    """Load the model at `path` and make an engine for it. `max_model_len` None: the model's own.

    What cannot be is found before the weights are read: ModelError, ConfigError, or ResourceError for missing memory or
    a missing device.
    """
    directory = open_directory(path)
    spec = directory.spec(dtype)
    layout = kv_spec(spec, block_size)
    limits = Limits(max_step_tokens, max_sequences, _model_len(spec, max_model_len))
    limits.check(block_size)
    pool = BlockPool(_num_blocks(layout, kv_cache_bytes), block_size)
    where = _device(device)
    kv = allocate_kv(layout, pool.num_blocks, where)
    transformer = load_weights(directory, spec, where, progress)
    transformer.layer_group = layer_group
    engine = Engine(ModelRunner(transformer, kv), pool, limits, spec.eos_token_ids)
    return LoadedEngine(engine, directory, spec, layout, kv)


def _model_len(spec: ModelSpec, wanted: int | None) -> int:
    limit = spec.max_position_embeddings
    if wanted is not None and wanted > limit:
        raise ConfigError(f"max_model_len: {wanted} is more than the model's {limit} positions")
    return wanted or limit


def _num_blocks(layout: KVSpec, kv_cache_bytes: int) -> int:
    num_blocks = kv_cache_bytes // layout.bytes_per_block
    if not num_blocks:
        raise ConfigError(f"kv_cache: {kv_cache_bytes:,} bytes do not hold one block of {layout.bytes_per_block:,}")
    return num_blocks


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise ResourceError(f"device {name}: this host has {torch.cuda.device_count()} CUDA devices that torch can use")
    return device
