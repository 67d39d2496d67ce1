"""`JointTransfers`: the transfer threads of all ranks of a node, spoken to as one.

Takes and posts what a single `TransferThread` does. A command goes to every rank; an answer is passed on when it is in from all of them, a
failure when the first one has it, and then the others need not go on. The agent of the node is one of each rank: it goes by the first
rank's id, and is whole for as long as none of them is fenced.

Whoever submits has its commands in every rank's inbox when `submit` returns: so no piece of a grant can come before its `Expect`. What the
ranks say is joined on a thread of its own, and nothing ever waits for that one: a rank that had to wait before it may speak would not
hear either.

What a push writes that the first rank's device may not have computed yet, the first rank is told at once, and asks. The others are told
when it is computed (`held_back.py`): the same thread looks.
"""

import logging
import queue
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import msgspec

from disaggd.ids import AgentId, BlockId, GrantToken, NodeName
from disaggd.transfer import messages as m
from disaggd.transfer.held_back import HeldBack
from disaggd.transfer.thread import TransferStats, TransferThread

log = logging.getLogger(__name__)

Post = Callable[[m.TransferEvent], None]

LOOK_EVERY_S = 5e-4
"""Whether a device has computed what is held back: a layer group takes a long prompt some milliseconds."""


class RankTransfers(Protocol):
    """One rank's transfer thread, in this process or another."""

    def start(self) -> None: ...
    def submit(self, command: m.TransferCommand) -> None: ...
    def stop(self) -> None: ...
    def stats(self) -> TransferStats: ...


@dataclass(slots=True)
class _Agent:
    """Of the node, for one peer."""

    opened: m.PairOpened
    unfenced: set[int]
    """Ranks whose agent is still there, for all that is known."""
    probed: set[int] = field(default_factory=set)
    """Ranks that the peer has reached, until it has reached all."""
    is_whole: bool = True
    """No rank's has been fenced, or is about to be."""

    def of(self, rank: int) -> AgentId:
        return self.opened.endpoints[rank].agent_id


@dataclass(slots=True)
class _Inlet:
    """For a peer that may write here: what each rank has opened that is not part of a node's agent yet."""

    command: m.OpenPair
    opened: dict[int, m.PairOpened] = field(default_factory=dict)


@dataclass(slots=True)
class _Connection:
    """To a peer that is written to."""

    agent_id: AgentId
    missing: set[int]
    """Ranks that have not sent their probe yet."""


@dataclass(slots=True)
class _Landing:
    agent_id: AgentId
    landed: dict[int, m.Landed] = field(default_factory=dict)


class JointTransfers:
    """`make_first` and `make_others` make the ranks' threads, and are given what each shall post to. `post` and `on_start` as for a
    `TransferThread`: this one asks the first rank's device too.

    `pulses` are the first rank's; the others' processes look after their own.
    """

    def __init__(
        self,
        make_first: Callable[[Post], TransferThread],
        make_others: Sequence[Callable[[Post], RankTransfers]],
        post: Post,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        self._heard: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        first = make_first(partial(self._hear, 0))
        self.pulses = first.pulses
        self._ranks: list[RankTransfers] = [first, *(make(partial(self._hear, rank)) for rank, make in enumerate(make_others, 1))]
        self._post = post
        self._on_start = on_start
        self._held_back = HeldBack(partial(self._tell_all, but=0))
        self._joining = threading.Lock()  # no owner: what is submitted must be in every inbox when the caller goes on
        self._inlets: dict[NodeName, _Inlet] = {}
        self._agents: dict[AgentId, _Agent] = {}
        self._landings: dict[GrantToken, _Landing] = {}
        self._connections: dict[NodeName, _Connection] = {}
        self._handles: defaultdict[tuple[GrantToken, tuple[BlockId, ...]], list[deque[int]]] = defaultdict(
            lambda: [deque() for _ in self._ranks]
        )
        """Bytes of those that have ended on some ranks, by rank. Handles of one push that read the same blocks stand for each other."""
        self._ends: defaultdict[GrantToken, dict[int, m.PushEnded]] = defaultdict(dict)
        self._thread = threading.Thread(target=self._main, name="joint transfers", daemon=True)

    def start(self) -> None:
        self._thread.start()
        for rank in self._ranks:
            rank.start()

    def stop(self) -> None:
        """End all ranks' threads. Raises `ResourceError` if one does not."""
        try:
            with self._joining:
                for rank in self._ranks:
                    rank.stop()
        finally:
            self._heard.put(None)
            self._thread.join()

    def stats(self) -> TransferStats:
        """Of all ranks together; fences are the first one's, for all have the same."""
        first, *others = [rank.stats() for rank in self._ranks]
        return TransferStats(
            num_agents=first.num_agents + sum(stats.num_agents for stats in others),
            num_fences=first.num_fences,
            num_dropped_notifications=first.num_dropped_notifications + sum(stats.num_dropped_notifications for stats in others),
            sent_bytes=first.sent_bytes + sum(stats.sent_bytes for stats in others),
            landed_bytes=first.landed_bytes + sum(stats.landed_bytes for stats in others),
        )

    def submit(self, command: m.TransferCommand) -> None:
        """Hand over a command, from any thread."""
        with self._joining:
            match command:
                case m.OpenPair():
                    self._open(command)
                case m.Expect():
                    self._expect(command)
                case m.Fence():
                    self._fence(command)
                case m.ConnectPair():
                    self._connections[command.peer] = _Connection(command.agent_id, set(range(len(self._ranks))))
                    self._tell_all(command)
                case m.PushBlocks() | m.FinishPush():
                    self._ranks[0].submit(command)
                    self._hold_back(command)
                case m.CancelPush(token):
                    self._cancel(token)
                case m.QuiesceByWire():
                    self._ranks[0].submit(command)
                case m.Forget(token):
                    self._landings.pop(token, None)
                    self._tell_all(command)
                case m.ClosePair(peer):
                    self._connections.pop(peer, None)
                    self._tell_all(command)
                case _:
                    self._tell_all(command)

    def _tell_all(self, command: m.TransferCommand, but: int | None = None) -> None:
        for number, rank in enumerate(self._ranks):
            if number != but:
                rank.submit(command)

    def _tell_each_its_own(self, command: m.Expect | m.Fence, agent: _Agent) -> None:
        for number, rank in enumerate(self._ranks):
            rank.submit(msgspec.structs.replace(command, agent_id=agent.of(number)))

    def _hear(self, rank: int, event: m.TransferEvent) -> None:
        self._heard.put(partial(self._join, rank, event))

    def _main(self) -> None:
        try:
            self._on_start()
            while (turn := self._next()) is not None:
                with self._joining:
                    turn()
                    self._held_back.look()
        except Exception as error:
            log.exception("what the ranks' transfer threads say cannot be joined")
            self._post(m.TransferFailed(error))

    def _next(self) -> Callable[[], None] | None:
        """What is to be done in the next turn."""
        try:
            return self._heard.get(timeout=None if self._held_back.is_empty else LOOK_EVERY_S)
        except queue.Empty:
            return _only_look

    def _join(self, rank: int, event: m.TransferEvent) -> None:
        match event:
            case m.PairOpened():
                self._opened(rank, event)
            case m.Fenced():
                self._fenced(rank, event)
            case m.PairProbed():
                self._probed(rank, event)
            case m.Landed():
                self._landed(rank, event)
            case m.LandingFailed():
                self._landing_failed(rank, event)
            case m.PairConnected():
                self._connected(rank, event)
            case m.PairFailed():
                self._pair_failed(rank, event)
            case m.HandleDone():
                self._handle_done(rank, event)
            case m.PushEnded():
                self._push_ended(rank, event)
            case _:
                self._post(event)

    # ── receiving ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _agent_of(self, peer: NodeName, rank: int, agent_id: AgentId) -> _Agent | None:
        """The node's agent that this one of a rank is part of."""
        return next((agent for agent in self._agents.values() if agent.opened.peer == peer and agent.of(rank) == agent_id), None)

    def _open(self, command: m.OpenPair) -> None:
        inlet = self._inlets.setdefault(command.peer, _Inlet(command))
        for agent in self._agents.values():
            if agent.opened.peer == command.peer and agent.is_whole:
                if inlet.command == command:
                    return self._post(agent.opened)
                agent.is_whole = False
        inlet.command = command
        return self._tell_all(command)

    def _opened(self, rank: int, event: m.PairOpened) -> None:
        if self._agent_of(event.peer, rank, event.agent_id) is not None:
            return  # said again
        inlet = self._inlets[event.peer]
        inlet.opened[rank] = event
        parts = [part for _, part in sorted(inlet.opened.items()) if part.peer_incarnation == inlet.command.peer_incarnation]
        if len(parts) < len(self._ranks):
            return
        opened = m.PairOpened(event.peer, event.peer_incarnation, tuple(part.endpoints[0] for part in parts))
        self._agents[opened.agent_id] = _Agent(opened, set(range(len(self._ranks))))
        inlet.opened.clear()
        self._post(opened)

    def _fence(self, command: m.Fence) -> None:
        agent = self._agents.get(command.agent_id)
        if agent is None:
            return self._post(m.Fenced(command.peer, command.agent_id))
        agent.is_whole = False
        return self._tell_each_its_own(command, agent)

    def _fenced(self, rank: int, event: m.Fenced) -> None:
        agent = self._agent_of(event.peer, rank, event.agent_id)
        if agent is None:
            inlet = self._inlets[event.peer]
            if rank in inlet.opened and inlet.opened[rank].agent_id == event.agent_id:
                del inlet.opened[rank]  # it never was part of one
            return
        agent.unfenced.discard(rank)
        if agent.is_whole:  # nobody asked for it: this part was of an earlier agent, and the others would wait for ever for one like theirs
            agent.is_whole = False
            for number in agent.unfenced:
                self._ranks[number].submit(m.Fence(event.peer, agent.of(number)))
        self._landings = {token: landing for token, landing in self._landings.items() if landing.agent_id != agent.opened.agent_id}
        if not agent.unfenced:
            del self._agents[agent.opened.agent_id]
            self._post(m.Fenced(event.peer, agent.opened.agent_id))

    def _probed(self, rank: int, event: m.PairProbed) -> None:
        agent = self._agent_of(event.peer, rank, event.agent_id)
        if agent is None or not agent.is_whole:
            return
        agent.probed.add(rank)
        if len(agent.probed) == len(self._ranks):
            agent.probed.clear()
            self._post(m.PairProbed(event.peer, agent.opened.agent_id))

    def _expect(self, command: m.Expect) -> None:
        agent = self._agents.get(command.agent_id)
        if agent is None or not agent.is_whole:
            return  # it is being fenced, which its owner hears next
        self._landings[command.token] = _Landing(command.agent_id)
        self._tell_each_its_own(command, agent)

    def _landed(self, rank: int, event: m.Landed) -> None:
        landing = self._landings.get(event.token)
        if landing is None:
            return
        landing.landed[rank] = event
        if len(landing.landed) < len(self._ranks):
            return
        del self._landings[event.token]
        parts = landing.landed
        self._post(m.Landed(event.token, parts[0].first, sum(part.kv_bytes for part in parts.values()), parts[0].num_verified))

    def _landing_failed(self, rank: int, event: m.LandingFailed) -> None:
        if self._landings.pop(event.token, None) is not None:
            self._tell_all(m.Forget(event.token), but=rank)
            self._post(event)

    # ── sending ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _hold_back(self, command: m.PushBlocks | m.FinishPush) -> None:
        was_empty = self._held_back.is_empty
        self._held_back.add(command)
        if command.token in self._ends:  # given up: nobody waits for it to be computed
            self._held_back.give_up(command.token)
        if was_empty and not self._held_back.is_empty:
            self._heard.put(_only_look)  # the thread may be waiting for what the ranks say, for as long as that takes

    def _cancel(self, token: GrantToken, but: int | None = None) -> None:
        self._held_back.give_up(token)
        self._tell_all(m.CancelPush(token), but)

    def _connected(self, rank: int, event: m.PairConnected) -> None:
        connection = self._connections.get(event.peer)
        if connection is None or connection.agent_id != event.agent_id or rank not in connection.missing:
            return
        connection.missing.discard(rank)
        if not connection.missing:
            self._post(event)

    def _pair_failed(self, rank: int, event: m.PairFailed) -> None:
        """The other ranks write nothing more there either: their pushes could only end half done."""
        connection = self._connections.get(event.peer)
        if connection is None or connection.agent_id != event.agent_id:
            return
        del self._connections[event.peer]
        self._tell_all(m.ClosePair(event.peer), but=rank)
        self._post(event)

    def _handle_done(self, rank: int, event: m.HandleDone) -> None:
        key = event.token, event.source
        ranks = self._handles[key]
        ranks[rank].append(event.kv_bytes)
        if not all(ranks):
            return
        self._post(m.HandleDone(event.token, event.source, sum(done.popleft() for done in ranks)))
        if not any(ranks):
            del self._handles[key]
            self._end_if_over(event.token)

    def _push_ended(self, rank: int, event: m.PushEnded) -> None:
        ends = self._ends[event.token]
        if not ends and not (event.clean and event.finished):
            self._cancel(event.token, but=rank)
        ends[rank] = event
        self._end_if_over(event.token)

    def _end_if_over(self, token: GrantToken) -> None:
        """Once all ranks have ended it and answered its writes: the others are told of some after their end, which were held back."""
        ends = self._ends.get(token, {})
        if len(ends) < len(self._ranks) or any(written == token for written, _ in self._handles):
            return
        del self._ends[token]
        parts = ends.values()
        self._post(
            m.PushEnded(
                token=token,
                clean=all(part.clean for part in parts),
                finished=all(part.finished for part in parts),
                kv_bytes=sum(part.kv_bytes for part in parts),
                first_post_at=min((part.first_post_at for part in parts if part.first_post_at is not None), default=None),
                last_done_at=max((part.last_done_at for part in parts if part.last_done_at is not None), default=None),
                sent=tuple(sent for _, part in sorted(ends.items()) for sent in part.sent),
            )
        )


def _only_look() -> None:
    """What is held back is looked at in every turn."""
