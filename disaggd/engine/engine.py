"""The engine: token ids in, token ids out. `schedule`, `execute`, `settle`.

Runs on the compute thread, which is its only caller. Knows nothing of requests, text, links or other nodes: a sequence
that another machine computed is parked here and later resumed in blocks that the caller has had filled.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as ReadOnlySequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Protocol

from disaggd.engine.blocks import BlockPool
from disaggd.engine.prefix_cache import PrefixCache
from disaggd.engine.scheduler import Chunk, Limits, Scheduler, StepPlan
from disaggd.engine.sequence import FinishReason, Sequence, SequenceState
from disaggd.engine.step_cost import BegunStep, StepPace
from disaggd.errors import ContextTooLong
from disaggd.ids import BlockId, SeqId
from disaggd.sampling import SamplingParams, TokenLogprob


class Sampled(Protocol):
    """A drawn token, and its logprob if the request asked for logprobs."""

    @property
    def token(self) -> int: ...
    @property
    def logprob(self) -> TokenLogprob | None: ...


class Runner(Protocol):
    """What computes a plan: a `ModelRunner`, or a test's stand-in."""

    lookahead: int
    """Steps to launch before the results of an earlier one are asked for: 0 where `execute` computes, 1 where a device does."""

    def execute(self, plan: StepPlan, layers_done: Callable[[range], None] | None) -> Callable[[], ReadOnlySequence[Sampled]]:
        """Write K and V of the plan's chunks into their blocks; what it returns gives one token for each of `plan.sampling`, in that order.

        `layers_done(range(a, b))` is called as soon as K and V of these layers are written, or launched to be; all layers once per step.
        Calling the result waits for the device. A pending token of a sequence is one that the step launched just before samples.
        """


@dataclass(frozen=True, slots=True)
class _Step:
    """A launched step, until its tokens are settled."""

    sequences: list[Sequence]
    """Those that get a token, in the order of the results."""
    results: Callable[[], ReadOnlySequence[Sampled]]
    written: list[BlockId]
    """Blocks that it writes, each with a reference of the step's own: whoever gets them next may not write before it has."""
    computed: list[tuple[Chunk, list[BlockId]]]
    """What it computes, and the block table it does that with."""
    begun: BegunStep


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """What a step, or a resume, brought to one sequence."""

    sequence: Sequence
    start: int
    """Index of the first token here among the sequence's outputs, `num_given - num_prompt_tokens` being this attempt's first."""
    tokens: tuple[int, ...]
    """The token that stopped the sequence is among them."""
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason | None
    handed_off: bool
    """The sequence has ended here, though not of itself: what follows is computed elsewhere."""


@dataclass(frozen=True, slots=True)
class EngineGauges:
    """Sequences by state, and the pool's blocks. Those neither free nor cached are held by running sequences, or outside the engine."""

    waiting: int
    running: int
    queued: int
    blocks_free: int
    blocks_cached: int
    preemptions: int
    """Since the start."""
    prefill_backlog_tokens: int
    """Tokens to be computed before the next one of each sequence here, those of decodes apart."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What a prompt that comes now would run beside, and behind."""

    decodes: int
    decode_context: int
    """Tokens that they attend to, all together."""
    prefills: tuple[tuple[int, int], ...]
    """(tokens to compute, computed ones before them) of each prompt that waits or is half computed."""


class Engine:
    """Sequences from arrival to end, one step at a time.

    `pool` is shared with the caller, who allocates from it what he promises to other nodes and retains what they still
    read; all on the compute thread. `pace` learns what steps take, and limits those that would take too long.
    """

    def __init__(
        self, runner: Runner, pool: BlockPool, limits: Limits, eos_token_ids: Iterable[int] = (), pace: StepPace | None = None
    ) -> None:
        self.pool = pool
        self.limits = limits
        self.sequences: dict[SeqId, Sequence] = {}
        """All that have not ended."""
        self._runner = runner
        self.cache = PrefixCache(pool)
        self.pace = pace or StepPace(None, time.perf_counter)
        self.prefilled_tokens = 0
        """Of prompts, whoever's, by all steps that have been settled."""
        self.prefilled_context = 0.0
        """Σ n · (start + n/2) over their chunks of n tokens."""
        self._scheduler = Scheduler(pool, limits, self.cache, self.pace)
        self._eos = frozenset(eos_token_ids)
        self._pool_tokens = pool.num_blocks * pool.block_size
        self._arrivals = count()
        self._stalled_at: int | None = None
        self._launched: deque[_Step] = deque()

    # ── what comes in ────────────────────────────────────────────────────────────────────────────────────────────────

    def add(self, sequence: Sequence) -> None:
        """Take a sequence on, to be computed here: WAITING. Raises ContextTooLong."""
        self._register(sequence)
        self.cache.find(sequence)  # how much of it is left to compute is told while it waits
        self._scheduler.wait(sequence)

    def park(self, sequence: Sequence) -> None:
        """Take a sequence on whose KV another node sends: QUEUED, without blocks, until `resume` or `unpark`. Raises ContextTooLong."""
        self._register(sequence)
        sequence.move(SequenceState.QUEUED)

    def unpark(self, sequence: Sequence) -> None:
        """QUEUED → WAITING: what is not cached by now is computed here. It is in line as if it had never been parked."""
        self._stalled_at = None
        sequence.move(SequenceState.WAITING)
        self._scheduler.wait(sequence)

    def earmark(self, sequence: Sequence, num_blocks: int) -> None:
        """Keep so many blocks, as they come free, for a grant to a parked sequence, until `end_earmark` or the sequence's end.

        They are kept from later earmarks, from grants without one, and from younger sequences that are to be computed here.
        """
        assert sequence.state is SequenceState.QUEUED
        self._scheduler.earmarks.setdefault(sequence, num_blocks)

    def blocks_earmarked_before(self, sequence: Sequence) -> int:
        """Blocks that are kept for others, whose grants go before one to `sequence`."""
        return sum(self._scheduler.earmarked_before(sequence))

    def end_earmark(self, sequence: Sequence) -> None:
        """It has been granted its blocks. Harmless without an earmark."""
        self._stalled_at = None
        self._scheduler.earmarks.pop(sequence, None)

    def resume(
        self, sequence: Sequence, blocks: list[BlockId], token: int, logprob: TokenLogprob | None = None, *, num_cached: int = 0
    ) -> SequenceOutput:
        """QUEUED → RUNNING: K and V of all its tokens lie in `blocks`, and `token` was sampled after them.

        The caller's references on `blocks` become the sequence's; the first `num_cached` tokens' were found in the cache. When `token`
        ends the sequence it is FINISHED, and the blocks are released, as after a step.
        """
        assert len(blocks) >= self.pool.blocks_for(len(sequence.tokens)), f"{sequence.seq_id}: {len(blocks)} blocks cannot hold it"
        self._stalled_at = None
        self.cache.begin(sequence, blocks[: num_cached // self.pool.block_size])
        self._scheduler.run(sequence, blocks)
        sequence.num_computed = len(sequence.tokens)
        self.cache.register(sequence, sequence.num_computed)
        return self._deliver(sequence, token, logprob)

    def abort(self, sequence: Sequence) -> None:
        """End a sequence, in any state; one that has ended already stays as it is. Leaves none of its references behind."""
        if not sequence.is_finished:
            self._stalled_at = None
            self._finish(sequence, "abort")

    # ── the step ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def step(self, layers_done: Callable[[StepPlan, range], None] | None = None) -> list[SequenceOutput]:
        """Launch a step, and return the tokens of the oldest one launched that is due; at once, and nothing, when there is neither.

        Where a device computes, that is the step before: the host plans and launches this one meanwhile. `layers_done(plan, range(a, b))`
        is called during the launch, as soon as these layers of the plan's chunks are in their blocks, or launched to be.
        """
        plan = self._scheduler.schedule()
        self._stalled_at = None if plan.chunks or self._launched else self.pool.num_available
        if plan.chunks:
            self._launched.append(self._launch(plan, layers_done))
        if len(self._launched) > (self._runner.lookahead if plan.chunks else 0):
            return self._settle(self._launched.popleft())
        return []

    def rehearse(self, plan: StepPlan, times: int, *, learns: bool) -> None:
        """Compute `plan`, over sequences that are nobody's, so many times, and learn what it takes. With nothing else to do only.

        Nothing is delivered, and no sequence changes: each step computes the same tokens anew.
        """
        assert not self.sequences and not self._launched, "a rehearsal wants the engine for itself"
        launched = deque[tuple[BegunStep, Callable[[], object]]]()
        for left in reversed(range(times)):
            launched.append((self.pace.begin(plan), self._runner.execute(plan, None)))
            while len(launched) > min(self._runner.lookahead, left):
                begun, results = launched.popleft()
                results()
                self.pace.settled(begun, learns=learns)

    def _launch(self, plan: StepPlan, layers_done: Callable[[StepPlan, range], None] | None) -> _Step:
        begun = self.pace.begin(plan)
        results = self._runner.execute(plan, partial(layers_done, plan) if layers_done else None)
        written = [block for chunk in plan.chunks for block in self._written(chunk)]
        self.pool.retain(written)
        computed = [(chunk, chunk.sequence.block_table) for chunk in plan.chunks]
        sampling = [chunk.sequence for chunk in plan.sampling]
        for chunk in plan.chunks:
            chunk.sequence.num_computed = chunk.end
        for sequence in sampling:
            sequence.num_pending += 1
        return _Step(sampling, results, written, computed, begun)

    def _written(self, chunk: Chunk) -> list[BlockId]:
        size = self.pool.block_size
        return chunk.sequence.block_table[chunk.start // size : -(-chunk.end // size)]

    def _settle(self, step: _Step) -> list[SequenceOutput]:
        drawn = step.results()
        self.pace.settled(step.begun)
        self.prefilled_tokens += step.begun.load.prefill_tokens
        self.prefilled_context += step.begun.load.prefill_context
        for chunk, blocks in step.computed:
            if chunk.sequence.block_table is blocks:  # else what the step read may have been overwritten meanwhile
                self.cache.register(chunk.sequence, chunk.end)
        self.pool.release(step.written)
        outputs = []
        for sequence, token in zip(step.sequences, drawn, strict=True):
            sequence.num_pending -= 1
            if not sequence.is_finished:  # it may have ended by the step before, or been aborted, after this one was launched
                outputs.append(self._deliver(sequence, token.token, token.logprob))
        return outputs

    def _deliver(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> SequenceOutput:
        """Append a token, and end the sequence if that was its last."""
        start = sequence.num_outputs
        sequence.tokens.append(token)
        reason = self._stop_reason(sequence)
        handed_off = reason is None and sequence.reached_output_limit
        if reason or handed_off:
            self._finish(sequence, reason)
        return SequenceOutput(sequence, start, (token,), None if logprob is None else (logprob,), reason, handed_off)

    def _stop_reason(self, sequence: Sequence) -> FinishReason | None:
        """Why the last token ends the sequence, if it does."""
        sampling, token = sequence.sampling, sequence.tokens[-1]
        if token in sampling.stop_token_ids or (token in self._eos and not sampling.ignore_eos):
            return "stop"
        return "length" if len(sequence.tokens) >= self._length_limit(sequence) else None

    def _length_limit(self, sequence: Sequence) -> int:
        """Tokens with which the request itself has all it may have."""
        # A sequence that goes on elsewhere is not bound by this pool.
        limit = self.context_limit if sequence.output_limit is None else self.limits.max_model_len
        return min(limit, sequence.num_prompt_tokens + sequence.sampling.max_tokens)

    # ── what is known ────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def context_limit(self) -> int:
        """Tokens that one sequence may have, prompt and output: what both the model and the pool can hold."""
        return min(self.limits.max_model_len, self._pool_tokens)

    @property
    def has_work(self) -> bool:
        """Whether a step could compute something, or bring the tokens of one that was launched.

        False as well when the last step could not for want of blocks and none has come free since: then only a call
        from outside helps (a release, an abort, a resume), so the caller may sleep until it has one to make.
        """
        if self._launched:
            return True
        return bool(self._scheduler.running or self._scheduler.waiting) and self._stalled_at != self.pool.num_available

    @property
    def is_stalled(self) -> bool:
        """Whether nothing runs, though something waits: the last step had no blocks for it, and none has come free since."""
        return bool(self._scheduler.waiting) and not self._scheduler.running and not self.has_work

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    def room_for_grant(self, sequence: Sequence, need: int, num_granted: int) -> bool:
        """Whether `need` blocks may be promised to another node for a parked `sequence` now.

        Growth comes first, then the preempted, then grants, those with an earmark before those without. A place among the running
        must come free too: not counting those of the `num_granted` grants that are out, and of older sequences that wait here. An
        earmark that is kept from one of these would have it wait for the other grant, and that for it: such a one does not count.
        """
        before = self._scheduler.earmarked_before(sequence)
        older = sum(waiting.arrival < sequence.arrival and not self._scheduler.kept_from(waiting) for waiting in self._scheduler.waiting)
        if self.num_running + num_granted + older + len(before) >= self.limits.max_sequences:
            return False
        return self.pool.room_for_grant(need + sum(before) + self._scheduler.blocks_owed(), self.num_running)

    def load(self) -> EngineLoad:
        """One pass over all that run or wait."""
        decoding = [sequence.num_tokens for sequence in self._scheduler.running if sequence.num_uncomputed <= 1]
        return EngineLoad(len(decoding), sum(decoding), tuple(self._prompts_left()))

    def _prompts_left(self) -> Iterator[tuple[int, int]]:
        """`Sequence.to_prefill` of each that runs or waits, and does not decode."""
        running, waiting = self._scheduler.running, self._scheduler.waiting
        yield from (sequence.to_prefill for sequence in running if sequence.num_uncomputed > 1)
        yield from (sequence.to_prefill for sequence in waiting)

    def gauges(self) -> EngineGauges:
        """A snapshot for metrics."""
        waiting, running = self._scheduler.waiting, self._scheduler.running
        return EngineGauges(
            waiting=len(waiting),
            running=len(running),
            queued=sum(sequence.state is SequenceState.QUEUED for sequence in self.sequences.values()),
            blocks_free=self.pool.num_free,
            blocks_cached=self.pool.num_cached,
            preemptions=self._scheduler.num_preemptions,
            prefill_backlog_tokens=sum(num_tokens for num_tokens, _ in self._prompts_left()),
        )

    # ── arrival and end ──────────────────────────────────────────────────────────────────────────────────────────────

    def _register(self, sequence: Sequence) -> None:
        """Refuse what has no room for one more token: neither a step nor a grant could ever serve it."""
        num_tokens = len(sequence.tokens)
        if num_tokens >= self.limits.max_model_len:
            raise ContextTooLong(num_tokens, self.limits.max_model_len - 1, "the model's context less one token of output")
        if num_tokens >= self._pool_tokens:
            raise ContextTooLong(num_tokens, self._pool_tokens - 1, "the KV pool less one token of output")
        assert sequence.seq_id not in self.sequences, f"{sequence.seq_id} is here already: abort the older attempt first"
        self._stalled_at = None
        sequence.arrival = next(self._arrivals)
        sequence.token_limit = self._length_limit(sequence)
        if sequence.output_limit is not None:
            sequence.token_limit = min(sequence.token_limit, sequence.num_given + sequence.output_limit)
        self.sequences[sequence.seq_id] = sequence

    def _finish(self, sequence: Sequence, reason: FinishReason | None) -> None:
        self._scheduler.drop(sequence)
        sequence.move(SequenceState.FINISHED)
        sequence.finish_reason = reason
        del self.sequences[sequence.seq_id]


def generate(engine: Engine, tokens: list[int], sampling: SamplingParams) -> Iterator[SequenceOutput]:
    """The oracle: run one sequence to its end in an engine that has nothing else to do, yielding its tokens as they come.

    Raises ContextTooLong. Closing the iterator early aborts the sequence.
    """
    assert not engine.sequences, "the oracle wants the engine for itself"
    sequence = Sequence(SeqId("oracle"), list(tokens), sampling, num_prompt_tokens=len(tokens))
    engine.add(sequence)
    try:
        while not sequence.is_finished:
            yield from engine.step()
    finally:
        engine.abort(sequence)
