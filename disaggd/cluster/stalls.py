"""`StallWatch`: requests that stand still, told once each, with their phase and whom they wait for. Runs on the router's loop.

A request moves when a token comes or its phase changes; and while the node that it waits for is seen to move:

    QUEUED       any job has left the queue, or a prefill node has computed some prompt tokens
    PREFILLING   its prefill node has computed some prompt tokens; then: renews the lease of its grant, which it pushes
    DECODING     before its first token: its decode node has computed some prompt tokens

In the other phases a node owes an answer that takes no computing. Gauges tell of prompt tokens only after each step: a step that takes
longer than a stall is one.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from disaggd.cluster.grant_relay import GrantRelay
from disaggd.cluster.peers import DecodePeer, Peer, PrefillPeer
from disaggd.cluster.prefill_queue import PrefillQueue
from disaggd.cluster.request import Phase, RoutedSequence
from disaggd.ids import NodeName, SeqId

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0


@dataclass(slots=True)
class _Seen:
    sign: object
    since: float
    is_told: bool = False


class StallWatch:
    """Shares the dispatcher's tables. `clock` is monotonic seconds."""

    def __init__(
        self,
        stall_s: float,
        prefills: dict[NodeName, PrefillPeer],
        decodes: dict[NodeName, DecodePeer],
        queue: PrefillQueue,
        grants: GrantRelay,
        clock: Callable[[], float],
    ) -> None:
        self.totals: Counter[str] = Counter()
        """Stalls since the start, by the value of their phase."""
        self._stall_s = stall_s
        self._prefills = prefills
        self._decodes = decodes
        self._queue = queue
        self._grants = grants
        self._clock = clock
        self._seen: dict[SeqId, _Seen] = {}
        self._look_at = 0.0

    @property
    def num_stalled(self) -> int:
        """Now."""
        return sum(seen.is_told for seen in self._seen.values())

    def tick(self, sequences: Iterable[RoutedSequence]) -> None:
        """Look at all that are not over, once in a while."""
        now = self._clock()
        if now < self._look_at:
            return
        self._look_at = now + LOOK_EVERY_S
        self._seen = {record.seq: self._look(record, now) for record in sequences}

    def _look(self, record: RoutedSequence, now: float) -> _Seen:
        sign, seen = self._sign(record), self._seen.get(record.seq)
        if seen is None or seen.sign != sign:
            if seen is not None and seen.is_told:
                log.info("%s: moves again, after %.0f s", record.request.id, now - seen.since)
            return _Seen(sign, now)
        if now - seen.since >= self._stall_s and not seen.is_told:
            seen.is_told = True
            self.totals[record.phase.value] += 1
            what = (record.request.id, self._stall_s, record.phase.value, self._awaited(record))
            log.warning("%s: has not moved for %g s: %s, waits for %s", *what)
        return seen

    def _sign(self, record: RoutedSequence) -> object:
        """What changes while the request moves."""
        own = (record.attempt, record.phase, len(record.sent))
        if record.phase is Phase.QUEUED:
            return *own, self._queue.num_left, *(_backlog(peer) for peer in self._prefills.values())
        if record.phase is Phase.PREFILLING and record.timeline.prefilled is None:
            return *own, _backlog(self._prefills.get(record.prefill) if record.prefill is not None else None)
        if record.phase is Phase.PREFILLING and record.grant is not None:
            return *own, self._grants.num_renewed(record.grant.token)
        if record.phase is Phase.DECODING and record.timeline.resumed is None:
            return *own, _backlog(self._decodes.get(record.decode) if record.decode is not None else None)
        return own

    def _awaited(self, record: RoutedSequence) -> str:
        if record.phase is Phase.QUEUED:
            decode = self._decodes.get(record.decode) if record.decode is not None else None
            return f"room at {record.decode}" if decode is not None and decode.is_full else "a prefill node"
        if record.phase is Phase.PREFILLING:
            pushes = record.timeline.prefilled is not None
            return f"its KV to get from {record.prefill} to {record.decode}" if pushes else f"{record.prefill}"
        return record.decode or "a decode node"


def _backlog(peer: Peer | None) -> int | None:
    """Prompt tokens that it has yet to compute, as it told last."""
    return None if peer is None or peer.gauges is None else peer.gauges.prefill_backlog_tokens
