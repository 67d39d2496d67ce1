"""The router's brain: which node works on which sequence, and what happens when one is lost.

Runs on the router's loop and never awaits: a frame, a link event, a submit or a tick comes in, frames go out through
each peer's `send`, tokens through each sequence's `Sink`. Knows nothing of HTTP, text, sockets or torch.

    submit → decode decides → [queue → grant → prefill → push] → tokens → finished

Whatever is lost on the way, a token that was delivered is never sampled again: another attempt starts from the prompt
and everything sent.
"""

import itertools
import logging
from collections.abc import Callable
from functools import singledispatchmethod

from disaggd.cluster import hello, protocol
from disaggd.cluster.check_frames import PatternGrant, PatternPushed, PatternRead
from disaggd.cluster.costs import PrefillFit
from disaggd.cluster.moves import DispatchRules, Moves
from disaggd.cluster.offer import Predicted
from disaggd.cluster.peers import DecodePeer, Duty, Peer, PrefillPeer, is_any_serving
from disaggd.cluster.protocol import ToRouter
from disaggd.cluster.request import Phase, Request, RoutedSequence, Sink, Timeline
from disaggd.cluster.stalls import StallWatch
from disaggd.errors import InvalidRequest, RequestError, Unavailable
from disaggd.ids import Incarnation, NodeName, SeqId
from disaggd.sampling import FinishReason

log = logging.getLogger(__name__)


class Dispatcher:
    """Follows every sequence from `submit` to its last token.

    `on_update` is called with a sequence when it is done; and once more, if `awaits_report` held then, when its prefill
    node has reported the push, or is lost.
    `clock` is monotonic seconds.
    """

    def __init__(
        self, incarnation: Incarnation, rules: DispatchRules, clock: Callable[[], float], on_update: Callable[[RoutedSequence], None]
    ) -> None:
        self._moves = moves = Moves(rules, clock, on_update)
        self.prefills = moves.prefills
        self.decodes = moves.decodes
        self.sequences = moves.sequences
        self.queue = moves.queue
        self.pairs = moves.pairs
        self.checks = moves.checks
        self.grants = moves.grants
        self.credits = moves.credits
        self.admission = moves.admission
        self.caches = moves.caches
        self.prefixes = moves.prefixes
        self.stalls = StallWatch(rules.stall_s, moves.prefills, moves.decodes, moves.queue, moves.grants, clock)
        self.dropped_frames = moves.dropped_frames
        """Frames of older attempts or of sequences that are over, by type; whoever reads them clears them."""
        self._incarnation = incarnation
        self._counter = itertools.count(1)
        self._rules = rules
        self._clock = clock
        self._on_update = on_update

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def why_closed(self) -> str | None:
        """Why no decode node takes a new sequence; None if one does."""
        if is_any_serving(self.decodes):
            return None
        return "every decode node is draining" if self.decodes else "no decode node is up"

    def submit(self, request: Request, sink: Sink) -> SeqId:
        """Place a new sequence. Raises `Unavailable` when no decode node takes any, `Overloaded` when they hold as much as they may."""
        if (why := self.why_closed) is not None:
            raise Unavailable(why)
        now = self._clock()
        seq = SeqId(f"{self._incarnation}-{next(self._counter)}")
        record = RoutedSequence(seq, request, sink, now + self._rules.request_timeout_s, Timeline(arrived=now))
        self._moves.admit(record)
        return seq

    def end(self, seq: SeqId, reason: FinishReason, why: str | None = None) -> None:
        """The client has gone (`abort`), or was cut, and then `why`; or has all it wants (`stop`). Harmless for a sequence that is over."""
        record = self.sequences.get(seq)
        if record is not None:
            record.error = why
            self._moves.finish(record, reason)

    def fail(self, seq: SeqId, error: RequestError) -> None:
        """End a sequence that is not over, with `error` for its client."""
        self._moves.fail(self.sequences[seq], error)

    def awaits_report(self, record: RoutedSequence) -> bool:
        """Whether a prefill node has yet to say how a push for it ended."""
        return self.credits.is_owed_report(record)

    def tick(self) -> None:
        """Call a few times a second: deadlines, pairs to be probed again, jobs that no prefill node will take, stalls."""
        self.checks.tick()
        self.pairs.tick(self._clock())
        self._moves.tick()
        self.stalls.tick(self.sequences.values())

    # ── links ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def prefill_up(self, peer: PrefillPeer) -> None:
        self.prefills[peer.name] = peer
        self.caches.node_up(peer.name, peer.hello)
        self.pairs.prefill_up(peer, self._clock())

    def decode_up(self, peer: DecodePeer) -> None:
        self.decodes[peer.name] = peer
        self.caches.node_up(peer.name, peer.hello)
        self.pairs.decode_up(peer, self._clock())
        for record in [r for r in self.sequences.values() if r.decode is None]:
            self._moves.place(record)

    def node_down(self, name: NodeName) -> None:
        """Its link is lost: everything it worked on goes elsewhere, or is asked for at the arbiter."""
        self.pairs.node_down(name)
        self.caches.node_down(name)
        prefill, decode = self.prefills.pop(name, None), self.decodes.pop(name, None)
        self.checks.node_down(name)
        for record in list(self.sequences.values()):
            if decode is not None and record.decode == name:
                self._moves.decode_lost(record, decode)
            elif prefill is not None and record.prefill == name:
                self._moves.prefill_lost(record)
        if prefill is not None:
            for record in self.credits.prefill_down(prefill):
                self._on_update(record)
        self.grants.target_down(name)
        self.prefixes.node_down(name)
        self._moves.dispatch()

    def on_frame(self, name: NodeName, frame: ToRouter) -> None:
        """One frame from a node whose link is up."""
        if (prefill := self.prefills.get(name)) is not None:
            self._from_prefill(frame, prefill)
        elif (decode := self.decodes.get(name)) is not None:
            self._from_decode(frame, decode)

    # ── frames of decode nodes ───────────────────────────────────────────────────────────────────────────────────────

    @singledispatchmethod
    def _from_decode(self, frame: object, peer: DecodePeer) -> None:
        self._from_either(frame, peer)

    @_from_decode.register
    def _(self, frame: protocol.Decided, peer: DecodePeer) -> None:
        peer.decided(remote=False)
        record = self._moves.current(frame)
        if record is None or record.phase is not Phase.PLACED:
            return self._moves.drop(frame)
        self.credits.give_back(record)
        record.move(Phase.DECODING)
        record.was_remote, record.reason, record.cached_at_decode = False, record.forced_local or frame.reason, frame.num_cached
        record.timeline.decided = self._clock()
        _note_prediction(record, peer, frame.predicted)
        return self._moves.dispatch()

    @_from_decode.register
    def _(self, frame: protocol.NeedPrefill, peer: DecodePeer) -> None:
        peer.decided(remote=True)
        record = self._moves.current(frame)
        if record is None or record.phase is not Phase.PLACED:
            return self._moves.drop(frame)
        record.was_remote, record.reason, record.cached_at_decode = True, frame.reason, frame.num_cached
        _note_prediction(record, peer, frame.predicted)
        record.timeline.decided = record.timeline.queued = self._clock()
        prefill = None if frame.grant is None else self.prefills.get(frame.grant.writer)
        if frame.grant is not None and prefill is not None and prefill.duty is Duty.SERVING:
            return self._moves.forward(record, prefill, frame.grant)
        self.credits.give_back(record)
        return self._moves.enqueue(record)

    @_from_decode.register
    def _(self, frame: protocol.LocalPrefill, peer: DecodePeer) -> None:
        record = self._moves.current(frame)
        if record is None:
            return self._moves.drop(frame)
        record.cached_at_decode = frame.num_cached
        record.timeline.prefill_ms, record.timeline.local_wait_ms = frame.prefill_ms, frame.wait_ms
        return None

    @_from_decode.register
    def _(self, frame: protocol.Refused, peer: DecodePeer) -> None:
        record = self._moves.current(frame)
        if record is None:
            return self._moves.drop(frame)
        return self._moves.fail(record, InvalidRequest(frame.message, param="prompt", code=frame.code))

    @_from_decode.register
    def _(self, frame: protocol.Granted, peer: DecodePeer) -> None:
        record = self._moves.current(frame)
        if record is None or record.phase is not Phase.GRANTING:
            return self._moves.drop(frame)  # its sequence was aborted there: decode cancels the grant, and we answer for it
        peer.earmarks.pop(record.seq, None)
        prefill = self.prefills.get(frame.grant.writer)
        if prefill is None:
            return self._moves.arbitrate(record)
        if prefill.duty is not Duty.SERVING:
            return self._moves.wait_again(record)  # that another grant is asked for takes this one back
        return self._moves.forward(record, prefill, frame.grant)

    @_from_decode.register
    def _(self, frame: protocol.NoRoom, peer: DecodePeer) -> None:
        record = self._moves.current(frame)
        if record is None or record.phase is not Phase.GRANTING:
            return self._moves.drop(frame)
        return self._moves.no_room(record, peer)

    @_from_decode.register
    def _(self, frame: protocol.Room, peer: DecodePeer) -> None:
        peer.is_full = False
        self._moves.dispatch()

    @_from_decode.register
    def _(self, frame: protocol.Landed, peer: DecodePeer) -> None:
        self.grants.over((frame.seq, frame.attempt), peer.name)  # though nobody may wait for the sequence any more
        record = self._moves.current(frame)
        if record is None or record.phase not in (Phase.PREFILLING, Phase.ARBITRATION):
            return self._moves.drop(frame)
        return self._moves.landed(record)

    @_from_decode.register
    def _(self, frame: protocol.Released, peer: DecodePeer) -> None:
        self.grants.over((frame.seq, frame.attempt), peer.name)  # unless a `Cancel` ended it already
        record = self._moves.current(frame)
        if record is None:
            return self._moves.drop(frame)
        log.warning("%s: prefill on %s came to nothing: %s", record.request.id, record.prefill, frame.reason)
        failure = f"prefill on {record.prefill} came to nothing: {frame.reason}"
        return self._moves.again(record, failure) if frame.is_fenced else self._moves.prefill_failed(record, failure)

    @_from_decode.register
    def _(self, frame: protocol.Tokens, peer: DecodePeer) -> None:
        for run in frame.runs:
            self._moves.run(run)

    @_from_decode.register
    def _(self, frame: protocol.Measured, peer: DecodePeer) -> None:
        """What a prefill would take there is in its decisions."""
        peer.step_s = frame.decode_base_s

    # ── frames of prefill nodes ──────────────────────────────────────────────────────────────────────────────────────

    @singledispatchmethod
    def _from_prefill(self, frame: object, peer: PrefillPeer) -> None:
        self._from_either(frame, peer)

    @_from_prefill.register
    def _(self, frame: protocol.Prefilled, peer: PrefillPeer) -> None:
        self.credits.prefilled(peer, (frame.seq, frame.attempt), self._clock())
        record = self._moves.current(frame) or self.credits.owed((frame.seq, frame.attempt))
        if record is None or record.attempt != frame.attempt:
            return self._moves.drop(frame)
        record.timeline.prefill_ms = frame.prefill_ms
        record.timeline.prefilled, record.timeline.first_token_reported_ms = self._clock(), frame.reported_ms
        record.cached_at_prefill = frame.num_cached
        self._moves.learning.prefilled(peer, record, frame)
        if record.phase is Phase.DONE:
            return None  # decode was quicker to the end than this frame
        logprobs = None if frame.logprob is None else (frame.logprob,)
        return self._moves.deliver(record, frame.start, (frame.token,), logprobs, frame.finish_reason)

    @_from_prefill.register
    def _(self, frame: protocol.JobEnded, peer: PrefillPeer) -> None:
        job = (frame.seq, frame.attempt)
        record = self.credits.reported(peer, job, self._clock()) or self._moves.current(frame)
        if record is not None:
            record.kv_bytes += frame.kv_bytes
            times = record.timeline_of(frame.attempt)
            times.first_post_ms, times.last_done_ms = frame.first_post_ms, frame.last_done_ms
            self._moves.learning.pushed(peer, record, frame, times)
            if record.phase is Phase.DONE:
                self._on_update(record)
            elif not frame.clean and record.job == job and record.phase is Phase.PREFILLING:
                log.warning("%s: %s failed: %s", record.request.id, peer.name, frame.reason)
                self._moves.arbitrate(record)
        self._moves.dispatch()

    @_from_prefill.register
    def _(self, frame: protocol.PrefixGrant, peer: PrefillPeer) -> None:
        """To the decode node of the sequence; if that has another by now, or none, nobody will write, and we say so."""
        record, grant = self._moves.current(frame), frame.grant
        decode = self.decodes.get(grant.writer)
        if record is None or decode is None or record.decode != grant.writer:
            peer.send(protocol.Quiesced(grant.token, grant.target, True))
            return self._moves.drop(frame)
        self.grants.forwarded((frame.seq, frame.attempt), grant, decode)
        return decode.send(protocol.PushPrefix(frame.seq, frame.attempt, grant))

    @_from_prefill.register
    def _(self, frame: protocol.PrefixEnded, peer: PrefillPeer) -> None:
        job = (frame.seq, frame.attempt)
        self.grants.over(job, peer.name)  # unless a `Cancel` ended it already
        record, push = self._moves.current(frame) or self.credits.owed(job), self.prefixes.ended(peer, frame)
        if record is not None and record.job == job:
            record.prefix_push = push

    @_from_prefill.register
    def _(self, frame: protocol.Credit, peer: PrefillPeer) -> None:
        peer.credit_tokens = frame.limit_tokens
        self._moves.dispatch()

    @_from_prefill.register
    def _(self, frame: protocol.Measured, peer: PrefillPeer) -> None:
        peer.prefills = PrefillFit(frame.prefill_cost)

    # ── frames of either ─────────────────────────────────────────────────────────────────────────────────────────────

    @singledispatchmethod
    def _from_either(self, frame: object, peer: Peer) -> None:
        self._moves.drop(frame)

    @_from_either.register
    def _(self, frame: protocol.Gauges, peer: Peer) -> None:
        peer.gauges = frame

    @_from_either.register
    def _(self, frame: protocol.Draining, peer: Peer) -> None:
        self._moves.drain(peer)

    @_from_either.register
    def _(self, frame: protocol.CacheEvents, peer: Peer) -> None:
        if self.caches.on_events(peer.name, frame):
            log.warning("%s: news of its cache went missing before number %d: asking for all of it", peer.name, frame.number)
            peer.send(protocol.CacheSnapshot())

    @_from_either.register
    def _(self, frame: hello.PairAgent, peer: Peer) -> None:
        self.pairs.on_agent(peer, frame, self._clock())

    @_from_either.register
    def _(self, frame: hello.PairReady, peer: Peer) -> None:
        if self.pairs.on_ready(peer, frame):
            self._moves.dispatch()

    @_from_either.register
    def _(self, frame: hello.PairLost, peer: Peer) -> None:
        self.pairs.on_lost(peer, frame, self._clock())

    @_from_either.register
    def _(self, frame: PatternGrant | PatternPushed | PatternRead, peer: Peer) -> None:
        self.checks.on_frame(peer, frame)
        self._moves.dispatch()  # a pair may have come up

    @_from_either.register
    def _(self, frame: protocol.Progress, peer: Peer) -> None:
        self.grants.on_progress(frame)

    @_from_either.register
    def _(self, frame: protocol.Cancel, peer: Peer) -> None:
        self.grants.on_cancel(peer, frame)

    @_from_either.register
    def _(self, frame: protocol.Quiesced, peer: Peer) -> None:
        self.grants.on_quiesced(frame)


def _note_prediction(record: RoutedSequence, peer: DecodePeer, predicted: Predicted | None) -> None:
    record.predicted = predicted
    if predicted is not None:
        peer.breakeven_tokens = predicted.breakeven_tokens
