"""A cluster for those who have none yet: `1P1D` of CPU nodes, a core each, with model S, whose costs `costs.py` has."""

import re

from disaggd.config import Config, NodeConfig, Role
from disaggd.errors import ConfigError
from disaggd.ids import NodeName
from disaggd.model.spec import ModelSpec
from disaggd.units import Address, Size

MODEL_S = ModelSpec(
    family="qwen3",
    vocab_size=16_384,
    hidden_size=768,
    intermediate_size=2048,
    num_layers=12,
    num_heads=12,
    num_kv_heads=4,
    head_dim=64,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=40_960,
    tie_word_embeddings=True,
    qk_norm=True,
    dtype="bfloat16",
)
"""The shape that `bench/models.py` calls S."""

MAX_STEP_TOKENS = 512
MAX_NODES = 64
"""Of each role."""


def default_cluster(shape: str, kv_cache: Size) -> Config:
    """A router and the nodes of a shape such as `1P2D`, each with so many bytes of KV. Raises ConfigError."""
    match = re.fullmatch(r"(\d{1,3})P(\d{1,3})D", shape.upper())
    if match is None or int(match[2]) < 1 or max(int(match[1]), int(match[2])) > MAX_NODES:
        raise ConfigError(
            f"{shape!r} is no cluster: expected prefill and decode nodes, such as 1P2D, at least one and at most {MAX_NODES} D"
        )
    prefills = [_node(f"p{i}", "prefill", 8101 + i, kv_cache) for i in range(int(match[1]))]
    decodes = [_node(f"d{i}", "decode", 8201 + i, kv_cache) for i in range(int(match[2]))]
    return Config(nodes=(_node("router", "router", 8000, kv_cache), *prefills, *decodes))


def _node(name: str, role: Role, port: int, kv_cache: Size) -> NodeConfig:
    return NodeConfig(
        name=NodeName(name), role=role, listen=Address(f"127.0.0.1:{port}"), kv_cache=kv_cache, max_step_tokens=MAX_STEP_TOKENS
    )
