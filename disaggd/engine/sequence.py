"""One sequence of tokens inside the engine: what is known of it, and the states it moves through.

```
WAITING ─► RUNNING ─► FINISHED           WAITING ─► QUEUED ─► RUNNING    computed elsewhere, then resumed here
   ▲          │                                     QUEUED ─► WAITING    its beginning at most: the rest is computed here
   │          │                          RUNNING ─► PAUSED ─► FINISHED   handed over to another node
   └──────────┘ preempted                           PAUSED ─► RUNNING    the other node failed
```

Every state may move to FINISHED: that is the abort. Owned by the compute thread alone. Plain Python: no tensors, and
nothing here knows of requests, text or other nodes.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from disaggd.ids import BlockId, SeqId
from disaggd.sampling import SamplingParams

FinishReason = Literal["stop", "length", "abort"]
"""Why a sequence ended in this engine; a sequence that was handed off has none."""


class SequenceState(Enum):
    """Where a sequence is; see the module's diagram."""

    WAITING = "waiting"
    """For blocks and a place in a step. Holds no blocks."""
    QUEUED = "queued"
    """For KV that another node has, or computes. Holds no blocks of its own."""
    RUNNING = "running"
    """Has blocks, and tokens that the next steps compute."""
    PAUSED = "paused"
    """Its KV is on the way to another node. Has blocks, computes nothing."""
    FINISHED = "finished"


LEGAL_MOVES: dict[SequenceState, frozenset[SequenceState]] = {
    SequenceState.WAITING: frozenset({SequenceState.QUEUED, SequenceState.RUNNING, SequenceState.FINISHED}),
    SequenceState.QUEUED: frozenset({SequenceState.RUNNING, SequenceState.WAITING, SequenceState.FINISHED}),
    SequenceState.RUNNING: frozenset({SequenceState.WAITING, SequenceState.PAUSED, SequenceState.FINISHED}),
    SequenceState.PAUSED: frozenset({SequenceState.RUNNING, SequenceState.FINISHED}),
    SequenceState.FINISHED: frozenset(),
}


@dataclass(slots=True, eq=False)
class Sequence:
    """One attempt at one sequence. Equal only to itself; `(seq_id, attempt)` names it on the wire.

    `tokens` is prompt, then outputs that earlier attempts delivered, then outputs of this one; it only grows.
    """

    seq_id: SeqId
    tokens: list[int]
    sampling: SamplingParams
    num_prompt_tokens: int
    attempt: int = 0
    reserve: bool = False
    """Never preempted, because somebody else counts on its blocks; so it must end without growing: `output_limit` is 1."""
    output_limit: int | None = None
    """Hand the sequence off after this many tokens sampled here."""
    salt: str = ""
    """Its KV is shared only with sequences of the same salt."""
    num_given: int = field(init=False)
    """`len(tokens)` at arrival."""
    state: SequenceState = field(default=SequenceState.WAITING, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    num_computed: int = field(default=0, init=False)
    """Tokens whose K and V are in the blocks of `block_table`, those included that a launched step writes there."""
    num_pending: int = field(default=0, init=False)
    """Tokens behind `tokens` that launched steps sample: they count, but only the device knows them yet."""
    token_limit: int = field(default=0, init=False)
    """With so many tokens it ends here, whatever they are; the engine's to set."""
    block_table: list[BlockId] = field(default_factory=list, init=False)
    """The i-th block holds positions `[i * block_size, (i + 1) * block_size)`. Grows in place; on release a new list takes its place."""
    arrival: int = field(default=0, init=False)
    """The engine's own count of arrivals: age, which decides who goes first and who is preempted."""
    num_preemptions: int = field(default=0, init=False)
    num_cached: int = field(default=0, init=False)
    """Tokens whose K and V were here already when it first began."""
    num_found: int = field(default=0, init=False)
    """Tokens that it would have begun behind when the cache was last asked."""
    digests: list[bytes] = field(default_factory=list, init=False)
    """Of its full blocks, as far as anybody asked (`prefix.py`). Replaced as it grows, never changed."""
    num_registered: int = field(default=0, init=False)
    """Blocks at the front of `block_table` that may be found by others, or are copies of some that may."""
    awaited: bytes | None = field(default=None, init=False)
    """The digest of the first block that it lacked when it was last to be admitted."""

    def __post_init__(self) -> None:
        assert 0 < self.num_prompt_tokens <= len(self.tokens), f"{self.seq_id}: a sequence has a prompt"
        assert not self.reserve or self.output_limit == 1, f"{self.seq_id}: a reserved sequence may not grow"
        self.num_given = len(self.tokens)

    @property
    def num_outputs(self) -> int:
        """Tokens after the prompt, those of earlier attempts included."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        """Known and pending."""
        return len(self.tokens) + self.num_pending

    @property
    def num_uncomputed(self) -> int:
        """Many: it is prefilling. One: it is decoding."""
        return self.num_tokens - self.num_computed

    @property
    def to_prefill(self) -> tuple[int, int]:
        """Tokens that are to be computed here before it samples, and those before them; while it waits, by what was last found cached."""
        start = self.num_found if self.state is SequenceState.WAITING else self.num_computed
        return self.num_tokens - start, start

    @property
    def is_complete(self) -> bool:
        """Its last token here is pending: nothing more is to be computed."""
        return self.num_pending > 0 and self.num_tokens >= self.token_limit

    @property
    def is_finished(self) -> bool:
        return self.state is SequenceState.FINISHED

    @property
    def reached_output_limit(self) -> bool:
        """It has sampled what it should here; what follows is another node's."""
        return self.output_limit is not None and len(self.tokens) - self.num_given >= self.output_limit

    def move(self, state: SequenceState) -> None:
        """Go to `state`, which `LEGAL_MOVES` must allow."""
        assert state in LEGAL_MOVES[self.state], f"{self.seq_id}: {self.state.value} may not become {state.value}"
        self.state = state
