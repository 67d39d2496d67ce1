"""One request's sequence as the router follows it, from its prompt to its last token. Runs on the router's loop.

```
PLACED ─► QUEUED ─► GRANTING ─► PREFILLING ─► DECODING ─► DONE
   │         ▲          │ no room    │ failed      ▲
   │         └──────────┘            ▼             │ landed
   │  prefilled locally         ARBITRATION ───────┤
   └───────────────────────────────────────────────┘
every phase ─► PLACED (another attempt) ─► …       every phase ─► DONE (finished, aborted, failed)
```
"""

import enum
from collections.abc import Sequence as ReadOnlySequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from disaggd.cluster.decision import Override
from disaggd.cluster.offer import Predicted
from disaggd.cluster.protocol import Grant, PrefixOutcome
from disaggd.errors import RequestError
from disaggd.ids import NodeName, SeqId
from disaggd.prefix import PrefixHasher
from disaggd.sampling import FinishReason, SamplingParams, TokenLogprob


class Phase(enum.Enum):
    """Who has the sequence now."""

    PLACED = "placed"
    """With a decode node, which decides where to prefill."""
    QUEUED = "queued"
    """In the prefill queue."""
    GRANTING = "granting"
    """A prefill node's credit is held; the decode node is asked for blocks."""
    PREFILLING = "prefilling"
    """With the prefill node."""
    ARBITRATION = "arbitration"
    """The prefill failed or was lost; the decode node is asked whether the KV landed all the same."""
    DECODING = "decoding"
    """The decode node computes it, prompt included if it was prefilled locally."""
    DONE = "done"


_ANY_TIME = {Phase.PLACED, Phase.DONE}
LEGAL_MOVES: dict[Phase, set[Phase]] = {
    Phase.PLACED: {Phase.QUEUED, Phase.PREFILLING, Phase.DECODING} | _ANY_TIME,
    Phase.QUEUED: {Phase.GRANTING, Phase.PREFILLING} | _ANY_TIME,
    Phase.GRANTING: {Phase.PREFILLING, Phase.QUEUED, Phase.ARBITRATION} | _ANY_TIME,
    Phase.PREFILLING: {Phase.ARBITRATION, Phase.DECODING} | _ANY_TIME,
    Phase.ARBITRATION: {Phase.DECODING} | _ANY_TIME,
    Phase.DECODING: _ANY_TIME,
    Phase.DONE: set(),
}


class Addressed(Protocol):
    """A frame, or a part of one, that names a sequence and an attempt."""

    @property
    def seq(self) -> SeqId: ...
    @property
    def attempt(self) -> int: ...


class Sink(Protocol):
    """Where a sequence's tokens go: the HTTP handler that waits for them."""

    def deliver(self, tokens: ReadOnlySequence[int], logprobs: ReadOnlySequence[TokenLogprob] | None, finish: FinishReason | None) -> None:
        """New tokens, each exactly once and in order; `finish` comes with the last ones."""

    def fail(self, error: RequestError) -> None:
        """The sequence ends without being finished."""


@dataclass(slots=True)
class Timeline:
    """When things happened, in seconds on the router's monotonic clock; and what the nodes measured on theirs.

    Of one attempt, but for `arrived`, `first_token` and `finished`, which are the request's.
    """

    arrived: float
    placed: float | None = None
    """None while no decode node is up."""
    decided: float | None = None
    queued: float | None = None
    queue_depth: int | None = None
    """Jobs that waited when this one joined them."""
    jobs_ahead: int | None = None
    """Those of them whose turn was before its own."""
    granting: float | None = None
    """A prefill node had credit, and decode was asked for a grant."""
    dispatched: float | None = None
    prefilled: float | None = None
    """The prefill node's first token came in."""
    landed: float | None = None
    resumed: float | None = None
    """The first token of this attempt that the client did not have."""
    ended: float | None = None
    first_token: float | None = None
    finished: float | None = None
    prefill_ms: float = 0.0
    """Computing the prompt, on the clock of the node that did."""
    local_wait_ms: float | None = None
    """At the decode node, before the first step of a prompt that was prefilled there."""
    first_token_reported_ms: float | None = None
    """On the prefill node's clock, since its job came in; so are the next two."""
    first_post_ms: float | None = None
    last_done_ms: float | None = None

    def waits_again(self, queue_depth: int, jobs_ahead: int) -> None:
        """In the prefill queue, where so many jobs are: for the first time, or since what was asked for it had no room."""
        self.granting = None
        if self.queue_depth is None:
            self.queue_depth, self.jobs_ahead = queue_depth, jobs_ahead

    def tokens_came(self, now: float) -> None:
        """This attempt's first that the client did not have."""
        self.resumed = now
        if self.first_token is None:
            self.first_token = now

    def next_attempt(self) -> "Timeline":
        return Timeline(self.arrived, first_token=self.first_token)


@dataclass(frozen=True, slots=True)
class PastAttempt:
    """An attempt that another one had to follow. Its nodes may still report what became of it, into `timeline`."""

    timeline: Timeline
    decode: NodeName | None
    prefill: NodeName | None
    was_remote: bool
    reason: str
    predicted: Predicted | None
    failure: str
    ended: float


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asked for, in token ids."""

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    override: Override = "auto"
    """Where to prefill, whatever the decision would be."""
    cache_salt: str = ""
    """Prefixes are shared only between requests of the same salt."""
    priority: int = 0
    """Smaller goes first."""
    session: str | None = None
    """Requests of one session go to the same decode node when costs tie."""
    key: str | None = None
    """The name of the API key that asked."""


class PrefixPush(msgspec.Struct, frozen=True, kw_only=True):
    """The beginning of a prompt that its decode node is to push to its prefill node."""

    source: NodeName
    attempt: int
    num_asked: int
    """Tokens that the prefill node was thought to lack."""
    outcome: PrefixOutcome | None = None
    """None while it is under way."""
    num_tokens: int = 0
    """That landed."""
    kv_bytes: int = 0
    took_ms: float | None = None
    """On the prefill node's clock, from the job's arrival until they had landed or were given up."""


@dataclass(slots=True)
class RoutedSequence:
    """The router's record of one sequence; `Dispatcher` is its only writer."""

    seq: SeqId
    request: Request
    sink: Sink
    deadline: float
    timeline: Timeline
    phase: Phase = Phase.PLACED
    attempt: int = 0
    retries: int = 0
    failed_prefills: int = 0
    """Those of them that had to be because a prefill elsewhere came to nothing."""
    sent: list[int] = field(default_factory=list)
    """Tokens the client has: never sampled again."""
    decode: NodeName | None = None
    """None while no decode node is up."""
    homeless_until: float = 0.0
    """Then the request fails, if `decode` is still None."""
    prefill: NodeName | None = None
    grant: Grant | None = None
    placed_tokens: int = 0
    """What this attempt adds to its decode node's load."""
    uncached_tokens: int = 0
    """Of the prompt, at its decode node, when it was placed."""
    kv_tokens: int = 0
    """What it is predicted to need of its decode node's memory."""
    saw_full_queue: bool = False
    """Its decode node decided in the knowledge that the prefill queue has no room."""
    has_place: bool = False
    """It was promised a prefill, or has lost a node: it may join the prefill queue whatever that holds."""
    no_room_since: float | None = None
    """When its decode node first had no room for it."""
    digests: dict[PrefixHasher, list[bytes]] = field(default_factory=dict)
    """Names of its full blocks, as far as they were ever asked for."""
    was_remote: bool = False
    reason: str = ""
    """Of the decision: `code: sentence`."""
    predicted: Predicted | None = None
    """What the decision was made on."""
    forced_local: str = ""
    """Why the router had this attempt prefilled by decode, whatever decode would have decided."""
    cached_at_decode: int = 0
    cached_at_prefill: int = 0
    kv_bytes: int = 0
    prefix_push: PrefixPush | None = None
    """Of the last attempt for which one was asked."""
    finish_reason: FinishReason | None = None
    error: str | None = None
    """What the client was told when it ended without being finished; or why it was cut."""
    past: list[PastAttempt] = field(default_factory=list)
    """By attempt: those before this one."""

    def move(self, phase: Phase) -> None:
        """Enter `phase`; asserts that the move is legal."""
        assert phase in LEGAL_MOVES[self.phase], f"{self.seq}: {self.phase} → {phase}"
        self.phase = phase

    def next_attempt(self, now: float, failure: str) -> None:
        """Count on; what was known of the attempt that came to nothing is in `past`."""
        self.timeline.ended = now
        self.past.append(PastAttempt(self.timeline, self.decode, self.prefill, self.was_remote, self.reason, self.predicted, failure, now))
        self.attempt += 1
        self.timeline = self.timeline.next_attempt()
        self.was_remote, self.reason, self.predicted = False, "", None

    def timeline_of(self, attempt: int) -> Timeline:
        return self.timeline if attempt == self.attempt else self.past[attempt].timeline

    @property
    def tokens(self) -> list[int]:
        """What a node needs to continue: the prompt and everything sent."""
        return [*self.request.prompt, *self.sent]

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt) + len(self.sent)

    @property
    def num_remaining(self) -> int:
        """Output tokens still wanted."""
        return self.request.sampling.max_tokens - len(self.sent)

    @property
    def job(self) -> tuple[SeqId, int]:
        """What a prefill node's credit is held under."""
        return (self.seq, self.attempt)
