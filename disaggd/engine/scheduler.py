"""Who computes what in the next step, and in which blocks.

A sequence needs `num_tokens - num_computed` tokens computed: many is prefill, one is decode. Each step takes all
running decodes, and fills the rest of its token budget with prefill chunks, first come first served; beside decodes only as
far as its time budget allows, so that they are not held up for longer than they should. A sequence is
admitted with the blocks of all its tokens, so that prefill never stops half-way for want of memory: only decode grows,
one block at a time. It begins behind the longest prefix that is cached.

When blocks run out, the youngest that may be is preempted: it gives its blocks back and computes everything anew later.
A sequence takes blocks only from younger ones; the youngest waits where it is. So the oldest always advances, and every
sequence comes to its end.

Owned by the compute thread alone. Knows nothing of tensors, and not why a sequence ends.
"""

from bisect import insort
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

from disaggd.engine.blocks import BlockPool
from disaggd.engine.prefix_cache import PrefixCache
from disaggd.engine.sequence import Sequence, SequenceState
from disaggd.errors import ConfigError
from disaggd.ids import BlockId

GRAIN = 4
"""A chunk ends on a multiple of so many tokens, so that what decodes wait for can be sized finely: each takes a CPU a millisecond."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one engine takes on at once."""

    max_step_tokens: int
    """Tokens computed in one step; at least a block. Less than `max_sequences` more lets decodes hold up prefills."""
    max_sequences: int
    """Admit no further sequence while so many run. Those resumed come on top: their blocks are here already."""
    max_model_len: int
    """Tokens of one sequence, prompt and output."""

    def check(self, block_size: int) -> None:
        """Raises ConfigError for what would leave a sequence waiting for ever."""
        if self.max_step_tokens < block_size:
            raise ConfigError(f"max_step_tokens: {self.max_step_tokens} is less than a block of {block_size} tokens; raise it")
        if self.max_sequences < 1:
            raise ConfigError(f"max_sequences: {self.max_sequences} lets no sequence run; raise it")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `[start, end)` of a sequence, to be computed in this step. Ends at the last token, or on a multiple of `GRAIN`.

    One with `reserve` ends on a block boundary instead: its blocks are pushed as they are computed, each once.
    """

    sequence: Sequence
    start: int
    end: int
    samples: bool
    """It reaches the sequence's last token: the next one is sampled."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step's work. Every sequence appears once, and has the blocks for its chunk."""

    chunks: tuple[Chunk, ...]

    @property
    def sampling(self) -> list[Chunk]:
        """The chunks that sample, in the order of the plan: the order of the runner's results."""
        return [chunk for chunk in self.chunks if chunk.samples]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.end - chunk.start for chunk in self.chunks)


class StepBudget(Protocol):
    """What a step has time for."""

    def prefill_tokens(self, decodes: int, decode_context: int, start: int) -> int | None:
        """Prefill tokens, the first of them after `start` others, beside so many decodes of so much context together. None: no limit."""


class Scheduler:
    """Plans steps over the sequences it was given; the engine settles what came of them.

    Raises ConfigError as `limits.check` does.
    """

    def __init__(self, pool: BlockPool, limits: Limits, cache: PrefixCache, budget: StepBudget) -> None:
        limits.check(pool.block_size)
        self.waiting: list[Sequence] = []
        """The preempted, then the others; each by age."""
        self.running: list[Sequence] = []
        """By age, the oldest first."""
        self.num_preemptions = 0
        self.earmarks: dict[Sequence, int] = {}
        """Blocks to be kept for QUEUED sequences that have waited long for a grant, in the order in which that was asked for."""
        self._pool = pool
        self._limits = limits
        self._cache = cache
        self._budget = budget

    def wait(self, sequence: Sequence) -> None:
        """Put a WAITING sequence in line: behind the preempted and those that came before."""
        assert sequence.state is SequenceState.WAITING
        insort(self.waiting, sequence, key=_turn)

    def run(self, sequence: Sequence, blocks: list[BlockId]) -> None:
        """WAITING or QUEUED → RUNNING in `blocks`, whose references become the sequence's."""
        sequence.move(SequenceState.RUNNING)
        sequence.block_table = blocks
        insort(self.running, sequence, key=_age)

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence, whatever its state, and release its blocks. The caller moves it on."""
        if sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
        elif sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
        self.earmarks.pop(sequence, None)
        self._cache.leave(sequence)
        self._pool.release(sequence.block_table)
        sequence.block_table = []

    def schedule(self) -> StepPlan:
        """Plan the next step: decodes, prefills under way, then those admitted now. May preempt; may be empty.

        The first that the rest of the budget cannot serve ends the step: nobody overtakes.
        """
        ready = [sequence for sequence in tuple(self.running) if not sequence.is_complete and self._has_blocks(sequence)]
        prefills = [sequence for sequence in ready if _is_prefill(sequence)]
        step = _Step(self._limits.max_step_tokens, self._pool.block_size)
        if all(step.take(sequence) for sequence in ready if not _is_prefill(sequence)):
            self._limit_prefill(step, prefills or self.waiting)
            if all(step.take(sequence) for sequence in prefills):
                self._admit(step)
        return StepPlan(tuple(step.chunks))

    def earmarked_before(self, sequence: Sequence) -> list[int]:
        """The blocks kept for each whose grant goes before one to `sequence`: all that are kept, if it has no earmark itself."""
        return [blocks for _, blocks in takewhile(lambda earmark: earmark[0] is not sequence, self.earmarks.items())]

    def _limit_prefill(self, step: "_Step", prefills: list[Sequence]) -> None:
        """Leave the step, which has its decodes, no more tokens than it has time for; but always enough for the first prompt to advance."""
        if not prefills:
            return
        first = prefills[0]
        context = sum(chunk.end for chunk in step.chunks)
        limit = self._budget.prefill_tokens(len(step.chunks), context, first.num_computed)
        if limit is not None:
            step.budget = min(step.budget, max(limit, step.grain(first)))

    def blocks_owed(self) -> int:
        """Blocks that the preempted wait for: they were here before whoever asks for blocks now."""
        return sum(self._pool.blocks_for(len(sequence.tokens)) for sequence in self.waiting if sequence.num_preemptions)

    def _has_blocks(self, sequence: Sequence) -> bool:
        """Whether a running sequence has blocks for all its tokens, once it has grown at the cost of younger ones."""
        if sequence.state is not SequenceState.RUNNING:
            return False  # preempted a moment ago, for an older one
        while len(sequence.block_table) * self._pool.block_size < sequence.num_tokens:
            if block := self._pool.allocate(1):
                sequence.block_table += block
            elif not self._preempt_younger(sequence):
                return False
        return True

    def _preempt_younger(self, sequence: Sequence) -> bool:
        """Preempt the youngest running sequence, if `sequence` is older than it."""
        for victim in reversed(self.running):
            if victim is sequence:
                return False
            if not victim.reserve:
                self._preempt(victim)
                return True
        return False

    def _preempt(self, sequence: Sequence) -> None:
        self.drop(sequence)
        sequence.move(SequenceState.WAITING)
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.wait(sequence)

    def _admit(self, step: "_Step") -> None:
        """Admit from the head of the line while step, pool and limits allow.

        One that was preempted while a step sampled its next token waits for that token: it is part of what is to be computed anew.
        One whose next block a running sequence computes waits for that, and lets those behind it pass meanwhile.
        """
        for sequence in tuple(self.waiting):
            if not step.budget or len(self.running) >= self._limits.max_sequences or sequence.num_pending:
                return
            cached = self._cache.find_all(sequence)
            if cached is None:
                continue
            if not step.end_of_chunk(sequence, len(cached) * self._pool.block_size) or not self._has_room(sequence, cached):
                return
            self._begin(sequence, cached)
            step.take(sequence)

    def _has_room(self, sequence: Sequence, cached: list[BlockId]) -> bool:
        """Whether there is a place, and blocks for all its tokens, beside what is kept for others.

        Each running sequence must then have a block to grow into: else it would be preempted at once.
        """
        need = self._pool.blocks_for(len(sequence.tokens)) - len(cached) + self._pool.num_unheld(cached)
        growing = sum(not other.reserve for other in self.running)
        kept = self.kept_from(sequence)
        if len(self.running) + len(kept) >= self._limits.max_sequences:
            return False
        return self._pool.num_available >= need + growing + sum(kept)

    def kept_from(self, sequence: Sequence) -> list[int]:
        """The blocks kept for each older sequence. From the preempted nothing is kept: they were here before."""
        if sequence.num_preemptions:
            return []
        return [blocks for other, blocks in self.earmarks.items() if other.arrival < sequence.arrival]

    def _begin(self, sequence: Sequence, cached: list[BlockId]) -> None:
        """WAITING → RUNNING behind `cached`, which it found."""
        self.waiting.remove(sequence)
        self._pool.take(cached)
        blocks = self._pool.allocate(self._pool.blocks_for(len(sequence.tokens)) - len(cached))
        assert blocks is not None, "room was checked"
        self._cache.begin(sequence, cached)
        self._cache.announce(sequence)
        self.run(sequence, cached + blocks)


class _Step:
    """A plan in the making: `budget` tokens are left."""

    def __init__(self, budget: int, block_size: int) -> None:
        self.chunks: list[Chunk] = []
        self.budget = budget
        self._block_size = block_size

    def end_of_chunk(self, sequence: Sequence, start: int) -> int | None:
        """How far the rest of the budget takes `sequence` from `start`: to its last token, or where a chunk may end. None: nowhere."""
        num_tokens = sequence.num_tokens
        end = start + self.budget
        if end >= num_tokens:
            return num_tokens
        end -= end % self.grain(sequence)
        return end if end > start else None

    def grain(self, sequence: Sequence) -> int:
        """Chunks of `sequence` end on multiples of this. So many tokens take it to the next one from anywhere."""
        return self._block_size if sequence.reserve else min(GRAIN, self._block_size)

    def take(self, sequence: Sequence) -> bool:
        """Add the sequence's next chunk, if there is one."""
        end = self.end_of_chunk(sequence, sequence.num_computed)
        if end is None:
            return False
        self.chunks.append(Chunk(sequence, sequence.num_computed, end, samples=end == sequence.num_tokens))
        self.budget -= end - sequence.num_computed
        return True


def _age(sequence: Sequence) -> int:
    return sequence.arrival


def _turn(sequence: Sequence) -> tuple[bool, int]:
    return sequence.num_preemptions == 0, sequence.arrival


def _is_prefill(sequence: Sequence) -> bool:
    return sequence.num_uncomputed > 1
