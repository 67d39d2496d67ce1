"""Decode nodes without an engine: they speak the link protocol and send tokens at a given pace. Started by `router.py`.

argv: the file descriptor of a pipe. The first message is a `Stub`; then, for each run, a `Pace`, answered once all its streams
are here, and the word to begin, answered by `Sent` once all have had all their tokens. Times are of CLOCK_REALTIME, as the
kernel's are that they are compared with. One asyncio thread serves all nodes; all it sends in a run is built before it.
"""

import asyncio
import gc
import logging
import random
import sys
import time
from functools import partial
from multiprocessing.connection import Connection

import msgspec
import uvloop

from disaggd.cluster.hello import PROTOCOL_VERSION, NodeHello, RouterHello
from disaggd.cluster.link import NodeLink, serve_links
from disaggd.cluster.link_settings import LinkSettings
from disaggd.cluster.protocol import Decided, Generate, TokenRun, Tokens, ToNode, unpack_tokens
from disaggd.ids import Incarnation, NodeName
from disaggd.sampling import FinishReason
from disaggd.transfer.layout import KVSpec
from disaggd.units import Address

NUM_BLOCKS = 1_000_000
"""No request is ever refused for want of room."""


class Stub(msgspec.Struct, frozen=True, kw_only=True):
    """What the nodes say of themselves."""

    names: tuple[str, ...]
    addresses: tuple[str, ...]
    model_id: str
    kv: KVSpec
    vocab_size: int
    max_model_len: int


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    num_streams: int
    num_tokens: int
    """For each stream."""
    step_s: float
    """Between two frames of a node; each brings every stream of it one token."""


class Sent(msgspec.Struct, frozen=True, kw_only=True):
    stamps_s: list[list[float]]
    """Of each node's frames: the k-th carried the k-th token of all its streams."""
    node_of_stream: dict[int, int]
    """The stream's number is its prompt's first token."""
    late_s: list[float]
    """How late each frame of any node was sent."""


class StubNode:
    """One decode node: the streams of the run that were placed here."""

    def __init__(self, number: int, stub: Stub) -> None:
        self.number = number
        self.streams: dict[int, Generate] = {}
        self.stamps_s: list[float] = []
        self.late_s: list[float] = []
        self._stub = stub
        self._link: NodeLink | None = None
        self._words = [random.Random(number).randrange(1, stub.vocab_size) for _ in range(997)]  # coprime to any batch of streams

    def hello(self, _: RouterHello) -> NodeHello:
        stub = self._stub
        name, incarnation = NodeName(stub.names[self.number]), Incarnation(f"stub-{self.number}")
        return NodeHello(PROTOCOL_VERSION, name, "decode", incarnation, stub.model_id, stub.kv, NUM_BLOCKS, stub.max_model_len)

    def up(self, link: NodeLink) -> None:
        self._link = link

    def accept(self, frame: Generate) -> None:
        assert self._link is not None
        self.streams[unpack_tokens(frame.tokens)[0]] = frame
        self._link.send(Decided(frame.seq, frame.attempt, "threshold: short", 0))

    def frames(self, pace: Pace) -> list[Tokens]:
        """One for each step."""
        finish: list[FinishReason | None] = [*([None] * (pace.num_tokens - 1)), "length"]
        return [self._frame(index, reason) for index, reason in enumerate(finish)]

    def _frame(self, index: int, finish: FinishReason | None) -> Tokens:
        words = self._words
        return Tokens(
            tuple(
                TokenRun(frame.seq, frame.attempt, index, (words[(index + stream) % len(words)],), None, finish)
                for stream, frame in self.streams.items()
            )
        )

    async def run(self, frames: list[Tokens], step_s: float, begin_s: float) -> None:
        assert self._link is not None
        self.stamps_s, self.late_s = [], []
        for index, frame in enumerate(frames):
            due_s = begin_s + index * step_s
            await asyncio.sleep(max(0.0, due_s - time.time()))
            now_s = time.time()
            self._link.send(frame)
            self.stamps_s.append(now_s)
            self.late_s.append(now_s - due_s)
        self.streams.clear()


class StubNodes:
    """All nodes of the process, and the run they are in."""

    def __init__(self, stub: Stub) -> None:
        self._stub = stub
        self.nodes = [StubNode(number, stub) for number in range(len(stub.names))]
        self._pace: Pace | None = None
        self._is_full = asyncio.Event()

    async def listen(self) -> None:
        for node, address in zip(self.nodes, self._stub.addresses, strict=True):
            await serve_links(
                Address(address),
                hello=node.hello,
                on_up=node.up,
                on_frame=partial(self._on_frame, node),
                on_down=lambda link, reason: None,
                settings=LinkSettings(),
            )

    def _on_frame(self, node: StubNode, link: NodeLink, frame: ToNode) -> None:
        if isinstance(frame, Generate):
            node.accept(frame)
            self._note_if_full()

    async def gather(self, pace: Pace) -> None:
        """Until the streams are here; some, or all, may have been quicker than the pace."""
        self._pace = pace
        self._is_full.clear()
        self._note_if_full()
        await self._is_full.wait()

    def _note_if_full(self) -> None:
        if self._pace is not None and sum(len(node.streams) for node in self.nodes) == self._pace.num_streams:
            self._is_full.set()

    async def run(self, pace: Pace) -> Sent:
        """Send; the nodes' steps are spread evenly over a step's time."""
        node_of_stream = {stream: node.number for node in self.nodes for stream in node.streams}
        frames = [node.frames(pace) for node in self.nodes]
        gc.freeze()
        begin_s = time.time() + 0.05
        offset_s = pace.step_s / len(self.nodes)
        async with asyncio.TaskGroup() as group:
            for node in self.nodes:
                group.create_task(node.run(frames[node.number], pace.step_s, begin_s + node.number * offset_s))
        gc.unfreeze()
        return Sent(
            stamps_s=[node.stamps_s for node in self.nodes],
            node_of_stream=node_of_stream,
            late_s=[late_s for node in self.nodes for late_s in node.late_s],
        )


async def serve(connection: Connection) -> None:
    loop = asyncio.get_running_loop()
    nodes = StubNodes(connection.recv())
    await nodes.listen()
    connection.send(None)
    while True:
        pace = await loop.run_in_executor(None, connection.recv)
        await nodes.gather(pace)
        connection.send(None)
        await loop.run_in_executor(None, connection.recv)
        connection.send(await nodes.run(pace))


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # the router's leaving is no news
    with Connection(int(sys.argv[1])) as pipe:
        uvloop.run(serve(pipe))
