"""What the file says of writes that are repacked, for one node; and whether its staging memory holds those to the file's other nodes."""

from collections.abc import Iterator

from disaggd.config import Config, NodeConfig
from disaggd.errors import ConfigError
from disaggd.model.spec import ModelSpec
from disaggd.transfer.layout import KVSpec, in_fp8, kv_spec
from disaggd.transfer.path import RepackSettings


def repack_settings(config: Config, node: NodeConfig) -> RepackSettings | None:
    """No write has more blocks than a step can fill. None: the node writes to nobody, and wants no memory for it, which a GPU's pins."""
    if node.role == "decode" and not config.pushes_prefixes(node):
        return None
    return RepackSettings(
        staging_bytes=config.transfer.staging,
        direct_slice_bytes=config.transfer.direct_slice_bytes,
        max_layers=config.transfer.layer_group,
        max_tokens=-(-node.max_step_tokens // node.block_size) * node.block_size,
    )


def check_repacking(config: Config, node: NodeConfig, spec: ModelSpec) -> None:
    """Raises ConfigError where a write to one of the file's nodes does not fit: the two could never hand over."""
    settings, kv = repack_settings(config, node), kv_spec(spec, node.block_size)
    if settings is None:
        return
    for target in _targets(config, node):
        try:
            settings.check(kv, node.tp, _landing_kv(config, target, spec), target.tp)
        except ConfigError as error:
            raise ConfigError(f"node {node.name!r}, which writes to {target.name!r}: {error}") from error


def _targets(config: Config, node: NodeConfig) -> Iterator[NodeConfig]:
    """Those that `node` writes to."""
    match node.role:
        case "prefill":
            yield from config.nodes_of("decode")
        case "decode" if config.pushes_prefixes(node):
            yield from filter(config.pushes_prefixes, config.nodes_of("prefill"))


def _landing_kv(config: Config, node: NodeConfig, spec: ModelSpec) -> KVSpec:
    kv = kv_spec(spec, node.block_size)
    return in_fp8(kv) if config.lands_in_fp8(node) else kv
