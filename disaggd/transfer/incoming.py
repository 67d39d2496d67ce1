"""`Incoming`: the agents that peers write to, and the grants that are landing. Runs on the transfer thread.

One agent per peer node, all registering the same memory, so that one peer can be fenced without the others. All ranks of the peer
that have something for this one write to it. What counts is the agent at which a notification comes in, never what its sender calls
itself; which of the peer's ranks it says it is decides only what of a grant its bytes are.

An agent that cannot be made, because the network is down, is tried again every second: the peer has none to write to for so long.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from disaggd.ids import AgentId, GrantToken, NodeName
from disaggd.transfer.agent import Agent, NoAgent
from disaggd.transfer.checksum import Corrupt, Memory, Verification
from disaggd.transfer.endpoint import Endpoint
from disaggd.transfer.landing import Inconsistent, LandingSet
from disaggd.transfer.messages import (
    Expect,
    Fence,
    Fenced,
    Landed,
    LandingFailed,
    OpenPair,
    PairOpened,
    PairProbed,
    QuiescedByWire,
    TransferEvent,
)
from disaggd.transfer.notification import Connect, Piece, WireQuiesced, decode
from disaggd.transfer.pool import Pool
from disaggd.transfer.ports import Port
from disaggd.transfer.share import Share

log = logging.getLogger(__name__)

RETRY_S = 1.0
"""Pause before another attempt to make an agent."""


@dataclass(frozen=True, slots=True)
class _Pair:
    opened: OpenPair
    agent: Agent
    memories: dict[int, Memory]
    """What each rank of the peer writes, of those that write anything here."""
    probed: set[int] = field(default_factory=set)
    """Ranks whose probe has come in, until that of all has."""

    @property
    def peer(self) -> NodeName:
        return self.opened.peer

    def shares(self, num_descriptors: int) -> dict[int, int]:
        """The bytes that each rank brings of so many blocks of one layer."""
        return {rank: num_descriptors * memory.length for rank, memory in self.memories.items()}


class _Lack(msgspec.Struct, frozen=True):
    """An agent that should be there and could not be made."""

    opened: OpenPair
    retry_at: float


class _Landing(msgspec.Struct, frozen=True):
    agent_id: AgentId
    pieces: LandingSet
    verification: Verification | None
    num_blocks: int
    """That are verified."""


class Incoming:
    """Opens and fences agents, counts pieces into landings. Posts to the compute thread. `clock` is monotonic seconds.

    Peers write into `pool`, which holds this rank's `share` of the node's KV.
    """

    def __init__(
        self,
        share: Share,
        pool: Pool,
        open_agent: Callable[[], Agent],
        post: Callable[[TransferEvent], None],
        clock: Callable[[], float],
    ) -> None:
        self._share = share
        self._pool = pool
        self._open_agent = open_agent
        self._post = post
        self._clock = clock
        self._pairs: dict[NodeName, _Pair] = {}
        self._lacking: dict[NodeName, _Lack] = {}
        self._burnt: defaultdict[NodeName, list[Port]] = defaultdict(list)
        """Ports of fenced agents, kept from everybody until their peer has reached the present one: late metadata of theirs must
        reach nobody."""
        self._landings: dict[GrantToken, _Landing] = {}
        self.num_fences = 0
        self.num_dropped = 0
        self.landed_bytes = 0

    @property
    def num_agents(self) -> int:
        return len(self._pairs)

    @property
    def is_lacking(self) -> bool:
        """Whether an agent could not be made, and `retry` is to be called."""
        return bool(self._lacking)

    @property
    def is_expecting(self) -> bool:
        """Whether grants are out."""
        return bool(self._landings)

    @property
    def is_landing(self) -> bool:
        """Whether one of them has begun to land."""
        return any(landing.pieces.has_begun for landing in self._landings.values())

    # ── commands ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def open(self, command: OpenPair) -> None:
        pair = self._pairs.get(command.peer)
        if pair is not None and pair.opened == command:
            return self._announce(pair)
        if pair is not None:
            self._destroy(pair)
        return self._make(command)

    def expect(self, command: Expect) -> None:
        pair = self._pairs.get(command.peer)
        if pair is None or pair.agent.agent_id != command.agent_id:
            return  # it was fenced, which its owner hears next
        pieces = LandingSet(pair.shares(self._pool.kv.num_layers * command.num_blocks), command.brings_token)
        verification = Verification(self._pool, pair.memories, command.verify) if command.verify else None
        self._landings[command.token] = _Landing(command.agent_id, pieces, verification, len(command.verify))

    def forget(self, token: GrantToken) -> None:
        self._landings.pop(token, None)

    def fence(self, command: Fence) -> None:
        pair = self._pairs.get(command.peer)
        if pair is None or pair.agent.agent_id != command.agent_id:
            return self._post(Fenced(command.peer, command.agent_id))
        self._destroy(pair)
        return self._make(pair.opened)

    def retry(self) -> None:
        """Make the agents that could not be made before, where it is time to try again."""
        now = self._clock()
        for lack in [lack for lack in self._lacking.values() if now >= lack.retry_at]:
            self._make(lack.opened)

    def close(self, peer: NodeName) -> None:
        self._lacking.pop(peer, None)
        if pair := self._pairs.get(peer):
            self._destroy(pair)
        self._release_burnt(peer)

    def close_all(self) -> None:
        for peer in {*self._pairs, *self._lacking, *self._burnt}:
            self.close(peer)

    def _make(self, command: OpenPair) -> None:
        """Have an agent for the peer, now or when it can be had."""
        peer = command.peer
        try:
            agent = self._open_agent()
        except NoAgent as error:
            if peer not in self._lacking:
                log.warning("%s cannot write here for now, trying again: %s", peer, error)
            self._lacking[peer] = _Lack(command, self._clock() + RETRY_S)
            return
        self._lacking.pop(peer, None)
        cuts = self._share.cuts_from(command.num_ranks)
        memories = {cut.source_rank: Memory(self._pool.slices(self._share.local(cut))) for cut in cuts}
        pair = self._pairs[peer] = _Pair(command, agent, memories)
        self._announce(pair)

    def _destroy(self, pair: _Pair) -> None:
        """The fence. No agent stands behind the peer's name until the next one is made."""
        del self._pairs[pair.peer]
        agent_id = pair.agent.agent_id
        pair.agent.destroy()
        self._burnt[pair.peer].append(pair.agent.port)
        self.num_fences += 1
        self._landings = {token: landing for token, landing in self._landings.items() if landing.agent_id != agent_id}
        self._post(Fenced(pair.peer, agent_id))

    def _release_burnt(self, peer: NodeName) -> None:
        for port in self._burnt.pop(peer, ()):
            port.release()

    def _announce(self, pair: _Pair) -> None:
        endpoint = Endpoint(pair.agent.agent_id, pair.agent.metadata, self._pool.place, pair.agent.port.number)
        self._post(PairOpened(pair.peer, pair.opened.peer_incarnation, (endpoint,)))

    # ── notifications ────────────────────────────────────────────────────────────────────────────────────────────────

    def poll(self) -> list[tuple[AgentId, bytes]]:
        """Let bytes land, and fetch what notifications are in, with the agents they came in at."""
        return [(pair.agent.agent_id, raw) for pair in self._pairs.values() for raw in pair.agent.notifications()]

    def deliver(self, arrived: Iterable[tuple[AgentId, bytes]]) -> None:
        """Act on fetched notifications; those of an agent that was fenced meanwhile are dropped."""
        pairs = {pair.agent.agent_id: pair for pair in self._pairs.values()}
        for agent_id, raw in arrived:
            pair = pairs.get(agent_id)
            if pair is None or not self._heed(pair, raw):
                self.num_dropped += 1

    def _heed(self, pair: _Pair, raw: bytes) -> bool:
        """Whether the notification meant something here."""
        match decode(raw):
            case Connect(agent_id, rank) if agent_id == pair.agent.agent_id and rank in pair.memories:
                self._probed(pair, rank)
            case Piece() as piece:
                return self._land(pair, piece)
            case WireQuiesced(token, clean):
                self._post(QuiescedByWire(token, clean, pair.peer))
            case _:
                return False
        return True

    def _probed(self, pair: _Pair, rank: int) -> None:
        pair.probed.add(rank)
        if pair.probed == pair.memories.keys():
            pair.probed.clear()
            self._release_burnt(pair.peer)
            self._post(PairProbed(pair.peer, pair.agent.agent_id))

    def _land(self, pair: _Pair, piece: Piece) -> bool:
        landing = self._landings.get(piece.token)
        if landing is None or landing.agent_id != pair.agent.agent_id:
            return False
        try:
            if landing.verification is not None:
                landing.verification.check(piece)
            is_complete = landing.pieces.add(piece)
        except Inconsistent as error:
            self.forget(piece.token)
            self._post(LandingFailed(piece.token, str(error), error.num_blocks if isinstance(error, Corrupt) else 0))
            return True
        if is_complete:
            self.forget(piece.token)
            self.landed_bytes += landing.pieces.kv_bytes
            self._post(Landed(piece.token, landing.pieces.first, landing.pieces.kv_bytes, landing.num_blocks))
        return True
