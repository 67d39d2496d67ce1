"""Every move of a sequence in the router: placed, queued, granted, forwarded, delivered, retried, ended.

Runs on the router's loop. `Dispatcher` calls these for what frames, links and clients bring; they call each other where one
move leads to the next. Knows nothing of frames from nodes: only of those that it sends.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from disaggd.cluster import protocol
from disaggd.cluster.credits import Credits
from disaggd.cluster.grant_relay import GrantRelay
from disaggd.cluster.offer import RemoteOffer
from disaggd.cluster.pairing import PairBook
from disaggd.cluster.peers import DecodePeer, PrefillPeer
from disaggd.cluster.prefill_queue import PrefillQueue
from disaggd.cluster.protocol import Grant, TokenRun, pack_tokens
from disaggd.cluster.request import Addressed, Phase, RoutedSequence
from disaggd.errors import RequestError, RequestFailed
from disaggd.ids import NodeName, SeqId
from disaggd.sampling import FinishReason, TokenLogprob

log = logging.getLogger(__name__)

DECODE_PATIENCE_S = 10.0
"""So long a request that lost the last decode node waits for one: a node that is restarted is back in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchRules:
    """What the configuration says."""

    max_retries: int = 2
    """So often a lost prefill is tried elsewhere; then the decode node does it."""
    grant_patience_s: float = 2.0
    """So long a job waits for room at its decode node before it may go to another."""
    request_timeout_s: float = 600.0
    max_prefill_queue: int = 16
    """Jobs that may wait; more are refused or prefilled locally."""
    ttft_target_s: float = 2.0


class Moves:
    """The sequences under way, the nodes that are up, and what happens between them.

    `on_update` is called with a sequence when it is done, as `Dispatcher` says. `clock` is monotonic seconds.
    """

    def __init__(self, rules: DispatchRules, clock: Callable[[], float], on_update: Callable[[RoutedSequence], None]) -> None:
        self.prefills: dict[NodeName, PrefillPeer] = {}
        self.decodes: dict[NodeName, DecodePeer] = {}
        self.pairs = PairBook(self.prefills, self.decodes)
        self.grants = GrantRelay(self.prefills, self.decodes)
        self.credits = Credits(self.prefills)
        self.queue = PrefillQueue()
        self.sequences: dict[SeqId, RoutedSequence] = {}
        """All that are not over."""
        self.dropped_frames: Counter[str] = Counter()
        self._rules = rules
        self._clock = clock
        self._on_update = on_update

    def place(self, record: RoutedSequence) -> None:
        """Give the sequence to the least loaded decode node that has room, with a first prefill node in view if nobody waits."""
        decode = min(self.decodes.values(), key=lambda peer: (peer.is_full, peer.load_tokens, peer.name))
        record.decode, record.prefill, record.grant, record.placed_tokens = decode.name, None, None, record.num_tokens
        decode.load_tokens += record.placed_tokens
        decode.send(
            protocol.Generate(
                record.seq,
                record.attempt,
                pack_tokens(record.tokens),
                len(record.request.prompt),
                record.request.sampling,
                record.request.cache_salt,
                "local" if record.forced_local else record.request.override,
                record.timeline.arrived + self._rules.ttft_target_s - self._clock(),
                self._offer(record, decode),
            )
        )

    def _offer(self, record: RoutedSequence, decode: DecodePeer) -> RemoteOffer | None:
        """What a prefill elsewhere would be; the credit of a node that may grant is held from now on."""
        reachable = self.pairs.reachable(decode.name)
        if not reachable:
            return None
        able = self.credits.choose(reachable, record) if not self.queue and record.num_remaining > 1 else None
        if able is not None:
            self.credits.take(record, able)
        likely = able or min(reachable, key=lambda peer: (sum(peer.jobs.values()), peer.name))
        depth = len(self.queue)
        return RemoteOffer(
            likely.name,
            prefill_nodes=len(reachable),
            queue_depth=depth,
            queue_is_full=depth >= self._rules.max_prefill_queue,
            wait_s=0.0,
            num_cached=0,
            prefill_cost=None,
            transfer_cost=None,
            may_grant=able is not None,
        )

    def enqueue(self, record: RoutedSequence) -> None:
        record.move(Phase.QUEUED)
        self.queue.push(record.seq, record.timeline.arrived)
        self.dispatch()

    def dispatch(self) -> None:
        """Give each waiting job, in order, to a prefill node that has credit and can reach the job's decode node.

        A job that only wants for credit holds back all behind it: short ones would else keep every node from falling
        idle for a long one.
        """
        for seq in self.queue:
            if seq not in self.queue:
                continue  # a retry below dispatched it already
            record = self.sequences[seq]
            assert record.decode is not None
            decode, reachable = self.decodes.get(record.decode), self.pairs.reachable(record.decode)
            if decode is None:
                continue  # its node is being lost right now: its retry is next
            if not reachable and self.patience_is_over(record):
                self.queue.discard(seq)
                reason = "cannot reach" if self.prefills else "is up to reach"
                self.again(record, f"no_prefill_node: none {reason} {record.decode}")
            elif decode.is_full and self.patience_is_over(record) and not all(peer.is_full for peer in self.decodes.values()):
                self.queue.discard(seq)
                self.again(record)
            elif reachable and not decode.is_full:
                prefill = self.credits.choose(reachable, record)
                if prefill is None:
                    return
                self.queue.discard(seq)
                self.start_job(record, prefill, decode)

    def start_job(self, record: RoutedSequence, prefill: PrefillPeer, decode: DecodePeer) -> None:
        self.credits.take(record, prefill)
        if record.num_remaining > 1:
            record.move(Phase.GRANTING)
            decode.send(protocol.RequestGrant(record.seq, record.attempt, prefill.name))
        else:  # the prefill node samples the only token: nothing is to be pushed
            self.forward(record, prefill, None)

    def patience_is_over(self, record: RoutedSequence) -> bool:
        """Whether the job should stop waiting for its decode node: to be reached by a prefill node that is up, or to have room."""
        assert record.timeline.queued is not None
        return not self.prefills or self._clock() - record.timeline.queued > self._rules.grant_patience_s

    def forward(self, record: RoutedSequence, prefill: PrefillPeer, grant: Grant | None) -> None:
        """The blocks are reserved (None: none are needed): the job goes to the prefill node."""
        record.move(Phase.PREFILLING)
        record.timeline.dispatched = self._clock()
        if grant is not None:
            self.grants.forwarded(record.job, grant, prefill)
        self.credits.take(record, prefill)
        record.grant = grant
        prefill.send(
            protocol.Prefill(
                record.seq,
                record.attempt,
                pack_tokens(record.tokens),
                len(record.request.prompt),
                record.request.sampling,
                record.request.cache_salt,
                grant,
            )
        )

    def landed(self, record: RoutedSequence) -> None:
        """The KV is at decode."""
        if record.phase in (Phase.PREFILLING, Phase.ARBITRATION):
            record.move(Phase.DECODING)
            record.timeline.landed = self._clock()

    def run(self, run: TokenRun) -> None:
        record = self.current(run)
        if record is None:
            return self.drop(run)
        self.landed(record)
        return self.deliver(record, run.start, run.tokens, run.logprobs, run.finish_reason)

    def deliver(
        self,
        record: RoutedSequence,
        start: int,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...] | None,
        finish: FinishReason | None,
    ) -> None:
        """Pass on what the client does not have yet: prefill and decode both report the first token."""
        known = len(record.sent) - start
        if known < 0:
            log.error("%s: tokens from index %d, but only %d were seen", record.request.id, start, len(record.sent))
            return self.retry(record)
        fresh = tokens[known:]
        if fresh:
            if record.timeline.first_token is None:
                record.timeline.first_token = self._clock()
            record.sent.extend(fresh)
            record.sink.deliver(fresh, None if logprobs is None else logprobs[known:], finish)
        elif finish is not None:
            record.sink.deliver((), None, finish)
        if finish is not None:
            self.finish(record, finish)
        return None

    # ── endings ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def finish(self, record: RoutedSequence, reason: FinishReason) -> None:
        """Over for the client; tell every node that still has it."""
        self.leave_nodes(record)
        record.move(Phase.DONE)
        record.finish_reason = reason
        record.timeline.finished = self._clock()
        del self.sequences[record.seq]
        self.credits.leave(record)
        self._on_update(record)
        self.dispatch()

    def fail(self, record: RoutedSequence, error: RequestError) -> None:
        record.sink.fail(error)
        self.finish(record, "error")

    def retry(self, record: RoutedSequence) -> None:
        """Another attempt, from the prompt and everything sent; after `max_retries` the decode node prefills by itself."""
        record.retries += 1
        self.again(record, f"retries: prefill came to nothing {record.retries} times" if record.retries > self._rules.max_retries else "")

    def again(self, record: RoutedSequence, forced_local: str = "") -> None:
        self.leave_nodes(record)
        record.move(Phase.PLACED)
        self.credits.leave(record)
        record.attempt += 1
        record.forced_local = forced_local
        if self.decodes:
            return self.place(record)
        record.decode, record.prefill = None, None  # until one is back, or patience ends
        record.homeless_until = self._clock() + DECODE_PATIENCE_S
        return None

    def leave_nodes(self, record: RoutedSequence) -> None:
        """Tell the nodes that work on this attempt that it is over, and take it out of the queue."""
        self.queue.discard(record.seq)
        decode = self.decodes.get(record.decode) if record.decode is not None else None
        if decode is not None:
            decode.load_tokens -= record.placed_tokens
            decode.send(protocol.Abort(record.seq, record.attempt))  # harmless if it ended there by itself
        if record.phase in (Phase.PLACED, Phase.QUEUED, Phase.GRANTING):
            self.credits.give_back(record)
        elif (prefill := self.credits.holder(record)) is not None:
            prefill.send(protocol.Abort(record.seq, record.attempt))

    # ── losses ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def decode_lost(self, record: RoutedSequence) -> None:
        log.warning("%s: decode node %s is lost after %d tokens", record.request.id, record.decode, len(record.sent))
        self.retry(record)

    def prefill_lost(self, record: RoutedSequence) -> None:
        if record.phase in (Phase.GRANTING, Phase.PREFILLING):
            self.arbitrate(record)
        elif record.phase is Phase.PLACED:
            record.prefill = None

    def arbitrate(self, record: RoutedSequence) -> None:
        """Decode knows whether the KV landed; only what it released is placed again."""
        if record.phase is Phase.PREFILLING and record.grant is None:
            return self.retry(record)  # nothing was to land
        record.move(Phase.ARBITRATION)
        assert record.decode is not None
        return self.decodes[record.decode].send(protocol.PrefillLost(record.seq, record.attempt))

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def tick(self) -> None:
        """Deadlines, requests without a node, jobs that no prefill node will take."""
        now = self._clock()
        for record in [r for r in self.sequences.values() if now > r.deadline]:
            self.fail(record, RequestFailed(f"not finished within {self._rules.request_timeout_s:g} s", code="timeout"))
        for record in [r for r in self.sequences.values() if r.decode is None and now > r.homeless_until]:
            self.fail(record, RequestFailed("no decode node is left to continue this request", code="no_decode_node"))
        self.dispatch()

    # ── bookkeeping ──────────────────────────────────────────────────────────────────────────────────────────────────

    def current(self, frame: Addressed) -> RoutedSequence | None:
        record = self.sequences.get(frame.seq)
        return record if record is not None and record.attempt == frame.attempt else None

    def drop(self, frame: object) -> None:
        self.dropped_frames[type(frame).__name__] += 1
