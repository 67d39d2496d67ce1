"""Which node takes a sequence or a job now, and what the router predicts of it. Runs on the router's loop; changes no node's account.

Gathers what `routing.py` chooses by: caches, loads, credits, measured speeds, conversations.
"""

from collections.abc import Iterable, Mapping

from disaggd.cluster.learning import Learning
from disaggd.cluster.offer import RemoteOffer
from disaggd.cluster.pairing import PairBook
from disaggd.cluster.peers import DecodePeer, Duty, PrefillPeer, able_to_decode
from disaggd.cluster.prefill_queue import Job, PrefillQueue
from disaggd.cluster.request import RoutedSequence
from disaggd.cluster.routing import (
    DecodeCandidate,
    PrefillCandidate,
    RoundRobin,
    RoutingWeights,
    SessionTable,
    choose_decode,
    choose_prefill,
    slowness,
)
from disaggd.ids import NodeName

MAX_SESSIONS = 10_000
"""Conversations whose node is remembered: about 2 MB."""

Cached = Mapping[NodeName, int]
"""Tokens of one sequence that each node has cached (`CacheBook.cached_tokens`)."""


class Placement:
    """Shares the dispatcher's peer tables, its pairs and its queue."""

    def __init__(
        self,
        prefills: dict[NodeName, PrefillPeer],
        decodes: dict[NodeName, DecodePeer],
        pairs: PairBook,
        queue: PrefillQueue,
        weights: RoutingWeights,
        learning: Learning,
        turns: RoundRobin | None = None,
    ) -> None:
        """`turns`: which decode node is next, in place of which is cheapest."""
        self._prefills = prefills
        self._decodes = decodes
        self._pairs = pairs
        self._queue = queue
        self._weights = weights
        self._learning = learning
        self._turns = turns
        self._sessions = SessionTable(MAX_SESSIONS)

    def decode_for(self, record: RoutedSequence, cached: Cached) -> DecodePeer:
        """The cheapest decode node, or the conversation's own. One must be able to (`able_to_decode`)."""
        session = record.request.session
        able = able_to_decode(self._decodes)
        slow = slowness({name: peer.step_s for name, peer in able.items()})
        candidates = [_decode_candidate(peer, record, cached[name], slow[name]) for name, peer in able.items()]
        if self._turns is not None:
            return self._decodes[self._turns.choose(candidates)]
        name = choose_decode(candidates, self._weights, self._sessions.node_of(session))
        self._sessions.remember(session, name)
        return self._decodes[name]

    def prefill_for(self, record: RoutedSequence, among: Iterable[PrefillPeer], cached: Cached, now: float) -> PrefillPeer | None:
        """Who of `among` would be through with the job first; None when there is nobody."""
        candidates = [
            PrefillCandidate(name=peer.name, backlog_s=peer.backlog_s(now), prefill_s=prefill_s(peer, record, cached)) for peer in among
        ]
        name = choose_prefill(candidates)
        return None if name is None else self._prefills[name]

    def offer(self, record: RoutedSequence, decode: DecodePeer, job: Job, cached: Cached, now: float) -> RemoteOffer | None:
        """What a prefill elsewhere would be, were it decided now; None when no prefill node reaches `decode`.

        A grant may be given at once if it is of use, nobody waits, and the prefill node has credit, which has to be held then.
        """
        reachable = self._pairs.reachable(decode.name)
        able = [peer for peer in reachable if peer.has_credit(record.num_tokens)] if not self._queue and record.num_remaining > 1 else []
        likely = self.prefill_for(record, able or reachable, cached, now)
        pair = None if likely is None else self._pairs.of(likely.name, decode.name)
        if likely is None or pair is None:
            return None
        others = {name: peer.remote_share for name, peer in self._decodes.items() if peer is not decode}
        delay = self._learning.delays.delay(now)
        backlog_s = likely.backlog_s(now, lambda node: others.get(node, 0.0))  # `decode` knows what it has decided; a lost one will not
        return RemoteOffer(
            likely.name,
            prefill_nodes=len(reachable),
            queue_depth=len(self._queue),
            queue_is_full=not record.has_place and not self._queue.has_room(record.num_tokens),
            wait_s=backlog_s + self._queue.work_ahead_s(job, now) / len(reachable),
            num_cached=cached[likely.name],
            prefill_cost=likely.prefill_cost,
            transfer_cost=pair.transfers.cost,
            may_grant=bool(able),
            num_decisions=decode.num_decisions,
            overhead_s=delay.overhead_s,
            slowness=delay.slowness,
        )

    def job(self, record: RoutedSequence, cached: Cached, ttft_target_s: float) -> Job:
        """The sequence's prompt as a job, predicted for the node that would compute it quickest."""
        return Job(
            seq=record.seq,
            arrived=record.timeline.arrived,
            num_tokens=record.num_tokens,
            ttft_target_s=ttft_target_s,
            prefill_s=min((prefill_s(peer, record, cached) for peer in self._prefills.values()), default=0.0),
            priority=record.request.priority,
        )

    def wait_s(self, job: Job, now: float) -> float:
        """Predicted, until a prefill node would begin with the job. With none that takes jobs there is no telling: 0.

        By arithmetic alone: how late first tokens were tells of hops and steps, by which a long wait is not made several times longer.
        """
        peers = [peer for peer in self._prefills.values() if peer.duty is Duty.SERVING]
        if not peers:
            return 0.0
        return (sum(peer.backlog_s(now) for peer in peers) + self._queue.work_ahead_s(job, now)) / len(peers)

    def has_room_elsewhere(self, record: RoutedSequence) -> bool:
        """Whether another decode node than its own has blocks for the sequence."""
        others = (peer for name, peer in self._decodes.items() if name != record.decode and peer.duty is Duty.SERVING)
        return any(not peer.lacks_room(record.num_tokens) for peer in others)


def prefill_s(peer: PrefillPeer, record: RoutedSequence, cached: Cached) -> float:
    """Predicted, for the sequence as it is now."""
    return peer.prefill_s(record.num_tokens - cached[peer.name], cached[peer.name])


def _decode_candidate(peer: DecodePeer, record: RoutedSequence, num_cached: int, slow: float) -> DecodeCandidate:
    return DecodeCandidate(
        name=peer.name,
        is_full=peer.lacks_room(record.num_tokens),
        uncached_tokens=record.num_tokens - num_cached,
        backlog_tokens=0 if peer.gauges is None else peer.gauges.prefill_backlog_tokens,
        load_tokens=peer.load_tokens,
        block_size=peer.hello.kv.block_size,
        slowness=slow,
    )
