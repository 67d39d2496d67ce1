"""One end of a reshaped write: a process with a NIXL agent. Started by `reshape.py`, which calls its methods.

argv: the file descriptor of a pipe, and `cpu`. The first message is a range of ports; then `(method, arguments)`, each answered. Times are
of CLOCK_MONOTONIC, which all processes of a host share, in every namespace.
"""

import sys
import time
import zlib
from multiprocessing.connection import Connection

import msgspec
import numpy as np
import torch
from reshape_cells import Cell, Opened

from disaggd.engine.kv_repack import KVRepacker
from disaggd.ids import AgentId
from disaggd.kernels import cpu_ops
from disaggd.model.kv import allocate_kv
from disaggd.transfer.agent import Agent, AgentMaker
from disaggd.transfer.layout import PoolPlace, Span
from disaggd.transfer.outgoing import MAX_WORKED_BYTES
from disaggd.transfer.pool import Descriptors, Indices, Pool, Region, Rows
from disaggd.transfer.ports import PortRange
from disaggd.transfer.repack import Repacked, StagingRoom
from disaggd.transfer.reshape import shard_of, slices
from disaggd.transfer.source import InPlaceCut, Source

POLL_S = 50e-6
"""As the transfer thread does while something is in flight."""
TIMEOUT_S = 60.0
STAGING_BYTES = 256 << 20


class Runs(msgspec.Struct, frozen=True):
    """Runs of memory of any lengths, in place of `Descriptors`."""

    found: Rows

    def rows(self) -> Rows:
        return self.found


class Way(msgspec.Struct, frozen=True):
    """To write a cell: an agent that is connected for it, and by layer what is read and written."""

    agent: Agent
    source: Source | None
    """None: of the runs that the block sizes cut both sides into, each a descriptor; layer by layer."""
    targets: list[Indices]


class ReshapeNode:
    """Either end; which methods are called makes it the sender or the receiver."""

    def __init__(self, ports: tuple[int, int]) -> None:
        self._make_agent = AgentMaker(PortRange(*ports))
        self._cell: Cell | None = None
        self._agents: list[Agent] = []
        self._ways: dict[str, Way] = {}

    def close(self) -> None:
        """Of a cell."""
        self._ways.clear()
        for agent in self._agents:
            agent.destroy()
            agent.port.release()
        self._agents.clear()

    stop = close

    # ── receiving ────────────────────────────────────────────────────────────────────────────────────────────────────

    def open(self, cell: Cell) -> Opened:
        self._cell, num_blocks = cell, cell.target.blocks_for(cell.num_tokens)
        self._landed = torch.zeros(num_blocks * cell.theirs.held.bytes_per_block, dtype=torch.uint8)
        agent = self._new_agent([Region(self._landed.data_ptr(), self._landed.numel())])
        return Opened(agent.agent_id, agent.metadata, PoolPlace(self._landed.data_ptr(), num_blocks))

    def landed(self, num_messages: int) -> float:
        """When so many writes had arrived."""
        until = time.monotonic() + TIMEOUT_S
        while time.monotonic() < until:
            num_messages -= len(self._agents[0].notifications())
            if not num_messages:
                return time.monotonic()
            time.sleep(POLL_S)
        raise TimeoutError(f"{num_messages} writes have not arrived within {TIMEOUT_S:.0f} s")

    def digest(self) -> int:
        """Of what has landed, which is forgotten."""
        crc = zlib.crc32(self._landed.numpy())
        self._landed.zero_()
        return crc

    # ── sending ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def connect(self, cell: Cell, opened: Opened) -> None:
        self._cell = cell
        pool = Pool(PoolPlace(0, cell.source.blocks_for(cell.num_tokens)), cell.ours.held)
        self._kv = allocate_kv(pool.kv, pool.num_blocks, torch.device("cpu"))
        self._kv.copy_(torch.randn(self._kv.shape, generator=torch.Generator().manual_seed(0)))
        pool = Pool(PoolPlace(self._kv.data_ptr(), pool.num_blocks), cell.ours.held)
        repacker = KVRepacker(self._kv, cpu_ops(), STAGING_BYTES)
        heads, remote = cell.ours.local(cell.cut), Pool(opened.place, cell.theirs.held)
        theirs = remote.slices(cell.theirs.local(cell.cut))
        indices = [remote.indices(range(layer, layer + 1), cell.target_blocks) for layer in range(remote.kv.num_layers)]
        repacked = Repacked(repacker, StagingRoom(STAGING_BYTES), heads, cell.target)
        self._ways["repacked"] = self._way(opened, [repacker.region], repacked, theirs, indices)
        if cell.source.dtype != cell.target.dtype:
            return  # no bytes of the pool are to be the target's
        if cell.source.block_size == cell.target.block_size:
            self._ways["direct"] = self._way(opened, [pool.region], InPlaceCut(pool, heads), theirs, indices)
        else:
            self._ways["direct"] = self._way_of_runs(opened, pool, remote)

    def _way(self, opened: Opened, regions: list[Region], source: Source, targets: Descriptors, indices: list[Indices]) -> Way:
        agent = self._new_agent(regions)
        agent.connect(opened.agent_id, opened.metadata, source.registered, targets)
        return Way(agent, source, indices)

    def _way_of_runs(self, opened: Opened, pool: Pool, remote: Pool) -> Way:
        """Blocks of different sizes without repacking: a descriptor for each run of tokens of a head's keys, or values."""
        cell = self._cell
        assert cell is not None
        ours, theirs = (
            shard_of(kv, rank, ranks)
            for kv, rank, ranks in (
                (cell.source, cell.cut.source_rank, cell.num_sources),
                (cell.target, cell.cut.target_rank, cell.num_targets),
            )
        )
        plan = slices(cell.cut, ours, theirs, 0, cell.num_tokens)
        layers = np.arange(pool.kv.num_layers, dtype=np.int64)[:, None]
        from_blocks, to_blocks = np.array(cell.source_blocks)[plan.source_block], np.array(cell.target_blocks)[plan.target_block]
        sources = pool.place.address + (layers * pool.num_blocks + from_blocks) * ours.block_bytes + plan.source_offset
        targets = remote.place.address + (layers * remote.num_blocks + to_blocks) * theirs.block_bytes + plan.target_offset
        lengths = np.broadcast_to(plan.length, sources.shape)
        agent = self._new_agent([pool.region])
        agent.connect(opened.agent_id, opened.metadata, *(self._runs(starts, lengths) for starts in (sources, targets)))  # type: ignore[arg-type]
        return Way(agent, None, list(np.arange(sources.size, dtype=np.int32).reshape(sources.shape)))

    @staticmethod
    def _runs(starts: np.ndarray, lengths: np.ndarray) -> Runs:
        return Runs(np.stack([starts.ravel(), lengths.ravel(), np.zeros(starts.size, dtype=np.int64)], axis=1).astype(np.uint64))

    def _new_agent(self, regions: list[Region]) -> Agent:
        self._agents.append(self._make_agent(regions))
        return self._agents[-1]

    def write(self, name: str, agent_id: AgentId) -> tuple[float, float]:
        """All layers, a write each, as the transfer thread does it: when it began, and the processor seconds until all have ended."""
        assert self._cell is not None
        way, span = self._ways[name], Span(self._cell.source_blocks, 0, self._cell.num_tokens)
        cpu_s, began_s = time.process_time(), time.monotonic()
        loads, handles, worked_bytes = [], [], 0
        for layer, targets in enumerate(way.targets):
            sources = targets
            if way.source is not None:
                load = way.source.load(range(layer, layer + 1), span)
                assert load is not None, "the staging memory holds a cell"
                loads.append(load)
                sources, worked_bytes = load.indices, worked_bytes + load.made_bytes
            handles.append(way.agent.prepare(agent_id, sources, targets, b"written"))
            way.agent.post(handles[-1])
            if worked_bytes >= MAX_WORKED_BYTES:
                handles, worked_bytes = [handle for handle in handles if not way.agent.poll(handle)], 0
        while handles:
            handles = [handle for handle in handles if not way.agent.poll(handle)]
            time.sleep(POLL_S)
        for load in loads:
            assert way.source is not None
            way.source.unload(load)
        return began_s, time.process_time() - cpu_s


def main() -> None:
    torch.set_num_threads(1)
    with Connection(int(sys.argv[1])) as connection:
        node = ReshapeNode(connection.recv())
        connection.send(None)
        while call := connection.recv():
            name, arguments = call
            connection.send(getattr(node, name)(*arguments))
        node.stop()


if __name__ == "__main__":
    main()
