"""`disaggd check`: the resolved cluster as a table, and everything that can be refused without starting it.

What only another host can know, or what may be meant, is a warning. Reads the model's config and tokenizer, not its
weights; imports no torch.
"""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from disaggd.api_keys import KeyFile
from disaggd.config import Config, NodeConfig
from disaggd.errors import ConfigError, ModelError
from disaggd.gateway.tokenizer import read_tokenizer
from disaggd.launch import node_environment
from disaggd.model.directory import ModelDirectory, open_directory
from disaggd.model.spec import ModelSpec
from disaggd.roles.repacking import check_repacking
from disaggd.supervisor import is_local
from disaggd.tls import mutual_contexts, server_context
from disaggd.toml_file import naming
from disaggd.transfer.layout import KVSpec, in_fp8, kv_spec
from disaggd.transfer.share import block_bytes
from disaggd.transfer.source import staging_blocks

_COLUMNS = ("node", "role", "listens on", "device", "threads", "pool", "blocks", "tokens")
_NUMBERS = ("threads", "pool", "blocks", "tokens")
_PIPED_WIDTH = 200
"""Columns where there is no terminal to count them: no address is broken."""


def describe(path: Path, config: Config) -> None:
    """Prints what `config` comes to, and warnings. Raises ConfigError or ModelError for what no node could start with."""
    directory = open_directory(config.model.path)
    spec = directory.spec(config.model.dtype)
    read_tokenizer(directory.root, spec.vocab_size)
    with naming(path):
        _check_model_len(config, spec)
        _check_tls(config)
        for node in config.nodes:
            node_environment(config, node)
            _check_ranks(node, spec)
            _staging_blocks(config, node, spec)
            check_repacking(config, node, spec)
        facts = _facts(path, config, directory, spec)
        table = _nodes(config, spec)
    console = Console()
    if not console.is_terminal:
        console.width = _PIPED_WIDTH
    console.print(table)
    console.print(facts, soft_wrap=True)
    for warning in _warnings(config, spec):
        console.print(Text.assemble(("warning: ", "yellow"), warning), soft_wrap=True)


def _check_model_len(config: Config, spec: ModelSpec) -> None:
    wanted, limit = config.model.max_model_len, spec.max_position_embeddings
    if wanted is not None and wanted > limit:
        raise ConfigError(f"model.max_model_len: {wanted:,} is more than the model's own limit of {limit:,} tokens")


def _check_ranks(node: NodeConfig, spec: ModelSpec) -> None:
    try:
        spec.check_ranks(node.tp)
    except ModelError as error:
        raise ConfigError(f"node {node.name!r}: {error}") from error


def _check_tls(config: Config) -> None:
    """Opens the files as this host's nodes would; those of other hosts are there."""
    router, cluster = config.router, config.cluster
    if router.tls_cert is not None and router.tls_key is not None and any(is_local(node) for node in config.nodes_of("router")):
        server_context("router", router.tls_cert, router.tls_key)
    if cluster.tls_cert is not None and cluster.tls_key is not None and cluster.tls_ca is not None and any(map(is_local, config.nodes)):
        mutual_contexts("cluster", cluster.tls_cert, cluster.tls_key, cluster.tls_ca)


def _warnings(config: Config, spec: ModelSpec) -> Iterator[str]:
    """What a node of this host would stumble over; from elsewhere a loopback address, too, looks like one of this host."""
    for node in config.nodes:
        if config.exposed_without_keys(node):
            yield f"node {node.name!r}: anybody who reaches {node.listen} may use the cluster (router.api_keys)"
        if node.role != "router":
            yield from _small_pool(config, node, spec)
            yield from _small_staging(config, node, spec)
        if is_local(node):
            yield from _absent_cpus(node)
            yield from _absent_devices(config, node)


def _small_pool(config: Config, node: NodeConfig, spec: ModelSpec) -> Iterator[str]:
    blocks = num_blocks(node, kv_spec(spec, node.block_size))
    limit = config.model.max_model_len or spec.max_position_embeddings
    if blocks is not None and (tokens := blocks * node.block_size) < limit:
        yield f"node {node.name!r}: kv_cache holds {tokens:,} tokens, but one request may have {limit:,} (model.max_model_len)"


def _small_staging(config: Config, node: NodeConfig, spec: ModelSpec) -> Iterator[str]:
    """Only what a decode node receives must be there at once."""
    blocks = _staging_blocks(config, node, spec)
    limit = config.model.max_model_len or spec.max_position_embeddings
    if node.role == "decode" and blocks is not None and (tokens := blocks * node.block_size) < limit:
        yield (
            f"node {node.name!r}: transfer.staging holds {tokens:,} tokens: longer prompts are never prefilled elsewhere, and one request "
            f"may have {limit:,} (model.max_model_len)"
        )


def _absent_cpus(node: NodeConfig) -> Iterator[str]:
    usable = os.sched_getaffinity(0)
    if absent := sorted(set(node.cpus or ()) - usable):
        yield f"node {node.name!r}: cpus {absent} are not among those that a process may use here: {sorted(usable)}"


def _absent_devices(config: Config, node: NodeConfig) -> Iterator[str]:
    if node.role == "router":
        return
    here = [name for _, name in socket.if_nameindex()]
    for device in filter(None, config.transfer.devices.split(",")):
        if device not in here:
            yield f"node {node.name!r}: this host has no network device {device!r} (transfer.devices); it has {', '.join(here)}"


def num_blocks(node: NodeConfig, kv: KVSpec) -> int | None:
    """Blocks that fit the node's pool; None where only its device knows. Raises ConfigError if no block fits."""
    pool_bytes = node.kv_cache_bytes
    if pool_bytes is None:
        return None
    num_bytes = block_bytes(kv, node.tp)
    if pool_bytes < num_bytes:
        raise ConfigError(f"node {node.name!r}: kv_cache ({_size(pool_bytes)}) is less than one block ({_size(num_bytes)})")
    return pool_bytes // num_bytes


def _staging_blocks(config: Config, node: NodeConfig, spec: ModelSpec) -> int | None:
    """Blocks of the memory that a GPU's KV goes through, or that KV lands in in fp8; None for a node without. Raises ConfigError for too
    little."""
    lands_in_fp8 = config.lands_in_fp8(node)
    if not node.is_gpu and not lands_in_fp8:
        return None
    kv = kv_spec(spec, node.block_size)
    return staging_blocks(
        in_fp8(kv) if lands_in_fp8 else kv,
        config.transfer.staging,
        num_ranks=node.tp,
        pool_blocks=None,  # a pool that is smaller has a warning of its own
        max_step_tokens=node.max_step_tokens,
        layer_group=config.transfer.layer_group,
    )


def _nodes(config: Config, spec: ModelSpec) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in _NUMBERS else "left", overflow="fold")
    for node in config.nodes:
        table.add_row(node.name, node.role, node.listen, *_engine_cells(node, spec))
    return table


def _engine_cells(node: NodeConfig, spec: ModelSpec) -> tuple[str, ...]:
    if node.role == "router":
        return ()
    blocks, size = num_blocks(node, kv_spec(spec, node.block_size)), node.block_size
    threads = str(node.threads) if node.tp == 1 else f"{node.tp} ranks x {node.threads}"
    if node.cpus is not None:
        threads += f" on {','.join(map(str, node.cpus))}"
    device = node.device if node.devices is None else ", ".join(node.devices)
    if node.kv_cache_bytes is None or blocks is None:
        return device, threads, "what is free", f"? x {size}", "?"
    pool = _size(node.kv_cache_bytes) + (" of all ranks" if node.tp > 1 else "")
    return device, threads, pool, f"{blocks:,} x {size}", f"{blocks * size:,}"


def _facts(path: Path, config: Config, directory: ModelDirectory, spec: ModelSpec) -> Text:
    limit = config.model.max_model_len or spec.max_position_embeddings
    kind = f"{spec.family}, {spec.num_layers} layers, {_dtype(config, spec)}, {limit:,} tokens of context"
    facts = {
        "file": str(path),
        "model": f"{config.model.served_name} ({config.model.path}): {kind}",
        "model id": directory.served_id(config.model.weights),
        "policy": _policy(config),
        "transfer": _transfer(config),
        "clients": f"{config.router.scheme}, {_keys(config)}",
        "links": _links(config),
    }
    return Text("\n").join(Text.assemble((f"{name:<9}", "bold"), value) for name, value in facts.items())


def _keys(config: Config) -> str:
    if config.router.api_keys is None:
        return "no API keys"
    metrics = f"metrics for {'everybody' if config.router.metrics == 'open' else 'admins'}"
    if not any(is_local(node) for node in config.nodes_of("router")):
        return f"API keys of {config.router.api_keys}, {metrics}"
    count = len(KeyFile(config.router.api_keys).read())
    return f"{count} API key{'' if count == 1 else 's'}, {metrics}"


def _links(config: Config) -> str:
    secret = "shared secret" if config.cluster.secret else "no secret: loopback only"
    return f"heartbeat {config.cluster.heartbeat_s:g} s, {secret}, {'no TLS' if config.cluster.tls_cert is None else 'TLS'}"


def _dtype(config: Config, spec: ModelSpec) -> str:
    return spec.dtype if config.model.weights == "auto" else f"{spec.dtype} with {config.model.weights} weights"


def _transfer(config: Config) -> str:
    transfer = config.transfer
    shown = f"{transfer.transports} on {transfer.devices or 'loopback'}, ports {transfer.port_range}"
    if transfer.wire_dtype == "fp8":
        shown += ", in fp8 to decode nodes"
    if transfer.verify:
        shown += ", every block verified"
    return shown + f", a GPU's through {_size(transfer.staging)} of its host" if any(node.is_gpu for node in config.nodes) else shown


def _policy(config: Config) -> str:
    rules = config.disaggregation
    if rules.policy == "never" or not config.nodes_of("prefill"):
        return "every prompt is prefilled by its decode node"
    if rules.policy == "always":
        return "every prompt is prefilled by a prefill node"
    if rules.policy == "adaptive":
        return "each prompt is prefilled where that is predicted to cost least"
    return f"prompts over {rules.max_local_prefill_tokens} uncached tokens are prefilled by a prefill node"


def _size(num_bytes: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.4g} {unit}"
    return f"{num_bytes} B"
