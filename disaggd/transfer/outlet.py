"""`Outlet`: the agent that we write to one peer from, with a lane to each of its ranks that some of our heads go to.

Runs on the transfer thread, but for `Outlet.connect`, which has a thread of its own (`connecting.py`).
"""

from dataclasses import dataclass

from disaggd.ids import AgentId, BlockId, NodeName
from disaggd.transfer.agent import Agent, PeerLost
from disaggd.transfer.checksum import Memory
from disaggd.transfer.messages import ConnectPair, Leg
from disaggd.transfer.pool import Descriptors, Pool
from disaggd.transfer.share import Share
from disaggd.transfer.source import Source, Sources


@dataclass(slots=True)
class Lane:
    """To one rank of the peer."""

    leg: Leg
    agent_id: AgentId
    metadata: bytes
    remote: Pool
    targets: Descriptors
    """What is ours of each of the remote pool's blocks."""
    source: Source
    memory: Memory
    """Of what the source has NIXL read."""
    silent_s: float = 0.0
    """For so long no write to that rank has ended, while some were in flight."""

    @property
    def rank(self) -> int:
        """Of the peer's."""
        return self.leg.target_rank


@dataclass(slots=True)
class Outlet:
    peer: NodeName
    remote_id: AgentId
    """Of the peer as a whole."""
    agent: Agent
    lanes: tuple[Lane, ...]

    def connect(self) -> None:
        """Raises `PeerLost`."""
        for lane in self.lanes:
            self.agent.connect(lane.agent_id, lane.metadata, lane.source.registered, lane.targets)

    def holds(self, blocks: tuple[BlockId, ...]) -> bool:
        """Whether these are ids of blocks of every rank's pool."""
        return all(lane.remote.holds(blocks) for lane in self.lanes)


def lanes_to(command: ConnectPair, sources: Sources) -> tuple[Lane, ...]:
    """All that it says of the peer came over the wire. Raises `PeerLost` where that is not to be written to, ConfigError where
    nothing of ours ever can be."""
    agents = {endpoint.agent_id for endpoint in command.endpoints}
    if len(agents) < len(command.endpoints):
        raise PeerLost("two of its ranks have one agent")
    lanes = []
    for cut in sources.share.cuts_to(len(command.endpoints)):
        theirs, endpoint = Share(command.kv, cut.target_rank, len(command.endpoints)), command.endpoints[cut.target_rank]
        source = sources.of(cut, theirs)
        remote = Pool(endpoint.place, theirs.held)
        if not remote.can_be:
            raise PeerLost(f"no pool lies at {endpoint.place}")
        targets = remote.slices(theirs.local(cut))
        leg = Leg(cut.source_rank, cut.target_rank, cut.heads, source.path)
        lanes.append(Lane(leg, endpoint.agent_id, endpoint.metadata, remote, targets, source, Memory(source.registered)))
    return tuple(lanes)
