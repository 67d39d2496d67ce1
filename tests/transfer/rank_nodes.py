# ruff: noqa: E402
"""A process with two nodes of any number of ranks each, all of them threads here, and real NIXL between them. Driven by a test over a pipe.

Each node's KV is one array as a node of one rank would have it; its ranks have their heads of that. argv: the pipe's file descriptor,
first port, last port.
"""

import queue
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import numpy as np

sys.modules["torch"] = None  # type: ignore[assignment]  # NIXL would import all of it, 1.3 s, just to ask which CUDA it was built for

from disaggd.ids import AgentId, BlockId, GrantToken, Incarnation, NodeName
from disaggd.transfer import messages as m
from disaggd.transfer.joint import JointTransfers, Post
from disaggd.transfer.layout import KVGroup, KVSpec, PoolPlace, whole_blocks
from disaggd.transfer.notification import FirstToken
from disaggd.transfer.share import Share
from disaggd.transfer.thread import TransferThread

LAYERS, BLOCK_SIZE, HEAD_DIM = 3, 4, 8
HEAD_BYTES = 2 * BLOCK_SIZE * HEAD_DIM * 4
DEADLINE_S = 20.0
LEASE_S = 30.0
P, D = NodeName("p"), NodeName("d")

Event = TypeVar("Event", bound=m.TransferEvent)


def kv_of(kv_heads: int) -> KVSpec:
    group = KVGroup(layers=LAYERS, kv_heads=kv_heads, head_bytes=HEAD_BYTES)
    return KVSpec(dtype="float32", block_size=BLOCK_SIZE, head_dim=HEAD_DIM, groups=(group,))


class RankNode:
    """`pools`: [layers, blocks, the rank's heads, bytes of a head] of each rank."""

    def __init__(self, num_ranks: int, kv_heads: int, num_blocks: int, ports: tuple[int, int], seed: int) -> None:
        self.kv = kv_of(kv_heads)
        self.whole = np.random.default_rng(seed).integers(0, 256, (LAYERS, num_blocks, kv_heads, HEAD_BYTES), dtype=np.uint8)
        self.shares = [Share(self.kv, rank, num_ranks) for rank in range(num_ranks)]
        self.pools = [np.ascontiguousarray(self.of(share)) for share in self.shares]
        self.events: queue.SimpleQueue[m.TransferEvent] = queue.SimpleQueue()
        self.threads: list[TransferThread] = []

        def make(rank: int, post: Post) -> TransferThread:
            pool = self.pools[rank]
            place = PoolPlace(pool.ctypes.data, num_blocks)
            self.threads.append(TransferThread(place, pool.nbytes, self.kv, post, ports, rank=rank, num_ranks=num_ranks))
            return self.threads[-1]

        makers = [partial(make, rank) for rank in range(num_ranks)]
        self.transfers = makers[0](self.events.put) if num_ranks == 1 else JointTransfers(makers[0], makers[1:], self.events.put)
        self.transfers.start()

    def of(self, share: Share) -> np.ndarray:
        """What the rank should hold."""
        return self.whole[:, :, share.heads.start : share.heads.stop]

    def submit(self, *commands: m.TransferCommand) -> None:
        for command in commands:
            self.transfers.submit(command)

    def expect(self, kind: type[Event]) -> Event:
        """The next event of that kind; those before it are dropped."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            event = self.events.get(timeout=max(0.0, deadline - time.monotonic()))
            if isinstance(event, kind):
                return event

    def heard(self, within_s: float = 0.0) -> list[m.TransferEvent]:
        """What else has been said."""
        events = []
        deadline = time.monotonic() + within_s
        while True:
            try:
                events.append(self.events.get(timeout=max(0.001, deadline - time.monotonic())))
            except queue.Empty:
                return events


class Bench:
    """Answers the test's calls. `prefill` and `decode` are made anew by each `make`."""

    def __init__(self, ports: tuple[int, int]) -> None:
        self._ports = ports
        self.nodes: dict[str, RankNode] = {}

    def make(self, num_prefill: int, num_decode: int, kv_heads: int, num_blocks: int = 12) -> None:
        self.close()
        self.nodes = {
            "prefill": RankNode(num_prefill, kv_heads, num_blocks, self._ports, seed=1),
            "decode": RankNode(num_decode, kv_heads, num_blocks + 3, self._ports, seed=2),
        }

    def pair(self) -> AgentId:
        """The agent of the decode node that the prefill node has reached."""
        prefill, decode = self.nodes["prefill"], self.nodes["decode"]
        decode.submit(m.OpenPair(P, Incarnation("one"), len(prefill.shares)))
        opened = decode.expect(m.PairOpened)
        assert len(opened.endpoints) == len(decode.shares)
        prefill.submit(m.ConnectPair(D, Incarnation("one"), opened.endpoints, decode.kv))
        prefill.expect(m.PairConnected)
        assert decode.expect(m.PairProbed) == m.PairProbed(P, opened.agent_id)
        return opened.agent_id

    def push(
        self, token: GrantToken, agent_id: AgentId, source: Sequence[BlockId], target: Sequence[BlockId], verify: bool = False
    ) -> m.Landed:
        """Two writes of each block, one of them of all but the first layer; lands. What should be where is noted."""
        prefill, decode = self.nodes["prefill"], self.nodes["decode"]
        span, blocks = whole_blocks(tuple(source), BLOCK_SIZE), tuple(target)
        decode.submit(m.Expect(token, P, agent_id, len(blocks), verify=blocks if verify else ()))
        prefill.submit(
            m.BeginPush(token, D, agent_id, LEASE_S, verify),
            m.PushBlocks(token, range(1), span, blocks),
            m.PushBlocks(token, range(1, LAYERS), span, blocks),
            m.FinishPush(token, FirstToken(7)),
        )
        landed = decode.expect(m.Landed)
        decode.whole[:, list(target)] = prefill.whole[:, list(source)]
        return landed

    def num_wrong(self, name: str) -> int:
        """Bytes of any rank's pool that are not what they should be."""
        node = self.nodes[name]
        return sum(int((pool != node.of(share)).sum()) for pool, share in zip(node.pools, node.shares, strict=True))

    def spoil(self, name: str, rank: int, layer: int, block: BlockId, head: int) -> None:
        self.nodes[name].pools[rank][layer, block, head, 0] ^= 1

    def submit(self, name: str, *commands: m.TransferCommand) -> None:
        self.nodes[name].submit(*commands)

    def submit_to_rank(self, name: str, rank: int, *commands: m.TransferCommand) -> None:
        """Past what speaks for all: a rank that something happens to alone."""
        for command in commands:
            self.nodes[name].threads[rank].submit(command)

    def expect(self, name: str, kind: type[Event]) -> Event:
        return self.nodes[name].expect(kind)

    def heard(self, name: str, within_s: float = 0.0) -> list[m.TransferEvent]:
        return self.nodes[name].heard(within_s)

    def stats(self, name: str) -> object:
        return self.nodes[name].transfers.stats()

    def close(self) -> None:
        for node in self.nodes.values():
            node.transfers.stop()
        self.nodes = {}


def main() -> None:
    pipe, first, last = map(int, sys.argv[1:])
    with Connection(pipe) as connection:
        bench = Bench((first, last))
        calls: dict[str, Callable[..., Any]] = {name: getattr(bench, name) for name in dir(bench) if not name.startswith("_")}
        while call := connection.recv():
            name, arguments = call
            try:
                connection.send((True, calls[name](*arguments)))
            except Exception as error:  # noqa: BLE001  the test's to raise
                connection.send((False, error))
        bench.close()


if __name__ == "__main__":
    main()
