"""A small cluster in virtual time whose every figure can be worked out by hand."""

from collections.abc import Iterable, Sequence

import msgspec

from disaggd.config import Config, parse_config
from disaggd.model.spec import ModelSpec
from disaggd.simulator.cluster import Client, Setup, SimulatedCluster
from disaggd.simulator.costs import Costs, LinkCosts
from disaggd.simulator.policies import with_policy
from disaggd.simulator.traces import Lengths
from disaggd.simulator.wire import Rate

SPEC = ModelSpec(
    family="llama",
    vocab_size=100,
    hidden_size=8,
    intermediate_size=8,
    num_layers=2,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    dtype="float32",
)
"""A block of four tokens has 256 bytes in each of two layers."""

NO_STEP_COSTS = {
    "base_ms": 10.0,
    "per_sequence_ms": 0.0,
    "per_context_token_us": 0.0,
    "per_prefill_token_us": 1000.0,
    "per_prefill_token_context_ns": 0.0,
    "per_sent_mb_ms": 0.0,
    "per_received_mb_ms": 0.0,
}
"""A step takes 10 ms, and 1 ms for each prompt token in it."""

COSTS = Costs(link=LinkCosts(frame_ms=1.0, kv_mbit_per_s=512 * 8 / 3e-3 / 1e6, kv_latency_ms=2.0), every=NO_STEP_COSTS)
"""512 bytes take 3 ms on the wire, and are there 2 ms later."""


def small_config(
    policy: str,
    *,
    prefills: int = 1,
    decodes: int = 1,
    num_blocks: int = 64,
    prefill_block: int = 4,
    decode_block: int = 4,
    kv_overcommit: float = 1000.0,
    more: str = "",
) -> Config:
    """By default nothing is refused for want of memory, however much waits for it. `num_blocks` of four tokens."""
    nodes = [("router", "router", "")]
    for role, count, block_size in (("prefill", prefills, prefill_block), ("decode", decodes, decode_block)):
        keys = f"kv_cache = {num_blocks * 512}\nblock_size = {block_size}\nmax_step_tokens = 64\nmax_sequences = 8"
        nodes += [(f"{role[0]}{i}", role, keys) for i in range(count)]
    tables = [
        f'[[node]]\nname = "{name}"\nrole = "{role}"\nlisten = "127.0.0.1:{8000 + i}"\n{keys}' for i, (name, role, keys) in enumerate(nodes)
    ]
    config = parse_config("\n".join([more, *tables]))
    router = msgspec.structs.replace(config.router, kv_overcommit=kv_overcommit)
    return with_policy(msgspec.structs.replace(config, router=router), policy)


def small_setup(policy: str, *, costs: Costs = COSTS, rate_changes: Iterable[Rate] = (), **config: object) -> Setup:
    made = small_config(policy, **config)  # type: ignore[arg-type]
    return Setup(config=made, spec=SPEC, costs=costs, block=8, rate_changes=tuple(rate_changes))


def replay(setup: Setup, rows: Sequence[Lengths]) -> tuple[list[Client], SimulatedCluster]:
    cluster = SimulatedCluster(setup)
    return cluster.replay(rows), cluster


def felt_ms(client: Client) -> list[float]:
    """When each token came, in milliseconds since the request did."""
    return [round((at - client.arrived_at) * 1e3, 6) for at in client.tokens_at]


def with_costs(**every: float) -> Costs:
    return msgspec.structs.replace(COSTS, every={**NO_STEP_COSTS, **every})
