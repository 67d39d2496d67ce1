"""The prefill role: computes prompts, samples the first token, pushes the KV into the grant while it computes.

Everything here runs on the compute thread; frames, transfer events and time come in, frames and transfer commands go
out, so a test can script any order of messages. Knows nothing of sockets, text or NIXL.

    Prefill ─► chunks, each layer group pushed as it is computed ─► first token ─► Prefilled, FinishPush ─► JobEnded

A job has a computing half (the engine's sequence) and a pushing half (the transfer thread's). Either may end first; the
job is over, and its credit returned, when both have ended. Source blocks are referenced by each push until it is done.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import singledispatchmethod

from disaggd.cluster.protocol import (
    Abort,
    Cancel,
    ConnectPair,
    Credit,
    Gauges,
    Grant,
    JobEnded,
    PairLost,
    PairReady,
    Prefill,
    Prefilled,
    Progress,
    Quiesced,
    ToNode,
)
from disaggd.engine.engine import Engine, SequenceOutput
from disaggd.engine.scheduler import Chunk, StepPlan
from disaggd.engine.sequence import Sequence
from disaggd.errors import InvalidRequest
from disaggd.ids import AgentId, BlockId, GrantToken, NodeName, SeqId
from disaggd.roles.arrival import read_sequence
from disaggd.roles.compute import LinkId, Outbox
from disaggd.transfer import messages as transfer
from disaggd.transfer.notification import FirstToken

log = logging.getLogger(__name__)

TOMBSTONES = 4096
"""Grants that are remembered after they ended: long past any message that may still speak of them."""

RENEWALS_PER_LEASE = 5
"""A lease survives four lost or late renewals."""


@dataclass(slots=True)
class Job:
    """One `Prefill` frame, until its `JobEnded`."""

    link: LinkId
    sequence: Sequence
    grant: Grant | None
    arrived: float
    begun: float | None = None
    """When its first step began."""
    is_computing: bool = True
    is_pushing: bool = False
    stopped_at: float | None = None
    """When its push was told to post nothing more."""
    cancels: list[LinkId] = field(default_factory=list)
    """Routers that passed on a `Cancel` and wait for `Quiesced`."""
    failure: str = ""
    """Why it came to nothing, if it did."""

    @property
    def key(self) -> tuple[SeqId, int]:
        return (self.sequence.seq_id, self.sequence.attempt)


@dataclass(frozen=True, slots=True)
class Tombstone:
    """What became of a grant: a late `Cancel` is answered from it, a late job refused."""

    link: LinkId
    decode: NodeName
    clean: bool
    finished: bool
    """All of it was pushed: decode learns that by itself."""


class PrefillRole:
    """One prefill node's jobs. `submit` takes commands to the transfer thread; `clock` is monotonic seconds.

    `mark()` tells of what the device was asked to compute so far whether it is done.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        credit_tokens: int,
        lease_s: float,
        quiesce_s: float,
        vocab_size: int,
        outbox: Outbox,
        submit: Callable[[transfer.TransferCommand], None],
        mark: Callable[[], transfer.IsReady],
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._pool = engine.pool
        self._credit_tokens = credit_tokens
        self._renew_every_s = lease_s / RENEWALS_PER_LEASE
        self._quiesce_s = quiesce_s
        self._vocab_size = vocab_size
        self._outbox = outbox
        self._submit = submit
        self._mark = mark
        self._clock = clock
        self._jobs: dict[tuple[SeqId, int], Job] = {}
        self._pushes: dict[GrantToken, Job] = {}
        self._tombstones: OrderedDict[GrantToken, Tombstone] = OrderedDict()
        self._ready: dict[NodeName, AgentId] = {}
        """Decode nodes whose agent has confirmed the probe."""
        self._renew_at = 0.0
        self._turn_began = 0.0
        """A step begins right after the tick."""
        self._reading: dict[BlockId, int] = {}
        """Blocks that posted pushes still read, and how many do."""

    # ── links ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def link_up(self, link: LinkId) -> None:
        self._share_credit()

    def link_down(self, link: LinkId) -> None:
        """Nobody waits for this router's jobs; its grants are quiesced without it."""
        for job in [j for j in self._jobs.values() if j.link == link]:
            self._stop(job, "its router is lost")
        for token, stone in self._tombstones.items():
            if stone.link == link and not stone.finished:  # its `Quiesced` may have been lost with the router
                self._submit(transfer.QuiesceByWire(token, stone.decode, stone.clean))
        self._share_credit()

    def _share_credit(self) -> None:
        links = len(self._outbox.links)
        if links:
            self._outbox.broadcast(Credit(max(1, self._credit_tokens // links)))

    # ── frames ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def on_frame(self, link: LinkId, frame: ToNode) -> None:
        self._on_frame(frame, link)

    @singledispatchmethod
    def _on_frame(self, frame: object, link: LinkId) -> None:
        log.warning("a prefill node has no use for %s", type(frame).__name__)

    @_on_frame.register
    def _(self, frame: Prefill, link: LinkId) -> None:
        for older in [j for j in self._jobs.values() if j.sequence.seq_id == frame.seq]:
            if older.sequence.attempt >= frame.attempt:
                return None
            self._stop(older, "another attempt began")
        try:
            sequence = read_sequence(frame, self._vocab_size, reserve=True, output_limit=1)
            self._check_grant(frame.grant, len(sequence.tokens))
            self._engine.add(sequence)
        except InvalidRequest as error:
            return self._outbox.send(link, JobEnded(frame.seq, frame.attempt, False, error.message, 0, None, None))
        job = Job(link, sequence, frame.grant, self._clock())
        self._jobs[job.key] = job
        if frame.grant is not None:
            job.is_pushing = True
            self._pushes[frame.grant.token] = job
            self._submit(transfer.BeginPush(frame.grant.token, frame.grant.decode, frame.grant.agent_id, frame.grant.lease_s))
        return None

    def _check_grant(self, grant: Grant | None, num_tokens: int) -> None:
        """Raises InvalidRequest for a grant that cannot, or may not, be written."""
        if grant is None:
            return
        if grant.token in self._tombstones or grant.token in self._pushes:
            raise InvalidRequest("the grant was revoked before its job came")
        start, count = grant.first_token_index, len(grant.block_ids)
        if start < 0 or start % self._pool.block_size or self._pool.blocks_for(num_tokens - start) > count:
            raise InvalidRequest(f"a grant of {count} blocks from token {start} does not hold {num_tokens} tokens")
        if self._ready.get(grant.decode) != grant.agent_id:
            # The router believes in a pair that is gone, perhaps since another router told us to connect elsewhere.
            self._outbox.broadcast(PairLost(grant.decode, grant.agent_id, "not connected"))
            raise InvalidRequest(f"no KV path to that agent of {grant.decode}")

    @_on_frame.register
    def _(self, frame: Abort, link: LinkId) -> None:
        if (job := self._jobs.get((frame.seq, frame.attempt))) is not None:
            self._stop(job, "aborted")

    @_on_frame.register
    def _(self, frame: Cancel, link: LinkId) -> None:
        """Stop pushing; say so when nothing is in flight. A grant we do not know (yet) is never written."""
        job = self._pushes.get(frame.token)
        if job is not None:
            job.cancels.append(link)
            return self._stop(job, "cancelled by decode")
        stone = self._tombstones.get(frame.token)
        if stone is None:
            stone = self._bury(frame.token, Tombstone(link, frame.decode, clean=True, finished=False))
        return self._outbox.send(link, Quiesced(frame.token, frame.decode, stone.clean))

    @_on_frame.register
    def _(self, frame: ConnectPair, link: LinkId) -> None:
        if self._ready.get(frame.peer) != frame.agent_id:  # else another router asks for what is there: probe once more for it
            self._ready.pop(frame.peer, None)
        self._submit(transfer.ConnectPair(frame.peer, frame.peer_incarnation, frame.agent_id, frame.metadata, frame.place))

    @_on_frame.register
    def _(self, frame: PairReady, link: LinkId) -> None:
        self._ready[frame.peer] = frame.agent_id

    # ── transfer events ──────────────────────────────────────────────────────────────────────────────────────────────

    def on_event(self, event: transfer.TransferEvent) -> None:
        self._on_event(event)

    @singledispatchmethod
    def _on_event(self, event: object) -> None:
        raise AssertionError(f"a prefill node receives nothing, and got {event!r}")

    @_on_event.register
    def _(self, event: transfer.PairConnected) -> None:
        log.info("probing the KV path to %s", event.peer)

    @_on_event.register
    def _(self, event: transfer.PairFailed) -> None:
        if self._ready.get(event.peer) == event.agent_id:
            del self._ready[event.peer]
        self._outbox.broadcast(PairLost(event.peer, event.agent_id, event.reason))

    @_on_event.register
    def _(self, event: transfer.HandleDone) -> None:
        self._pool.release(event.source)
        self._count_reads(event.source, -1)

    @_on_event.register
    def _(self, event: transfer.PushEnded) -> None:
        """Nothing is in flight for this grant any more, and nothing will be."""
        job = self._pushes.pop(event.token)
        assert job.grant is not None
        job.is_pushing = False
        self._bury(event.token, Tombstone(job.link, job.grant.decode, event.clean, event.finished))
        for link in job.cancels:
            self._outbox.send(link, Quiesced(event.token, job.grant.decode, event.clean))
        if not event.finished:  # decode may have no router that could ask for it
            self._submit(transfer.QuiesceByWire(event.token, job.grant.decode, event.clean))
        if not (event.clean and event.finished):
            self._stop(job, "the push was stopped" if event.clean else "the push failed")
        self._end(job, event.kv_bytes, event.first_post_at, event.last_done_at)

    # ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def layers_done(self, plan: StepPlan, layers: range) -> None:
        """Push what these layers compute, once they have (a GPU is behind), while the next ones are computed."""
        is_ready: transfer.IsReady | None = None
        for chunk in plan.chunks:
            job = self._jobs.get((chunk.sequence.seq_id, chunk.sequence.attempt))
            if job is None:
                continue
            job.begun = job.begun or self._turn_began
            if job.grant is not None and job.is_pushing:
                is_ready = is_ready or self._mark()
                self._push(job.grant, chunk, layers, is_ready)
        self._renew_leases()

    def _push(self, grant: Grant, chunk: Chunk, layers: range, is_ready: transfer.IsReady) -> None:
        """One handle: these layers of the blocks that the chunk filled. Chunks end on blocks, so each goes out once."""
        size = self._pool.block_size
        skip = grant.first_token_index // size
        first, last = max(skip, chunk.start // size), -(-chunk.end // size)
        if first >= last:
            return  # decode has it all
        source = tuple(chunk.sequence.block_table[first:last])
        target = grant.block_ids[first - skip : last - skip]
        self._pool.retain(source)
        self._count_reads(source, +1)
        self._submit(transfer.PushBlocks(grant.token, layers, source, target, is_ready))

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
        self._outbox.send(job.link, Prefilled(seq, attempt, output.start, token, logprob, output.finish_reason, 0, prefill_ms, reported_ms))
        if job.grant is None:
            self._end(job)
        elif output.finish_reason is None:
            self._submit(transfer.FinishPush(job.grant.token, FirstToken(token, logprob)))
        else:  # the sequence is over: decode needs no KV
            self._stop(job, "the first token ended the sequence")

    def tick(self) -> None:
        """Leases to renew, and decode nodes that take what is in flight for so long that their pair is given up."""
        self._turn_began = self._clock()
        self._renew_leases()
        overdue = self._turn_began - self._quiesce_s
        for peer in {j.grant.decode for j in self._pushes.values() if j.grant and j.stopped_at is not None and j.stopped_at <= overdue}:
            self._close_pair(peer)

    def _close_pair(self, peer: NodeName) -> None:
        """No error comes from a peer that hangs: destroying our agent is what ends its handles, and frees their blocks."""
        if (agent_id := self._ready.pop(peer, None)) is not None:
            log.warning("%s takes nothing any more: closing the KV path to it", peer)
            self._submit(transfer.ClosePair(peer))
            self._outbox.broadcast(PairLost(peer, agent_id, "writes to it do not end"))

    def next_deadline(self) -> float | None:
        return self._renew_at if self._pushes else None

    def _renew_leases(self) -> None:
        """Both sides count the lease on their own clock; this renews it on both."""
        now = self._clock()
        if not self._pushes or now < self._renew_at:
            return
        self._renew_at = now + self._renew_every_s
        by_link: dict[LinkId, list[GrantToken]] = {}
        for token, job in self._pushes.items():
            self._submit(transfer.RenewLease(token))
            by_link.setdefault(job.link, []).append(token)
        for link, tokens in by_link.items():
            self._outbox.send(link, Progress(tuple(tokens)))
        self._outbox.flush()

    def gauges(self) -> Gauges:
        engine, free = self._engine.gauges(), self._pool.num_free
        held = sum(self._pool.references(block) == reads for block, reads in self._reading.items())
        return Gauges(
            waiting=engine.waiting,
            running=engine.running,
            queued=engine.queued,
            blocks_free=free,
            blocks_cached=0,
            blocks_used=self._pool.num_blocks - free - held,
            blocks_granted=0,
            blocks_held=held,
            blocks_quarantined=0,
            preemptions=engine.preemptions,
        )

    # ── endings ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _stop(self, job: Job, reason: str) -> None:
        """End both halves: compute nothing more, post nothing more. Harmless for a half that has ended."""
        job.failure = job.failure or reason
        if job.is_computing:
            job.is_computing = False
            self._engine.abort(job.sequence)
        if job.is_pushing:
            assert job.grant is not None
            job.stopped_at = job.stopped_at or self._clock()
            self._submit(transfer.CancelPush(job.grant.token))
        elif job.grant is None:
            self._end(job)

    def _end(self, job: Job, kv_bytes: int = 0, first_post_at: float | None = None, last_done_at: float | None = None) -> None:
        """Both halves have ended: the report returns the job's credit."""
        del self._jobs[job.key]
        seq, attempt = job.key
        first_post_ms, last_done_ms = self._since_ms(job, first_post_at), self._since_ms(job, last_done_at)
        self._outbox.send(job.link, JobEnded(seq, attempt, not job.failure, job.failure, kv_bytes, first_post_ms, last_done_ms))

    def _bury(self, token: GrantToken, stone: Tombstone) -> Tombstone:
        self._tombstones[token] = stone
        while len(self._tombstones) > TOMBSTONES:
            self._tombstones.popitem(last=False)
        return stone

    def _count_reads(self, blocks: Iterable[BlockId], change: int) -> None:
        for block in blocks:
            reads = self._reading.get(block, 0) + change
            if reads:
                self._reading[block] = reads
            else:
                del self._reading[block]

    def _since_ms(self, job: Job, at: float | None) -> float | None:
        return None if at is None else (at - job.arrived) * 1e3
