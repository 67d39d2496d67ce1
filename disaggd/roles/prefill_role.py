"""The prefill role: computes prompts, samples the first token, pushes the KV into the grant while it computes.

Everything here runs on the compute thread; frames, transfer events and time come in, frames and transfer commands go
out, so a test can script any order of messages. Knows nothing of sockets, text or NIXL.

    Prefill ─► chunks, each layer group pushed as it is computed ─► first token ─► Prefilled, FinishPush ─► JobEnded
        └─► first its beginning is pushed here, if decode has that cached (`prefixes.py`)

A job has a computing half (the engine's sequence) and a pushing half (the transfer thread's). Either may end first; the
job is over, and its credit returned, when both have ended. Source blocks are referenced by each push until it is done.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import singledispatchmethod

from disaggd.cluster.hello import OpenPair
from disaggd.cluster.holdings import Holding
from disaggd.cluster.offer import PrefillWork
from disaggd.cluster.protocol import (
    Abort,
    Cancel,
    Credit,
    Gauges,
    Grant,
    JobEnded,
    Prefill,
    Prefilled,
    PrefixEnded,
    Progress,
    Quiesced,
    ToNode,
)
from disaggd.engine.engine import Engine, SequenceOutput
from disaggd.engine.scheduler import Chunk, StepPlan
from disaggd.engine.sequence import Sequence
from disaggd.errors import InvalidRequest
from disaggd.ids import GrantToken, SeqId
from disaggd.roles.arrival import read_sequence
from disaggd.roles.compute import LinkId, Outbox
from disaggd.roles.deciding import measured
from disaggd.roles.gauges import node_gauges
from disaggd.roles.pair_check import PairCheck
from disaggd.roles.prefixes import PrefixIntake
from disaggd.roles.pushing import Pushing
from disaggd.transfer import messages as transfer
from disaggd.transfer.notification import FirstToken

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Job:
    """One `Prefill` frame, until its `JobEnded`."""

    link: LinkId
    sequence: Sequence
    grant: Grant | None
    arrived: float
    computed_before: PrefillWork
    """By the engine, for whomever, before its first step."""
    begun: float | None = None
    """When its first step began."""
    is_computing: bool = True
    failure: str = ""
    """Why it came to nothing, if it did."""

    @property
    def key(self) -> tuple[SeqId, int]:
        return (self.sequence.seq_id, self.sequence.attempt)


class PrefillRole:
    """One prefill node's jobs. `clock` is monotonic seconds.

    `mark()` tells of what the device was asked to compute so far whether it is done.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        credit_tokens: int,
        pushing: Pushing,
        prefixes: PrefixIntake,
        checks: PairCheck,
        vocab_size: int,
        outbox: Outbox,
        mark: Callable[[], transfer.IsReady],
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._pool = engine.pool
        self._credit_tokens = credit_tokens
        self._pushing = pushing
        self._prefixes = prefixes
        self._checks = checks
        self._vocab_size = vocab_size
        self._outbox = outbox
        self._mark = mark
        self._clock = clock
        self._jobs: dict[tuple[SeqId, int], Job] = {}
        self._pushed: dict[GrantToken, Job] = {}
        """Jobs whose pushing half has not ended."""
        self._turn_began = 0.0
        """A step begins right after the tick."""

    # ── links ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def link_up(self, link: LinkId) -> None:
        if (frame := measured(self._engine)) is not None:
            self._outbox.send(link, frame)
        self._share_credit()

    def link_down(self, link: LinkId) -> None:
        """Nobody waits for this router's jobs; its grants are quiesced without it."""
        for job in [j for j in self._jobs.values() if j.link == link]:
            self._stop(job, "its router is lost")
        self._checks.link_down(link)
        self._pushing.link_down(link)
        self._share_credit()

    def _share_credit(self) -> None:
        links = len(self._outbox.links)
        if links:
            self._outbox.broadcast(Credit(max(1, self._credit_tokens // links)))

    # ── frames ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def on_frame(self, link: LinkId, frame: ToNode) -> None:
        if not self._checks.on_frame(link, frame):
            self._on_frame(frame, link)

    @singledispatchmethod
    def _on_frame(self, frame: ToNode, link: LinkId) -> None:
        if not self._pushing.on_frame(frame):
            log.warning("a prefill node has no use for %s", type(frame).__name__)

    @_on_frame.register
    def _(self, frame: Prefill, link: LinkId) -> None:
        for older in [j for j in self._jobs.values() if j.sequence.seq_id == frame.seq]:
            if older.sequence.attempt >= frame.attempt:
                return None
            self._stop(older, "another attempt began")
        try:
            sequence = read_sequence(frame, self._vocab_size, reserve=True, output_limit=1)
            if frame.grant is not None:
                self._pushing.check(frame.grant, len(sequence.tokens))
            self._take_on(sequence, parked=frame.prefix is not None)
        except InvalidRequest as error:
            if frame.prefix is not None:
                self._outbox.send(link, PrefixEnded(frame.seq, frame.attempt, "stopped", error.message, 0, 0, 0.0))
            return self._outbox.send(link, JobEnded(frame.seq, frame.attempt, False, error.message, 0, None, None))
        job = Job(link, sequence, frame.grant, self._clock(), self._computed)
        self._jobs[job.key] = job
        if frame.grant is not None:
            self._pushed[frame.grant.token] = job
            self._pushing.begin(frame.grant, frame.seq, frame.attempt, link)
        if frame.prefix is not None:
            self._prefixes.ask(link, sequence, frame.prefix)
        return None

    def _take_on(self, sequence: Sequence, *, parked: bool) -> None:
        if parked:  # while its beginning is pushed here
            self._engine.park(sequence)
        else:
            self._engine.add(sequence)

    @_on_frame.register
    def _(self, frame: Abort, link: LinkId) -> None:
        if (job := self._jobs.get((frame.seq, frame.attempt))) is not None:
            self._stop(job, "aborted")

    @_on_frame.register
    def _(self, frame: Cancel, link: LinkId) -> None:
        if self._pushing.cancel(frame, link):
            self._stop(self._pushed[frame.token], "cancelled by decode")

    @_on_frame.register
    def _(self, frame: OpenPair, link: LinkId) -> None:
        self._prefixes.open(frame)

    @_on_frame.register
    def _(self, frame: Progress, link: LinkId) -> None:
        self._prefixes.renew(frame.tokens)

    @_on_frame.register
    def _(self, frame: Quiesced, link: LinkId) -> None:
        self._prefixes.quiesced(frame.token, frame.clean)

    # ── transfer events ──────────────────────────────────────────────────────────────────────────────────────────────

    def on_event(self, event: transfer.TransferEvent) -> None:
        if not self._checks.on_event(event):
            self._on_event(event)

    @singledispatchmethod
    def _on_event(self, event: transfer.TransferEvent) -> None:
        if not self._pushing.on_event(event):
            raise AssertionError(f"nobody told the transfer thread to send {event!r}")

    @_on_event.register
    def _(self, event: transfer.PushEnded) -> None:
        self._pushing.ended(event)
        job = self._pushed.pop(event.token)
        self._pool.touch(job.sequence.digests)
        if not (event.clean and event.finished):
            self._stop(job, "the push was stopped" if event.clean else "the push failed")
        self._end(job, event.kv_bytes, event.first_post_at, event.last_done_at)

    @_on_event.register
    def _(self, event: transfer.Landed) -> None:
        self._prefixes.landed(event)

    @_on_event.register
    def _(self, event: transfer.LandingFailed) -> None:
        self._prefixes.landing_failed(event)

    @_on_event.register
    def _(self, event: transfer.QuiescedByWire) -> None:
        self._prefixes.quiesced_by_wire(event)

    @_on_event.register
    def _(self, event: transfer.PairOpened) -> None:
        self._prefixes.opened(event)

    @_on_event.register
    def _(self, event: transfer.PairProbed) -> None:
        self._prefixes.probed(event)

    @_on_event.register
    def _(self, event: transfer.Fenced) -> None:
        self._prefixes.fenced(event)

    # ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def layers_done(self, plan: StepPlan, layers: range) -> None:
        """Push what these layers compute, once they have (a GPU is behind), while the next ones are computed."""
        is_ready: transfer.IsReady | None = None
        for chunk in plan.chunks:
            job = self._jobs.get((chunk.sequence.seq_id, chunk.sequence.attempt))
            if job is None:
                continue
            if job.begun is None:
                job.begun, job.computed_before = self._turn_began, self._computed
                self._prefixes.begun(job.key)
            if job.grant is not None and job.grant.token in self._pushed:
                is_ready = is_ready or self._mark()
                self._push(job.grant, chunk, layers, is_ready)
        self._pushing.renew_leases()

    def _push(self, grant: Grant, chunk: Chunk, layers: range, is_ready: transfer.IsReady) -> None:
        """These layers of what the chunk completes of decode's blocks, so each goes out once: what it computes beyond waits for the next.

        With the first chunk goes what was cached, with the last whatever is left.
        """
        start, table = self._pushing.whole(grant, chunk.start), chunk.sequence.block_table
        if chunk.start == chunk.sequence.num_cached:
            self._pushing.write(grant, layers, table, range(start), transfer.at_once)
        end = chunk.end if chunk.samples else self._pushing.whole(grant, chunk.end)
        self._pushing.write(grant, layers, table, range(start, end), is_ready)

    def deliver(self, outputs: Iterable[SequenceOutput]) -> None:
        """Report first tokens at once: the client has them before the transfer ends."""
        for output in outputs:
            job = self._jobs.get((output.sequence.seq_id, output.sequence.attempt))
            if job is not None:
                self._first_token(job, output)

    def _first_token(self, job: Job, output: SequenceOutput) -> None:
        job.is_computing = False
        seq, attempt = job.key
        (token,), logprob = output.tokens, output.logprobs[0] if output.logprobs else None
        now = self._clock()
        prefill_ms, reported_ms = (now - (job.begun or job.arrived)) * 1e3, (now - job.arrived) * 1e3
        num_cached, reason, work, before = job.sequence.num_cached, output.finish_reason, self._computed, job.computed_before
        computed = PrefillWork(work.num_tokens - before.num_tokens, work.context - before.context)
        self._outbox.send(
            job.link, Prefilled(seq, attempt, output.start, token, logprob, reason, num_cached, prefill_ms, reported_ms, computed)
        )
        if job.grant is None:
            self._end(job)
        elif output.finish_reason is None:
            self._pushing.finish(job.grant.token, FirstToken(token, logprob))
        else:  # the sequence is over: decode needs no KV
            self._stop(job, "the first token ended the sequence")

    @property
    def _computed(self) -> PrefillWork:
        """By the engine since its start."""
        return PrefillWork(self._engine.prefilled_tokens, self._engine.prefilled_context)

    def tick(self) -> None:
        """What is due for the pushes, in either direction."""
        self._turn_began = self._clock()
        self._pushing.tick()
        self._prefixes.tick()
        self._checks.tick()

    def next_deadline(self) -> float | None:
        deadlines = (self._pushing.next_deadline(), self._prefixes.next_deadline(), self._checks.next_deadline())
        return min((at for at in deadlines if at is not None), default=None)

    @property
    def is_idle(self) -> bool:
        return not self._jobs and self._pushing.is_idle

    def gauges(self) -> Gauges:
        granted = self._prefixes.blocks_granted + self._checks.blocks_granted
        quarantined = self._prefixes.blocks_quarantined + self._checks.blocks_quarantined
        return node_gauges(
            self._engine,
            self._prefixes.verified,
            granted=granted,
            quarantined=quarantined,
            promised=granted + quarantined,
            held=self._pushing.num_blocks_held,
        )

    def holdings(self) -> Iterable[Holding]:
        return (*self._prefixes.holdings(), *self._checks.holdings(), *self._pushing.holdings())

    # ── endings ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _stop(self, job: Job, reason: str) -> None:
        """End both halves: compute nothing more, post nothing more. Harmless for a half that has ended."""
        job.failure = job.failure or reason
        if job.is_computing:
            job.is_computing = False
            self._prefixes.drop(job.key, reason)
            self._engine.abort(job.sequence)
        if job.grant is None:
            self._end(job)
        elif job.grant.token in self._pushed:
            self._pushing.stop(job.grant.token)

    def _end(self, job: Job, kv_bytes: int = 0, first_post_at: float | None = None, last_done_at: float | None = None) -> None:
        """Both halves have ended: the report returns the job's credit."""
        del self._jobs[job.key]
        seq, attempt = job.key
        first_post_ms, last_done_ms = self._since_ms(job, first_post_at), self._since_ms(job, last_done_at)
        self._outbox.send(job.link, JobEnded(seq, attempt, not job.failure, job.failure, kv_bytes, first_post_ms, last_done_ms))

    def _since_ms(self, job: Job, at: float | None) -> float | None:
        return None if at is None else (at - job.arrived) * 1e3
