"""Two real nodes of a cluster, and a stranger who knows how to greet and then says what makes no sense: thousands of frames to each."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import strategies as st
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from disaggd.cluster.handshake import Greeting, meet_node
from disaggd.cluster.hello import PROTOCOL_VERSION, RouterHello
from disaggd.cluster.link import LINK_PATH
from disaggd.cluster.protocol import Frame
from disaggd.config import NodeConfig
from disaggd.ids import Incarnation, NodeName
from disaggd.model.directory import open_directory
from disaggd.units import Address
from tests.fuzz.node_links import any_frames, sane_frames
from tests.fuzz.surface import Surface, fuzz
from tests.support.clusters import Cluster, Node, running, wait_until

pytestmark = [pytest.mark.process, pytest.mark.nightly]

FRAMES = 1000
HEALED_S = 60.0
"""Blocks that the stranger had granted are in quarantine for `quiesce_s`, and pairs that he broke are probed again every second."""


class Stranger:
    """Links to one node as a router does, as often as the node closes the link."""

    def __init__(self, node: Node) -> None:
        assert node.role in ("prefill", "decode")
        role: Any = node.role
        self._node = NodeConfig(name=NodeName(node.name), role=role, listen=Address(f"{node.host}:{node.port}"))
        self._runner = asyncio.Runner()
        self._socket: ClientConnection | None = None
        self.num_sent = 0
        self.num_links = 0

    def say(self, frame: Frame) -> None:
        self._runner.run(self._say(msgspec.msgpack.encode(frame)))

    async def _say(self, message: bytes) -> None:
        socket = self._socket or await self._link()
        try:
            await socket.send(message)
            self.num_sent += 1
        except ConnectionClosed:
            self._socket = None

    async def _link(self) -> ClientConnection:
        socket = self._socket = await connect(f"ws://{self._node.listen}{LINK_PATH}", proxy=None, compression=None, ping_interval=None)

        async def receive() -> bytes:
            return await socket.recv(decode=False)

        model_id = open_directory("builtin:tiny").served_id("auto")
        hello = RouterHello(PROTOCOL_VERSION, NodeName("stranger"), Incarnation("stranger"), model_id)
        await meet_node(Greeting(socket.send, receive, None), hello, self._node)
        self.num_links += 1
        return socket

    def leave(self) -> None:
        if self._socket is not None:
            self._runner.run(self._socket.close())
        self._runner.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with running(Cluster(tmp_path, transfer={"lease_s": 2, "quiesce_s": 3})) as cluster:
        yield cluster


def test_nodes_live_through_thousands_of_frames_that_make_no_sense(cluster: Cluster) -> None:
    frames = st.one_of(sane_frames, any_frames, any_frames)
    for name in ("p0", "d0"):
        stranger = Stranger(cluster.nodes[name])
        fuzz(Surface(f"frames to {name}", frames, stranger.say, FRAMES, 0), FRAMES, shrinks=False)
        assert stranger.num_sent >= FRAMES * 0.6, f"{stranger.num_sent} frames over {stranger.num_links} links"
        stranger.leave()
        assert cluster.is_running(name), cluster.tail(name)
    wait_until("all blocks are free again", lambda: has_all_blocks(cluster), HEALED_S, every_s=0.2)
    wait_until("prefill and decode are paired again", cluster.is_whole, HEALED_S, every_s=0.2)
    assert decision(cluster, 10) == "local"
    wait_until("a long prompt is prefilled elsewhere", lambda: decision(cluster, 300) == "remote", HEALED_S, every_s=0.2)
    for name in cluster.nodes:
        assert cluster.is_running(name) and "Traceback" not in cluster.log(name).read_text(), cluster.tail(name)


def decision(cluster: Cluster, length: int) -> object:
    """Where a prompt that nobody has cached is prefilled. Of a pair that a stranger had remade routers learn when they use it."""
    said = cluster.complete([random.randrange(100, 1000) for _ in range(length)], max_tokens=8, ignore_eos=True)
    assert said["usage"]["completion_tokens"] == 8
    return cluster.receipt(said["id"])["decision"]


def has_all_blocks(cluster: Cluster) -> bool:
    blocks = [node.get("blocks") for node in cluster.get("/v1/cluster").json()["nodes"]]
    return all(counts is not None and not sum(counts[state] for state in counts if state not in ("free", "cached")) for counts in blocks)
