"""What the machine takes: seconds of a step, of a frame, of a byte. Read from a TOML file, or the defaults below.

The defaults are model S (88 M parameters, bfloat16) on one core of an AMD EPYC with AVX512-BF16, as `bench/engine.py` and
`bench/served.py` measured it, and loopback TCP.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from disaggd.config import NodeConfig
from disaggd.engine.step_cost import StepLoad
from disaggd.toml_file import convert, naming, parse_toml, read_text

Time = Annotated[float, msgspec.Meta(ge=0)]


class StepCosts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One node's: a step takes the sum of what is in it."""

    base_ms: Annotated[float, msgspec.Meta(gt=0)] = 4.0
    """Reading the weights; with it alone a step would take time, so that virtual time always moves on."""
    per_sequence_ms: Time = 0.25
    """Of each sequence that decodes."""
    per_context_token_us: Time = 0.62
    """Of each token of KV that a decoding sequence reads."""
    per_prefill_token_us: Time = 345.0
    """Of each prompt token."""
    per_prefill_token_context_ns: Time = 76.0
    """Of each pair of a prompt token and a token that it attends to."""
    per_sent_mb_ms: Time = 0.4
    """Processor time that pushing a megabyte takes from the steps beside it; 0 where something else moves the bytes."""
    per_received_mb_ms: Time = 0.4
    """The same of a megabyte that lands."""

    def step_s(self, load: StepLoad) -> float:
        """Seconds to compute it."""
        return (
            self.base_ms * 1e-3
            + self.per_sequence_ms * 1e-3 * load.decodes
            + self.per_context_token_us * 1e-6 * load.decode_context
            + self.per_prefill_token_us * 1e-6 * load.prefill_tokens
            + self.per_prefill_token_context_ns * 1e-9 * load.prefill_context
        )


class LinkCosts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Between nodes."""

    frame_ms: Time = 0.5
    """From a node's sending a control frame to the router's acting on it, and the other way."""
    kv_mbit_per_s: Annotated[float, msgspec.Meta(gt=0)] = 20_000.0
    """KV, from each prefill node to each decode node."""
    kv_latency_ms: Time = 0.3
    """Of KV, its notifications and the thread that waits for them."""


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """The whole table."""

    link: LinkCosts = LinkCosts()
    every: Mapping[str, float] = {}
    by_role: Mapping[str, Mapping[str, float]] = {}
    by_node: Mapping[str, Mapping[str, float]] = {}

    def of(self, node: NodeConfig) -> StepCosts:
        """What its name says, else its role, else every node."""
        return msgspec.convert({**self.every, **self.by_role.get(node.role, {}), **self.by_node.get(node.name, {})}, StepCosts)


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[link]`, `[step]`, `[prefill]`, `[decode]`, `[node.NAME]`: a later table overrides single keys of those before."""

    link: LinkCosts = LinkCosts()
    step: dict[str, float] = {}
    prefill: dict[str, float] = {}
    decode: dict[str, float] = {}
    node: dict[str, dict[str, float]] = {}


def load_costs(path: Path) -> Costs:
    """Reads and checks the file at `path`. Raises ConfigError."""
    with naming(path):
        file = convert(parse_toml(read_text(path)), _File)
        tables: dict[str, Mapping[str, Any]] = {"step": file.step, "prefill": file.prefill, "decode": file.decode}
        for name, table in (*tables.items(), *((f"node.{name}", table) for name, table in file.node.items())):
            with naming(name):
                convert(dict(table), StepCosts)
    return Costs(link=file.link, every=file.step, by_role={"prefill": file.prefill, "decode": file.decode}, by_node=file.node)
