"""`CopyingAgent`: stands where an `Agent` stands, and does at once what NIXL does: it copies runs of memory, by their addresses."""

import ctypes
from collections import Counter
from dataclasses import dataclass, field

from disaggd.ids import AgentId, HandleId
from disaggd.transfer.notification import Piece, decode
from disaggd.transfer.pool import Descriptors, Indices
from tests.support.scripted_agent import ScriptedPort


@dataclass
class CopyingAgent:
    """Of one rank. Writes into pools of this very process."""

    port: ScriptedPort = field(default_factory=ScriptedPort)
    kv_bytes: Counter[AgentId] = field(default_factory=Counter)
    """By agent of the target what pieces have said of themselves."""
    _remotes: dict[AgentId, tuple[Descriptors, Descriptors]] = field(default_factory=dict)
    _prepared: dict[HandleId, tuple[AgentId, Indices, Indices]] = field(default_factory=dict)

    def connect(self, agent_id: AgentId, metadata: bytes, sources: Descriptors, targets: Descriptors) -> None:
        assert sources.length == targets.length
        self._remotes[agent_id] = sources, targets

    def notify(self, agent_id: AgentId, message: bytes) -> None:
        assert agent_id in self._remotes

    def prepare(self, agent_id: AgentId, sources: Indices, targets: Indices, message: bytes) -> HandleId:
        piece = decode(message)
        assert isinstance(piece, Piece)
        self.kv_bytes[agent_id] += piece.kv_bytes
        handle = HandleId(len(self._prepared))
        self._prepared[handle] = agent_id, sources, targets
        return handle

    def post(self, handle: HandleId) -> None:
        agent_id, sources, targets = self._prepared[handle]
        ours, theirs = self._remotes[agent_id]
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            ctypes.memmove(_address(theirs, target), _address(ours, source), ours.length)

    def poll(self, handle: HandleId) -> bool:
        return handle in self._prepared

    def notifications(self) -> list[bytes]:
        return []

    def destroy(self) -> None:
        self._remotes.clear()


def _address(descriptors: Descriptors, index: int) -> int:
    """Where a run begins; it lies within its region."""
    offset = descriptors.offset + index * descriptors.stride
    assert 0 <= index < descriptors.count and offset + descriptors.length <= descriptors.region.num_bytes
    return descriptors.region.address + offset
