"""`ChaosCluster`: 2P2D whose router reaches every node through a proxy of ours, with KV on a wire of ours if we may have one."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from tests.chaos.schedule import Tempo
from tests.support.proxied import ProxiedCluster
from tests.support.territory import Wire

MAX_LOCAL_PREFILL_TOKENS = 128
NUM_BLOCKS = 120
"""Per node: a few of the longest prompts at once. Small, so that memory is soon all touched, and what grows then is a leak."""
REQUEST_TIMEOUT_S = 120.0


class ChaosCluster(ProxiedCluster):
    """Without a `wire` all of it is on loopback."""

    def __init__(self, directory: Path, tempo: Tempo, wire: Wire | None, bytes_per_block: int) -> None:
        super().__init__(
            directory,
            wire=wire,
            prefill=2,
            decode=2,
            nodes={"kv_cache": NUM_BLOCKS * bytes_per_block},
            router={"request_timeout_s": REQUEST_TIMEOUT_S, "receipts": 2000, "kv_overcommit": 100},
            disaggregation={"max_local_prefill_tokens": MAX_LOCAL_PREFILL_TOKENS, "max_prefill_queue": 64, "prefix_push": "always"},
            cluster={"heartbeat_s": tempo.heartbeat_s, "missed_heartbeats": tempo.missed_heartbeats, "drain_s": tempo.drain_s},
            transfer={
                "lease_s": tempo.lease_s,
                "quiesce_s": tempo.quiesce_s,
                "user_timeout_s": tempo.user_timeout_s,
            },
        )

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Started; ended whatever happens."""
        try:
            await asyncio.to_thread(self.start)
            yield
        finally:
            await asyncio.to_thread(self.close)

    async def view(self, client: httpx.AsyncClient) -> dict[str, Any] | None:
        """`GET /v1/cluster`; None while the router does not answer."""
        try:
            reply = await client.get(self.url + "/v1/cluster", timeout=2)
        except httpx.TransportError:
            return None
        return dict(reply.json()) if reply.status_code == 200 else None


def missing(view: dict[str, Any], hurt: frozenset[str]) -> list[str]:
    """What is not up of all that does not involve a victim in `hurt`: links and KV paths."""
    links = [f"link to {node['name']}" for node in view["nodes"] if node["link"] != "up" and node["name"] not in hurt]
    wanted = {
        ("pairs", "prefill", "decode"): [(p, d) for p in ("p0", "p1") for d in ("d0", "d1")],
        ("prefix_pairs", "decode", "prefill"): [(d, p) for p in ("p0", "p1") for d in ("d0", "d1")],
    }
    paths = []
    for (kind, writer, target), pairs in wanted.items():
        ready = {(pair[writer], pair[target]) for pair in view[kind] if pair["state"] == "ready"}
        paths += [f"{a} → {b}" for a, b in pairs if (a, b) not in ready and not hurt & {a, b, "wire"}]
    return links + paths


def incarnations(view: dict[str, Any]) -> dict[str, str]:
    """Of each process that the router knows, and its own."""
    return {"router": view["incarnation"], **{node["name"]: node["incarnation"] for node in view["nodes"] if "incarnation" in node}}


def held(view: dict[str, Any]) -> list[tuple[str, str]]:
    """What is not as it is in an idle cluster: the kind of finding, and its words."""
    wrong = [("idle", f"the router still has {view[key]} {key}") for key in ("requests", "prefill_queue") if view[key]]
    wrong += [("not_healed", lack) for lack in missing(view, frozenset())]
    for node in view["nodes"]:
        blocks = {state: count for state, count in node.get("blocks", {}).items() if count}
        if blocks.get("free", 0) + blocks.get("cached", 0) != NUM_BLOCKS or blocks.keys() - {"free", "cached"}:
            wrong.append(("blocks", f"{node['name']} has {blocks} of {NUM_BLOCKS} blocks"))
    return wrong
