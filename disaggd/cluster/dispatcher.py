"""The router's brain: which node works on which sequence, and what happens when one is lost.

Runs on the router's loop and never awaits: a frame, a link event, a submit or a tick comes in, frames go out through
each peer's `send`, tokens through each sequence's `Sink`. Knows nothing of HTTP, text, sockets or torch.

    submit → decode decides → [queue → grant → prefill → push] → tokens → finished

Whatever is lost on the way, a token that was delivered is never sampled again: another attempt starts from the prompt
and everything sent.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Callable
from functools import singledispatchmethod

from disaggd.cluster import protocol
from disaggd.cluster.credits import Credits
from disaggd.cluster.decision import Override
from disaggd.cluster.grant_relay import GrantRelay
from disaggd.cluster.pairing import PairBook
from disaggd.cluster.peers import DecodePeer, PrefillPeer
from disaggd.cluster.prefill_queue import PrefillQueue
from disaggd.cluster.protocol import Grant, TokenRun, ToRouter, pack_tokens
from disaggd.cluster.request import Addressed, Phase, RoutedSequence, Sink, Timeline
from disaggd.errors import InvalidRequest, RequestError, RequestFailed, Unavailable
from disaggd.ids import Incarnation, NodeName, SeqId
from disaggd.sampling import FinishReason, SamplingParams, TokenLogprob

log = logging.getLogger(__name__)

DECODE_PATIENCE_S = 10.0
"""So long a request that lost the last decode node waits for one: a node that is restarted is back in seconds."""


class Dispatcher:
    """Follows every sequence from `submit` to its last token.

    `on_update` is called with a sequence when it is done; and once more, if `awaits_report` held then, when its prefill
    node has reported the push, or is lost.
    `clock` is monotonic seconds.
    """

    def __init__(
        self,
        incarnation: Incarnation,
        *,
        max_retries: int,
        grant_patience_s: float,
        request_timeout_s: float,
        clock: Callable[[], float],
        on_update: Callable[[RoutedSequence], None],
    ) -> None:
        self.prefills: dict[NodeName, PrefillPeer] = {}
        self.decodes: dict[NodeName, DecodePeer] = {}
        self.pairs = PairBook(self.prefills, self.decodes)
        self.grants = GrantRelay(self.prefills, self.decodes)
        self.credits = Credits(self.prefills)
        self.queue = PrefillQueue()
        self.sequences: dict[SeqId, RoutedSequence] = {}
        self.dropped_frames: Counter[str] = Counter()
        """Frames of older attempts or of sequences that are over, by type; whoever reads them clears them."""
        self._incarnation = incarnation
        self._counter = itertools.count(1)
        self._max_retries = max_retries
        self._grant_patience_s = grant_patience_s
        self._request_timeout_s = request_timeout_s
        self._clock = clock
        self._on_update = on_update

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, request_id: str, prompt: tuple[int, ...], sampling: SamplingParams, override: Override, sink: Sink) -> SeqId:
        """Place a new sequence. Raises `Unavailable` when no decode node is up."""
        now = self._clock()
        seq = SeqId(f"{self._incarnation}-{next(self._counter)}")
        deadline = now + self._request_timeout_s
        record = RoutedSequence(seq, request_id, prompt, sampling, override, sink, deadline, Timeline(arrived=now))
        if not self.decodes:
            raise Unavailable("no decode node is up")
        self.sequences[seq] = record
        self._place(record)
        return seq

    def end(self, seq: SeqId, reason: FinishReason) -> None:
        """The client has gone (`abort`), or has all it wants (`stop`). Harmless for a sequence that is over."""
        record = self.sequences.get(seq)
        if record is not None:
            self._finish(record, reason)

    def fail(self, seq: SeqId, error: RequestError) -> None:
        """End a sequence that is not over, with `error` for its client."""
        self._fail(self.sequences[seq], error)

    def awaits_report(self, record: RoutedSequence) -> bool:
        """Whether its prefill node has yet to say how the push of the last attempt ended."""
        return self.credits.is_owed_report(record)

    def tick(self) -> None:
        """Call a few times a second: deadlines, pairs to be probed again, jobs that no prefill node will take."""
        now = self._clock()
        self.pairs.tick(now)
        for record in [r for r in self.sequences.values() if now > r.deadline]:
            self._fail(record, RequestFailed(f"not finished within {self._request_timeout_s:g} s", code="timeout"))
        for record in [r for r in self.sequences.values() if r.decode is None and now > r.homeless_until]:
            self._fail(record, RequestFailed("no decode node is left to continue this request", code="no_decode_node"))
        self._dispatch()

    # ── links ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def prefill_up(self, peer: PrefillPeer) -> None:
        self.prefills[peer.name] = peer
        self.pairs.prefill_up(peer, self._clock())

    def decode_up(self, peer: DecodePeer) -> None:
        self.decodes[peer.name] = peer
        self.pairs.decode_up(peer, self._clock())
        for record in [r for r in self.sequences.values() if r.decode is None]:
            self._place(record)

    def node_down(self, name: NodeName) -> None:
        """Its link is lost: everything it worked on goes elsewhere, or is asked for at the arbiter."""
        self.pairs.node_down(name)
        prefill, decode = self.prefills.pop(name, None), self.decodes.pop(name, None)
        for record in list(self.sequences.values()):
            if decode is not None and record.decode == name:
                self._decode_lost(record)
            elif prefill is not None and record.prefill == name:
                self._prefill_lost(record)
        if prefill is not None:
            for record in self.credits.prefill_down(prefill):
                self._on_update(record)
        if decode is not None:
            self.grants.decode_down(name)
        self._dispatch()

    def on_frame(self, name: NodeName, frame: ToRouter) -> None:
        """One frame from a node whose link is up."""
        if (prefill := self.prefills.get(name)) is not None:
            self._from_prefill(frame, prefill)
        elif (decode := self.decodes.get(name)) is not None:
            self._from_decode(frame, decode)

    # ── frames of decode nodes ───────────────────────────────────────────────────────────────────────────────────────

    @singledispatchmethod
    def _from_decode(self, frame: object, peer: DecodePeer) -> None:
        self._drop(frame)

    @_from_decode.register
    def _(self, frame: protocol.Decided, peer: DecodePeer) -> None:
        record = self._current(frame)
        if record is None or record.phase is not Phase.PLACED:
            return self._drop(frame)
        self.credits.give_back(record)
        record.move(Phase.DECODING)
        record.was_remote, record.reason, record.cached_at_decode = False, record.forced_local or frame.reason, frame.num_cached
        return self._dispatch()

    @_from_decode.register
    def _(self, frame: protocol.NeedPrefill, peer: DecodePeer) -> None:
        record = self._current(frame)
        if record is None or record.phase is not Phase.PLACED:
            return self._drop(frame)
        record.was_remote, record.reason, record.cached_at_decode = True, frame.reason, frame.num_cached
        record.timeline.queued = self._clock()
        if frame.grant is not None and (prefill := self.prefills.get(frame.grant.prefill)) is not None:
            return self._forward(record, prefill, frame.grant)
        self.credits.give_back(record)
        return self._enqueue(record)

    @_from_decode.register
    def _(self, frame: protocol.Refused, peer: DecodePeer) -> None:
        record = self._current(frame)
        if record is None:
            return self._drop(frame)
        return self._fail(record, InvalidRequest(frame.message, param="prompt", code=frame.code))

    @_from_decode.register
    def _(self, frame: protocol.Granted, peer: DecodePeer) -> None:
        record = self._current(frame)
        if record is None or record.phase is not Phase.GRANTING:
            return self._drop(frame)  # its sequence was aborted there: decode cancels the grant, and we answer for it
        prefill = self.prefills.get(frame.grant.prefill)
        return self._arbitrate(record) if prefill is None else self._forward(record, prefill, frame.grant)

    @_from_decode.register
    def _(self, frame: protocol.NoRoom, peer: DecodePeer) -> None:
        record = self._current(frame)
        if record is None or record.phase is not Phase.GRANTING:
            return self._drop(frame)
        peer.is_full = True
        self.credits.give_back(record)
        return self._enqueue(record)

    @_from_decode.register
    def _(self, frame: protocol.Room, peer: DecodePeer) -> None:
        peer.is_full = False
        self._dispatch()

    @_from_decode.register
    def _(self, frame: protocol.Landed, peer: DecodePeer) -> None:
        self.grants.over((frame.seq, frame.attempt))  # though nobody may wait for the sequence any more
        record = self._current(frame)
        if record is None or record.phase not in (Phase.PREFILLING, Phase.ARBITRATION):
            return self._drop(frame)
        return self._landed(record)

    @_from_decode.register
    def _(self, frame: protocol.Released, peer: DecodePeer) -> None:
        record = self._current(frame)
        if record is None:
            return self._drop(frame)
        self.grants.over(record.job)  # unless a `Cancel` ended it already
        log.warning("%s: prefill on %s came to nothing: %s", record.request_id, record.prefill, frame.reason)
        return self._retry(record)

    @_from_decode.register
    def _(self, frame: protocol.Tokens, peer: DecodePeer) -> None:
        for run in frame.runs:
            self._run(run)

    @_from_decode.register
    def _(self, frame: protocol.Cancel, peer: DecodePeer) -> None:
        self.grants.on_cancel(peer, frame)

    @_from_decode.register
    def _(self, frame: protocol.Gauges, peer: DecodePeer) -> None:
        peer.gauges = frame

    @_from_decode.register
    def _(self, frame: protocol.PairAgent, peer: DecodePeer) -> None:
        self.pairs.on_agent(peer, frame, self._clock())

    @_from_decode.register
    def _(self, frame: protocol.PairReady, peer: DecodePeer) -> None:
        if self.pairs.on_ready(peer, frame):
            self._dispatch()

    # ── frames of prefill nodes ──────────────────────────────────────────────────────────────────────────────────────

    @singledispatchmethod
    def _from_prefill(self, frame: object, peer: PrefillPeer) -> None:
        self._drop(frame)

    @_from_prefill.register
    def _(self, frame: protocol.Prefilled, peer: PrefillPeer) -> None:
        record = self._current(frame) or self.credits.owed((frame.seq, frame.attempt))
        if record is None or record.attempt != frame.attempt:
            return self._drop(frame)
        record.timeline.prefill_ms = frame.prefill_ms
        record.timeline.first_token_reported_ms = frame.reported_ms
        record.cached_at_prefill = frame.num_cached
        if record.phase is Phase.DONE:
            return None  # decode was quicker to the end than this frame
        logprobs = None if frame.logprob is None else (frame.logprob,)
        return self._deliver(record, frame.start, (frame.token,), logprobs, frame.finish_reason)

    @_from_prefill.register
    def _(self, frame: protocol.JobEnded, peer: PrefillPeer) -> None:
        job = (frame.seq, frame.attempt)
        record = self.credits.reported(peer, job) or self._current(frame)
        if record is not None:
            record.kv_bytes += frame.kv_bytes
            if record.job == job:
                record.timeline.first_post_ms, record.timeline.last_done_ms = frame.first_post_ms, frame.last_done_ms
            if record.phase is Phase.DONE:
                self._on_update(record)
            elif not frame.clean and record.job == job and record.phase is Phase.PREFILLING:
                log.warning("%s: %s failed: %s", record.request_id, peer.name, frame.reason)
                self._arbitrate(record)
        self._dispatch()

    @_from_prefill.register
    def _(self, frame: protocol.Progress, peer: PrefillPeer) -> None:
        self.grants.on_progress(frame)

    @_from_prefill.register
    def _(self, frame: protocol.Quiesced, peer: PrefillPeer) -> None:
        self.grants.on_quiesced(frame)

    @_from_prefill.register
    def _(self, frame: protocol.PairLost, peer: PrefillPeer) -> None:
        self.pairs.on_lost(peer, frame, self._clock())

    @_from_prefill.register
    def _(self, frame: protocol.Credit, peer: PrefillPeer) -> None:
        peer.credit_tokens = frame.limit_tokens
        self._dispatch()

    @_from_prefill.register
    def _(self, frame: protocol.Gauges, peer: PrefillPeer) -> None:
        peer.gauges = frame

    # ── moves ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _place(self, record: RoutedSequence) -> None:
        """Give the sequence to the least loaded decode node that has room, with a first prefill node in view if nobody waits."""
        decode = min(self.decodes.values(), key=lambda peer: (peer.is_full, peer.load_tokens, peer.name))
        reachable = self.pairs.reachable(decode.name)
        record.decode, record.prefill, record.grant, record.placed_tokens = decode.name, None, None, record.num_tokens
        decode.load_tokens += record.placed_tokens
        grant_for = None
        if not self.queue and record.num_remaining > 1 and (candidate := self.credits.choose(reachable, record)) is not None:
            self.credits.take(record, candidate)
            grant_for = candidate.name
        decode.send(
            protocol.Generate(
                record.seq,
                record.attempt,
                pack_tokens(record.tokens),
                len(record.prompt),
                record.sampling,
                "local" if record.forced_local else record.override,
                len(reachable),
                len(self.queue),
                grant_for,
            )
        )

    def _enqueue(self, record: RoutedSequence) -> None:
        record.move(Phase.QUEUED)
        self.queue.push(record.seq, record.timeline.arrived)
        self._dispatch()

    def _dispatch(self) -> None:
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
            if not reachable and self._patience_is_over(record):
                self.queue.discard(seq)
                reason = "cannot reach" if self.prefills else "is up to reach"
                self._again(record, f"no_prefill_node: none {reason} {record.decode}")
            elif decode.is_full and self._patience_is_over(record) and not all(peer.is_full for peer in self.decodes.values()):
                self.queue.discard(seq)
                self._again(record)
            elif reachable and not decode.is_full:
                prefill = self.credits.choose(reachable, record)
                if prefill is None:
                    return
                self.queue.discard(seq)
                self._start_job(record, prefill, decode)

    def _start_job(self, record: RoutedSequence, prefill: PrefillPeer, decode: DecodePeer) -> None:
        self.credits.take(record, prefill)
        if record.num_remaining > 1:
            record.move(Phase.GRANTING)
            decode.send(protocol.RequestGrant(record.seq, record.attempt, prefill.name))
        else:  # the prefill node samples the only token: nothing is to be pushed
            self._forward(record, prefill, None)

    def _patience_is_over(self, record: RoutedSequence) -> bool:
        """Whether the job should stop waiting for its decode node: to be reached by a prefill node that is up, or to have room."""
        assert record.timeline.queued is not None
        return not self.prefills or self._clock() - record.timeline.queued > self._grant_patience_s

    def _forward(self, record: RoutedSequence, prefill: PrefillPeer, grant: Grant | None) -> None:
        """The blocks are reserved (None: none are needed): the job goes to the prefill node."""
        record.move(Phase.PREFILLING)
        record.timeline.dispatched = self._clock()
        if grant is not None:
            self.grants.forwarded(record.job, grant, prefill)
        self.credits.take(record, prefill)
        record.grant = grant
        prefill.send(protocol.Prefill(record.seq, record.attempt, pack_tokens(record.tokens), len(record.prompt), record.sampling, grant))

    def _landed(self, record: RoutedSequence) -> None:
        """The KV is at decode."""
        if record.phase in (Phase.PREFILLING, Phase.ARBITRATION):
            record.move(Phase.DECODING)
            record.timeline.landed = self._clock()

    def _run(self, run: TokenRun) -> None:
        record = self._current(run)
        if record is None:
            return self._drop(run)
        self._landed(record)
        return self._deliver(record, run.start, run.tokens, run.logprobs, run.finish_reason)

    def _deliver(
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
            log.error("%s: tokens from index %d, but only %d were seen", record.request_id, start, len(record.sent))
            return self._retry(record)
        fresh = tokens[known:]
        if fresh:
            if record.timeline.first_token is None:
                record.timeline.first_token = self._clock()
            record.sent.extend(fresh)
            record.sink.deliver(fresh, None if logprobs is None else logprobs[known:], finish)
        elif finish is not None:
            record.sink.deliver((), None, finish)
        if finish is not None:
            self._finish(record, finish)
        return None

    # ── endings ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _finish(self, record: RoutedSequence, reason: FinishReason) -> None:
        """Over for the client; tell every node that still has it."""
        self._leave_nodes(record)
        record.move(Phase.DONE)
        record.finish_reason = reason
        record.timeline.finished = self._clock()
        del self.sequences[record.seq]
        self.credits.leave(record)
        self._on_update(record)
        self._dispatch()

    def _fail(self, record: RoutedSequence, error: RequestError) -> None:
        record.sink.fail(error)
        self._finish(record, "error")

    def _retry(self, record: RoutedSequence) -> None:
        """Another attempt, from the prompt and everything sent; after `max_retries` the decode node prefills by itself."""
        record.retries += 1
        self._again(record, f"retries: prefill came to nothing {record.retries} times" if record.retries > self._max_retries else "")

    def _again(self, record: RoutedSequence, forced_local: str = "") -> None:
        self._leave_nodes(record)
        record.move(Phase.PLACED)
        self.credits.leave(record)
        record.attempt += 1
        record.forced_local = forced_local
        if self.decodes:
            return self._place(record)
        record.decode, record.prefill = None, None  # until one is back, or patience ends
        record.homeless_until = self._clock() + DECODE_PATIENCE_S
        return None

    def _leave_nodes(self, record: RoutedSequence) -> None:
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

    def _decode_lost(self, record: RoutedSequence) -> None:
        log.warning("%s: decode node %s is lost after %d tokens", record.request_id, record.decode, len(record.sent))
        self._retry(record)

    def _prefill_lost(self, record: RoutedSequence) -> None:
        if record.phase in (Phase.GRANTING, Phase.PREFILLING):
            self._arbitrate(record)
        elif record.phase is Phase.PLACED:
            record.prefill = None

    def _arbitrate(self, record: RoutedSequence) -> None:
        """Decode knows whether the KV landed; only what it released is placed again."""
        if record.phase is Phase.PREFILLING and record.grant is None:
            return self._retry(record)  # nothing was to land
        record.move(Phase.ARBITRATION)
        assert record.decode is not None
        return self.decodes[record.decode].send(protocol.PrefillLost(record.seq, record.attempt))

    # ── bookkeeping ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _current(self, frame: Addressed) -> RoutedSequence | None:
        record = self.sequences.get(frame.seq)
        return record if record is not None and record.attempt == frame.attempt else None

    def _drop(self, frame: object) -> None:
        self.dropped_frames[type(frame).__name__] += 1
