"""Every move of a sequence in the router: placed, queued, granted, forwarded, delivered, retried, ended.

Runs on the router's loop. `Dispatcher` calls these for what frames, links and clients bring; they call each other where one
move leads to the next. Knows nothing of frames from nodes: only of those that it sends.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil, inf

from disaggd.cluster import protocol
from disaggd.cluster.admission import MAX_RETRY_S, Admission
from disaggd.cluster.cache_book import CacheBook
from disaggd.cluster.credits import Credits
from disaggd.cluster.grant_relay import GrantRelay
from disaggd.cluster.learning import Learning
from disaggd.cluster.output import nonsense_in
from disaggd.cluster.pair_checks import PairChecks
from disaggd.cluster.pairing import PairBook
from disaggd.cluster.peers import DecodePeer, Duty, JobStage, Peer, PrefillPeer, able_to_decode, is_any_serving
from disaggd.cluster.placement import Cached, Placement, prefill_s
from disaggd.cluster.prefill_queue import Job, PrefillQueue
from disaggd.cluster.prefix_push import PrefixPolicy, PrefixPushes
from disaggd.cluster.protocol import Grant, TokenRun, pack_tokens
from disaggd.cluster.request import Addressed, Phase, RoutedSequence
from disaggd.cluster.routing import RoundRobin, RoutingWeights
from disaggd.errors import Overloaded, RequestError, RequestFailed
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
    """So long a job waits for room at its decode node before that keeps for it what comes free."""
    request_timeout_s: float = 600.0
    stall_s: float = 10.0
    """A request that stands still for so long is told of."""
    max_prefill_queue: int = 16
    """Jobs that may wait; more are refused or prefilled locally."""
    max_prefill_queue_tokens: int = 262_144
    """Of all of them together."""
    queue_aging_s: float = 10.0
    """A job that arrived so long ago goes before every later one."""
    ttft_target_s: float = 2.0
    check_pairs: bool = False
    """Whether a pattern goes over a pair before anything else does."""
    prefix_push: PrefixPolicy = "auto"
    """Whether decode nodes push prefixes to prefill nodes that lack them."""
    weights: RoutingWeights = field(default_factory=lambda: RoutingWeights(prefill=1.0, load=0.1))
    kv_overcommit: float = inf
    """So many times what the decode nodes hold may the sequences under way be predicted to need; more are refused."""
    round_robin: bool = False
    """Decode nodes take turns, whatever they would cost."""
    vocab_size: int = 2**31
    """The model's: what a node says of tokens beyond it ends the request."""


class Moves:
    """The sequences under way, the nodes that are up, and what happens between them.

    `on_update` is called with a sequence when it is done, as `Dispatcher` says. `clock` is monotonic seconds.
    """

    def __init__(self, rules: DispatchRules, clock: Callable[[], float], on_update: Callable[[RoutedSequence], None]) -> None:
        self.prefills: dict[NodeName, PrefillPeer] = {}
        self.decodes: dict[NodeName, DecodePeer] = {}
        self.grants = GrantRelay(self.prefills, self.decodes)
        self.checks = PairChecks(self.prefills, self.decodes, self.grants, clock)
        self.pairs = PairBook(self.prefills, self.decodes, self.checks if rules.check_pairs else None)
        self.credits = Credits(self.prefills)
        self.caches = CacheBook()
        self.admission = Admission(rules.kv_overcommit)
        self.prefixes = PrefixPushes(rules.prefix_push, self.pairs)
        self.queue = PrefillQueue(max_jobs=rules.max_prefill_queue, max_tokens=rules.max_prefill_queue_tokens, aging_s=rules.queue_aging_s)
        self.sequences: dict[SeqId, RoutedSequence] = {}
        """All that are not over."""
        self.dropped_frames: Counter[str] = Counter()
        self.learning = Learning(self.pairs)
        turns = RoundRobin() if rules.round_robin else None
        self._placement = Placement(self.prefills, self.decodes, self.pairs, self.queue, rules.weights, self.learning, turns)
        self._rules = rules
        self._clock = clock
        self._on_update = on_update

    def admit(self, record: RoutedSequence) -> None:
        """A new sequence. Raises Overloaded when the decode nodes would not have the memory for it before long."""
        peers = self.decodes.values()
        if self.admission.excess(record, 0, peers) > 0:  # a walk of the index, for the few who need it
            cached = self.caches.cached_tokens(record)
            excess = self.admission.excess(record, max(cached[peer.name] for peer in peers), peers)
            if excess > 0:
                raise self.admission.refusal(excess)
        self.sequences[record.seq] = record
        self.place(record)

    def place(self, record: RoutedSequence) -> None:
        """Give the sequence to the decode node where it costs least, with a prefill node in view that might have it."""
        now, cached = self._clock(), self.caches.cached_tokens(record)
        decode = self._placement.decode_for(record, cached)
        record.decode, record.prefill, record.grant, record.placed_tokens = decode.name, None, None, record.num_tokens
        record.no_room_since = None
        record.timeline.placed = now
        decode.load_tokens += record.placed_tokens
        self.admission.placed(record, cached[decode.name])
        offer = self._placement.offer(record, decode, self._job(record, cached), cached, now)
        record.saw_full_queue = offer is not None and offer.queue_is_full
        if offer is not None and offer.may_grant:
            self._take_credit(record, self.prefills[offer.prefill], cached, JobStage.OFFERED)
        decode.send(
            protocol.Generate(
                record.seq,
                record.attempt,
                pack_tokens(record.tokens),
                len(record.request.prompt),
                record.request.sampling,
                record.request.cache_salt,
                "local" if record.forced_local else record.request.override,
                record.timeline.arrived + self._rules.ttft_target_s - now,
                offer,
            )
        )

    # ── the prefill queue ────────────────────────────────────────────────────────────────────────────────────────────

    def enqueue(self, record: RoutedSequence) -> None:
        """The sequence waits for a prefill node, if it finds room in the queue or has been there before."""
        job = self._job(record, self.caches.cached_tokens(record))
        if not record.has_place and not self.queue.has_room(job.num_tokens):
            return self._overflow(record, job)
        record.move(Phase.QUEUED)
        record.has_place = True
        record.timeline.waits_again(len(self.queue), self.queue.jobs_ahead(job, self._clock()))
        self.queue.push(job)
        return self.dispatch()

    def _overflow(self, record: RoutedSequence, job: Job) -> None:
        """No room in the queue. A decode node that did not know decides once more, and may prefill by itself; one that did, may not."""
        if not record.saw_full_queue:
            return self.again(record, "the prefill queue was full")
        self.queue.refuse()
        wait_s = self._placement.wait_s(job, self._clock())
        return self.fail(
            record,
            Overloaded(
                f"the prefill queue is full: {len(self.queue)} waiting, {self.queue.num_tokens} tokens in all",
                retry_after_s=min(MAX_RETRY_S, max(1, ceil(wait_s))),
            ),
        )

    def dispatch(self) -> None:
        """Give each waiting job, by its turn, to a prefill node that has credit and can reach the job's decode node.

        A job that only wants for credit is not overtaken on any node that it could have: those behind it would else keep
        every node from falling idle for a long one.
        """
        promised: set[NodeName] = set()
        """Nodes whose next credit is that of a job which was before."""
        for job in self.queue.in_order(self._clock()):
            if job.seq in self.queue:  # else a retry below dispatched it already
                promised |= self._advance(self.sequences[job.seq], job, promised)

    def _advance(self, record: RoutedSequence, job: Job, promised: set[NodeName]) -> set[NodeName]:
        """Move a waiting job on, if that is possible now. Returns the nodes of which it waits for credit."""
        assert record.decode is not None
        decode, reachable = self.decodes.get(record.decode), self.pairs.reachable(record.decode)
        if decode is None:
            return set()  # its node is being lost right now: its retry is next
        if not reachable:
            self._cut_off(record)
            return set()
        has_nothing = decode.has_nothing_for(record.seq, self.queue)
        if has_nothing and not self._may_ask(record, job, decode):
            return set()
        cached = self.caches.cached_tokens(record)
        able = [peer for peer in reachable if peer.name not in promised and peer.has_credit(record.num_tokens)]
        prefill = self._placement.prefill_for(record, able, cached, self._clock())
        if prefill is None:
            return {peer.name for peer in reachable}
        self.queue.take(record.seq)
        self._take_credit(record, prefill, cached, JobStage.COMING)
        if record.num_remaining > 1:
            record.move(Phase.GRANTING)
            record.timeline.granting = self._clock()
            if has_nothing:
                decode.earmarks[record.seq] = None
            decode.send(protocol.RequestGrant(record.seq, record.attempt, prefill.name, earmark=has_nothing))
        else:  # the prefill node samples the only token: nothing is to be pushed
            self.forward(record, prefill, None)
        return set()

    def _cut_off(self, record: RoutedSequence) -> None:
        """No prefill node reaches its decode node: it waits a while for one that is up, and is then prefilled by decode."""
        assert record.timeline.queued is not None
        has_any = is_any_serving(self.prefills)
        if not has_any or self._clock() - record.timeline.queued > self._rules.grant_patience_s:
            self.queue.take(record.seq)
            reason = "can reach" if has_any else "is up to reach"
            self.again(record, f"no prefill node {reason} {record.decode}", f"no_prefill_node: none {reason} {record.decode}")

    def _may_ask(self, record: RoutedSequence, job: Job, decode: DecodePeer) -> bool:
        """Whether a node that has no room is to be asked for a grant all the same: once, so that it keeps for the job what comes free.

        That is when patience ends. When its slack ends, the job goes to another decode node, if one has room.
        """
        now = self._clock()
        if record.no_room_since is None:
            record.no_room_since = now
        if now > job.due and self._placement.has_room_elsewhere(record):
            self.queue.take(record.seq)
            self.again(record, f"{record.decode} had no room")
            return False
        return record.seq not in decode.earmarks and now - record.no_room_since > self._rules.grant_patience_s

    def no_room(self, record: RoutedSequence, decode: DecodePeer) -> None:
        """The decode node has no blocks for the job now: it returns to its place in the queue until there are."""
        decode.is_full = True
        if record.no_room_since is None:
            record.no_room_since = self._clock()
        self.wait_again(record)

    def wait_again(self, record: RoutedSequence) -> None:
        """No prefill node gets the job for now: it returns to its place in the queue."""
        self.credits.give_back(record)
        self.enqueue(record)

    def _job(self, record: RoutedSequence, cached: Cached) -> Job:
        return self._placement.job(record, cached, self._rules.ttft_target_s)

    def _take_credit(self, record: RoutedSequence, prefill: PrefillPeer, cached: Cached, stage: JobStage) -> None:
        self.credits.take(record, prefill, prefill_s(prefill, record, cached), stage, self._clock())

    def forward(self, record: RoutedSequence, prefill: PrefillPeer, grant: Grant | None) -> None:
        """The blocks are reserved (None: none are needed): the job goes to the prefill node."""
        record.move(Phase.PREFILLING)
        record.timeline.dispatched = self._clock()
        if grant is not None:
            record.cached_at_decode = grant.first_token_index
            self.grants.forwarded(record.job, grant, prefill)
        cached, now = self.caches.cached_tokens(record), self._clock()
        self._take_credit(record, prefill, cached, JobStage.SENT)
        record.grant, record.has_place = grant, True
        decode = self.decodes.get(record.decode) if record.decode is not None else None
        prefix = None if decode is None else self.prefixes.source_for(record, decode, prefill, cached[prefill.name], now)
        prefill.send(
            protocol.Prefill(
                record.seq,
                record.attempt,
                pack_tokens(record.tokens),
                len(record.request.prompt),
                record.request.sampling,
                record.request.cache_salt,
                grant,
                prefix,
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
            return self.retry(record, f"tokens before {start} were lost")
        fresh, their_logprobs = tokens[known:], None if logprobs is None else logprobs[known:]
        if nonsense := nonsense_in(fresh, their_logprobs, most=record.num_remaining, vocab_size=self._rules.vocab_size):
            log.error("%s: %s sent what cannot be output: %s", record.request.id, record.decode, nonsense)
            return self.fail(record, RequestFailed("a node sent what cannot be output"))
        if fresh:
            if record.timeline.resumed is None:
                record.timeline.tokens_came(self._clock())
            record.sent.extend(fresh)
            self._grow(record, len(fresh))
            self.admission.grew(record)
            record.sink.deliver(fresh, their_logprobs, finish)
        elif finish is not None:
            record.sink.deliver((), None, finish)
        if finish is not None:
            self.finish(record, finish)
        return None

    def _grow(self, record: RoutedSequence, num_tokens: int) -> None:
        """The sequence has become longer, and so has what its decode node reads in every step."""
        if (decode := self.decodes.get(record.decode) if record.decode is not None else None) is not None:
            decode.load_tokens += num_tokens
            record.placed_tokens += num_tokens

    # ── endings ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def finish(self, record: RoutedSequence, reason: FinishReason) -> None:
        """Over for the client; tell every node that still has it."""
        self.queue.give_up(record.seq, "gone" if reason == "abort" else "failed")
        self.leave_nodes(record)
        record.move(Phase.DONE)
        record.finish_reason = reason
        record.timeline.ended = record.timeline.finished = self._clock()
        del self.sequences[record.seq]
        self.admission.left(record)
        if reason in ("stop", "length"):
            self.admission.finished(record, record.timeline.finished - record.timeline.arrived)
        self.credits.leave(record)
        self._on_update(record)
        self.dispatch()

    def fail(self, record: RoutedSequence, error: RequestError) -> None:
        record.sink.fail(error)
        record.error = error.message
        self.finish(record, "error")

    def retry(self, record: RoutedSequence, failure: str) -> None:
        """Another attempt, from the prompt and everything sent."""
        record.retries += 1
        record.has_place = True
        num_failed = record.failed_prefills
        is_last = num_failed > self._rules.max_retries
        self.again(record, failure, f"retries: prefill came to nothing {num_failed} times" if is_last else "")

    def prefill_failed(self, record: RoutedSequence, failure: str) -> None:
        """Another attempt; when `max_retries` more have failed, the decode node prefills by itself."""
        record.failed_prefills += 1
        self.retry(record, failure)

    def again(self, record: RoutedSequence, failure: str, forced_local: str = "") -> None:
        """`failure` is what the attempt so far came to."""
        self.leave_nodes(record)
        record.move(Phase.PLACED)
        self.credits.leave(record)
        record.next_attempt(self._clock(), failure)
        record.forced_local = forced_local
        if able_to_decode(self.decodes):
            return self.place(record)
        record.decode, record.prefill = None, None  # until one is back, or patience ends
        record.homeless_until = self._clock() + DECODE_PATIENCE_S
        return None

    def leave_nodes(self, record: RoutedSequence) -> None:
        """Tell the nodes that work on this attempt that it is over, and take it out of the queue."""
        self.queue.take(record.seq)
        decode = self.decodes.get(record.decode) if record.decode is not None else None
        if decode is not None:
            decode.load_tokens -= record.placed_tokens
            decode.earmarks.pop(record.seq, None)
            decode.send(protocol.Abort(record.seq, record.attempt))  # harmless if it ended there by itself
        if record.phase in (Phase.PLACED, Phase.QUEUED, Phase.GRANTING):
            self.credits.give_back(record)
        elif (prefill := self.credits.holder(record)) is not None:
            prefill.send(protocol.Abort(record.seq, record.attempt))

    # ── losses ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def decode_lost(self, record: RoutedSequence, decode: DecodePeer) -> None:
        if record.phase is Phase.PREFILLING and record.grant is None:
            record.placed_tokens = 0  # of the node that left; the only token comes from the prefill node
        elif decode.duty is Duty.SERVING:
            log.warning("%s: decode node %s is lost after %d tokens", record.request.id, decode.name, len(record.sent))
            self.retry(record, f"decode node {decode.name} was lost")
        else:
            log.warning("%s: decode node %s has stopped after %d tokens", record.request.id, decode.name, len(record.sent))
            self.again(record, f"decode node {decode.name} has stopped")

    def prefill_lost(self, record: RoutedSequence) -> None:
        if record.phase in (Phase.GRANTING, Phase.PREFILLING):
            self.arbitrate(record)
        elif record.phase is Phase.PLACED:
            record.prefill = None

    def arbitrate(self, record: RoutedSequence) -> None:
        """Decode knows whether the KV landed; only what it released is placed again."""
        if record.phase is Phase.PREFILLING and record.grant is None:
            return self.prefill_failed(record, f"prefill node {record.prefill} failed or was lost")  # nothing was to land
        record.move(Phase.ARBITRATION)
        assert record.decode is not None
        return self.decodes[record.decode].send(protocol.PrefillLost(record.seq, record.attempt))

    # ── nodes that are about to stop ─────────────────────────────────────────────────────────────────────────────────

    def drain(self, peer: Peer) -> None:
        """It is about to stop, and keeps what it has begun; what it has not goes elsewhere, if there is a node to have it."""
        log.info("%s is draining", peer.name)
        peer.duty = Duty.DRAINING
        if isinstance(peer, DecodePeer) and is_any_serving(self.decodes):
            not_begun = (Phase.PLACED, Phase.QUEUED, Phase.GRANTING)
            for record in [r for r in self.sequences.values() if r.decode == peer.name and r.phase in not_begun]:
                self.again(record, f"decode node {peer.name} is draining")
        self.dispatch()
        self._dismiss(peer)

    def _dismiss(self, peer: Peer) -> None:
        """Let it stop, if nothing of ours is there any more, and all that it wrote has been taken in."""
        if isinstance(peer, PrefillPeer):
            is_needed = bool(peer.jobs)
        else:
            is_needed = any(record.decode == peer.name for record in self.sequences.values())
        if not is_needed and not self.grants.concerns(peer.name):
            peer.duty = Duty.DISMISSED
            peer.send(protocol.Dismiss())

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def tick(self) -> None:
        """Deadlines, requests without a node, jobs that no prefill node will take, nodes that may stop."""
        now = self._clock()
        for record in [r for r in self.sequences.values() if now > r.deadline]:
            self.fail(record, RequestFailed(f"not finished within {self._rules.request_timeout_s:g} s", code="timeout"))
        for record in [r for r in self.sequences.values() if r.decode is None and now > r.homeless_until]:
            log.warning("%s: no decode node came back within %g s", record.request.id, DECODE_PATIENCE_S)
            self.fail(record, RequestFailed("no decode node is left to continue this request", code="no_decode_node"))
        self.dispatch()
        peers: list[Peer] = [*self.prefills.values(), *self.decodes.values()]
        for peer in peers:
            if peer.duty is Duty.DRAINING:
                self._dismiss(peer)

    # ── bookkeeping ──────────────────────────────────────────────────────────────────────────────────────────────────

    def current(self, frame: Addressed) -> RoutedSequence | None:
        record = self.sequences.get(frame.seq)
        return record if record is not None and record.attempt == frame.attempt else None

    def drop(self, frame: object) -> None:
        self.dropped_frames[type(frame).__name__] += 1
