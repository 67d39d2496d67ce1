"""`Checkup`: what a router says of its cluster's nodes and ways when it is asked to check them (`POST /v1/cluster/check`)."""

from typing import Literal

import msgspec

Verdict = Literal["ok", "wrong", "failed", "unchecked", "unreachable", "refused"]
"""Of a way: `ok`: what was written arrived as it was; `wrong`: it did not; `failed`: nobody can tell, for something broke under way;
`unchecked`: a node had no blocks free for it; `unreachable`: no connection; `refused`: the two nodes' KV cannot be each other's,
or the writer's `[transfer] staging` is too small."""


class NodeCheck(msgspec.Struct, frozen=True, kw_only=True):
    """One engine node of the file."""

    name: str
    role: str
    listen: str
    link: Literal["up", "down"]
    reason: str = ""
    """Why it is down."""


class RankWay(msgspec.Struct, frozen=True, kw_only=True):
    """Between one rank of the writer and one of the target."""

    writer_rank: int
    target_rank: int
    transport: str
    path: str
    kv_bytes: int
    """In one round."""
    rounds: int
    gb_per_s: float
    p99_ms: float
    """Of the rounds, from the first post to the end of the last write."""
    wrong: str = ""
    """What of it arrived wrong; empty if nothing did."""


class WayCheck(msgspec.Struct, frozen=True, kw_only=True):
    """From one node that writes KV to another."""

    writer: str
    target: str
    verdict: Verdict
    reason: str = ""
    """Empty if it is ok."""
    ranks: tuple[RankWay, ...] = ()
    """Those between which something went."""


class Checkup(msgspec.Struct, frozen=True, kw_only=True):
    """Of a whole cluster."""

    model: str
    router: str
    """By name."""
    ok: bool
    """Every node is linked, and every way is."""
    took_s: float
    nodes: tuple[NodeCheck, ...]
    ways: tuple[WayCheck, ...]
