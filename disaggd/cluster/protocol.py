"""Every frame that crosses a link between a router and an engine node, and nothing else.

A link is one WebSocket; each message is one msgpack frame: a tagged, array-like struct. Frames about a sequence carry
`(seq, attempt)`: the receiver drops those of an older attempt. Token ids travel as little-endian u32 bytes.

```
router ──► decode                         decode ──► router
  Generate                                  Decided, NeedPrefill(+grant), Refused, LocalPrefill
  RequestGrant                              Granted, NoRoom
  PrefillLost                               Landed, Released
  Abort, PushPrefix                         Tokens, Room
router ──► prefill                        prefill ──► router
  Prefill, Abort                            Prefilled, JobEnded, Credit, PrefixGrant, PrefixEnded
both ways: Ping
between the node that writes a grant and the one that gave it, forwarded: Progress, Quiesced one way, Cancel the other
pairing: OpenPair, ConnectPair, PairReady to engine nodes, PairAgent, PairReady, PairLost from them
a check of a pair (`check_frames.py`): CheckPair, PushPattern to engine nodes, PatternGrant, PatternPushed, PatternRead from them
both roles answer ListBlocks with BlockList
engine nodes also send Gauges, Measured, RefusedLinks, SlowThread and CacheEvents, which a router may ask for with CacheSnapshot
an engine node that is told to stop sends Draining, and stops when every router has answered Dismiss
```
"""

import sys
from array import array
from collections.abc import Iterable
from typing import Literal

import msgspec

from disaggd.cluster.check_frames import CheckPair, PatternGrant, PatternPushed, PatternRead, PushPattern
from disaggd.cluster.grant import Grant as Grant
from disaggd.cluster.hello import (
    ConnectPair,
    Frame,
    OpenPair,
    PairAgent,
    PairLost,
    PairReady,
    Ping,
)
from disaggd.cluster.holdings import Holding
from disaggd.cluster.offer import Predicted, PrefillCost, PrefillWork, RemoteOffer
from disaggd.ids import GrantToken, NodeName, SeqId
from disaggd.sampling import FinishReason, SamplingParams, TokenLogprob
from disaggd.wire import Cost, Count, Real, SmallCount


def pack_tokens(tokens: Iterable[int]) -> bytes:
    """Token ids as little-endian u32 bytes."""
    words = array("I", tokens)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def unpack_tokens(raw: bytes) -> list[int]:
    """The inverse of `pack_tokens`. Raises ValueError when `raw` is not whole u32 words."""
    words = array("I")
    words.frombytes(raw)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tolist()


# ── a sequence ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Generate(Frame, frozen=True):
    """Router → decode: generate what follows `tokens`."""

    seq: SeqId
    attempt: Count
    tokens: bytes
    """Prompt and what earlier attempts already delivered (`pack_tokens`)."""
    num_prompt_tokens: Count
    sampling: SamplingParams
    cache_salt: str
    """Prefixes are shared only between sequences of the same salt; empty: with all that have none."""
    policy: Literal["auto", "local", "remote"]
    """`local` and `remote` override the node's own decision; `remote` still needs a live prefill node."""
    ttft_target_s: Real
    """What is left of the time in which the request should have its first token; negative when that has passed."""
    offer: RemoteOffer | None
    """None: no prefill node can be reached."""


class Decided(Frame, frozen=True):
    """Decode → router: the sequence is prefilled here."""

    seq: SeqId
    attempt: Count
    reason: str
    num_cached: Count
    predicted: Predicted | None = None


class LocalPrefill(Frame, frozen=True):
    """Decode → router, just before the first token of a sequence that was prefilled here: how that went."""

    seq: SeqId
    attempt: Count
    num_cached: Count
    """Tokens that the prefix cache held when the sequence was admitted."""
    wait_ms: Real
    """From its arrival to its first step."""
    prefill_ms: Real
    """From there to the first token, the decode of others in between included."""


class NeedPrefill(Frame, frozen=True):
    """Decode → router: another node should prefill. No blocks are reserved unless `grant` is set."""

    seq: SeqId
    attempt: Count
    reason: str
    num_cached: Count
    grant: Grant | None
    predicted: Predicted | None = None


class Refused(Frame, frozen=True):
    """Engine node → router: the sequence cannot be served here at all. `code` is an OpenAI error code."""

    seq: SeqId
    attempt: Count
    code: str
    message: str


class RequestGrant(Frame, frozen=True):
    """Router → decode: reserve blocks for a prefill by `prefill`; answered `Granted` or `NoRoom`."""

    seq: SeqId
    attempt: Count
    prefill: NodeName
    earmark: bool = False
    """It has waited long: if there is no room, keep what comes free for it, ahead of later grants and new local sequences."""


class Granted(Frame, frozen=True):
    """Decode → router: the blocks are reserved."""

    seq: SeqId
    attempt: Count
    grant: Grant


class NoRoom(Frame, frozen=True):
    """Decode → router: no blocks now; `Room` follows when there are."""

    seq: SeqId
    attempt: Count


class PrefixSource(msgspec.Struct, frozen=True, array_like=True):
    """A decode node that holds the beginning of a prompt, and may push what a prefill node lacks of it."""

    node: NodeName
    num_tokens: Count


class Prefill(Frame, frozen=True):
    """Router → prefill: compute `tokens`, sample one more, push the KV into `grant` (None: nothing is to be pushed)."""

    seq: SeqId
    attempt: Count
    tokens: bytes
    num_prompt_tokens: Count
    sampling: SamplingParams
    cache_salt: str
    grant: Grant | None
    prefix: PrefixSource | None = None
    """Have the beginning pushed from there before the rest is computed; answered `PrefixEnded`, perhaps after `PrefixGrant`."""


class PrefixGrant(Frame, frozen=True):
    """Prefill → router → decode (as `PushPrefix`): blocks for what the prefill node lacks of the prompt's beginning."""

    seq: SeqId
    attempt: Count
    grant: Grant


class PushPrefix(Frame, frozen=True):
    """Router → decode: push what you hold cached of this sequence into `grant`; `Quiesced` if you do not, or stop."""

    seq: SeqId
    attempt: Count
    grant: Grant


PrefixOutcome = Literal["landed", "cached", "no_room", "unreachable", "failed", "stopped"]
"""`landed`; or nothing was asked for: the prefill node has it `cached` by now, has `no_room`, or cannot be reached by decode; or the
push `failed`; or the job was `stopped` before it landed. In all cases but the last the rest of the prompt is computed."""


class PrefixEnded(Frame, frozen=True):
    """Prefill → router, once per `Prefill` with a `prefix`, before its `JobEnded`: nothing is awaited of decode any more."""

    seq: SeqId
    attempt: Count
    outcome: PrefixOutcome
    reason: str
    """Why it did not land; else empty."""
    num_tokens: Count
    """That landed."""
    kv_bytes: Count
    took_ms: Real
    """From the job's arrival until the prefix had landed, or was given up."""


class Prefilled(Frame, frozen=True):
    """Prefill → router: the first token, at once; the push may still be under way."""

    seq: SeqId
    attempt: Count
    start: Count
    """Output index of the token: `len(tokens) − num_prompt_tokens` of the job."""
    token: SmallCount
    logprob: TokenLogprob | None
    finish_reason: FinishReason | None
    """Set when this token ends the sequence: nothing more is pushed."""
    num_cached: Count
    prefill_ms: Real
    """Computing the prompt, from the first step that had a part of it."""
    reported_ms: Real
    """When this was reported, on the prefill node's clock, since the job came in."""
    computed: PrefillWork
    """In the time of `prefill_ms`: the prompt, and what of others shared its steps."""


class JobEnded(Frame, frozen=True):
    """Prefill → router, once per `Prefill`: the job is over and its push's last handle has ended. Returns the credit."""

    seq: SeqId
    attempt: Count
    clean: bool
    """The first token was sampled and every handle ended DONE."""
    reason: str
    """Why not clean; else empty."""
    kv_bytes: Count
    """Sum of the descriptor lengths of the handles that ended DONE."""
    first_post_ms: Real | None
    last_done_ms: Real | None
    """When the first handle was posted and the last one ended, on the prefill node's clock, since the job came in."""


class Progress(Frame, frozen=True):
    """Writer → router → target: the pushes into these grants are alive; renews their leases."""

    tokens: tuple[GrantToken, ...]


class Abort(Frame, frozen=True):
    """Router → engine node: nobody waits for this sequence any more."""

    seq: SeqId
    attempt: Count


class Cancel(Frame, frozen=True):
    """Target → router → writer: stop pushing into this grant, poll out, answer `Quiesced`."""

    token: GrantToken
    writer: NodeName
    target: NodeName


class Quiesced(Frame, frozen=True):
    """Writer → router → target: nothing more will be written for this grant. `clean`: every handle ended DONE."""

    token: GrantToken
    target: NodeName
    clean: bool


class PrefillLost(Frame, frozen=True):
    """Router → decode, the arbiter: the prefill is lost or failed; answered `Landed` (keep) or `Released` (retry)."""

    seq: SeqId
    attempt: Count


class Landed(Frame, frozen=True):
    """Decode → router: the whole grant is in; the sequence runs here."""

    seq: SeqId
    attempt: Count


class Released(Frame, frozen=True):
    """Decode → router: the grant is given up and the sequence forgotten: place it again. Also sent unasked."""

    seq: SeqId
    attempt: Count
    reason: str
    is_fenced: bool = False
    """A fence for others' sake ended it: not one of the request's retries."""


class TokenRun(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one sequence."""

    seq: SeqId
    attempt: Count
    start: Count
    """Index of the first token here among the request's output tokens."""
    tokens: tuple[SmallCount, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason | None


class Tokens(Frame, frozen=True):
    """Decode → router: one per step, with the new tokens of all its sequences."""

    runs: tuple[TokenRun, ...]


class Room(Frame, frozen=True):
    """Decode → router: a grant that was answered `NoRoom` could be given now."""


class Credit(Frame, frozen=True):
    """Prefill → router: tokens of jobs that this router may have at this node at once."""

    limit_tokens: Count


class Gauges(Frame, frozen=True):
    """Engine node → router, a few times a second and when they change: what the node holds."""

    waiting: Count
    running: Count
    queued: Count
    """Sequences that wait for a prefill elsewhere."""
    blocks_free: Count
    blocks_cached: Count
    blocks_used: Count
    blocks_granted: Count
    blocks_held: Count
    blocks_quarantined: Count
    preemptions: Count
    """Since the node's start, as the other totals below."""
    prefill_backlog_tokens: Count = 0
    """Prompt tokens that wait for their turn here, or are half computed."""
    prefix_queried_tokens: Count = 0
    """Tokens of all sequences that were admitted or granted."""
    prefix_hit_tokens: Count = 0
    """Those of them that the prefix cache held."""
    prefix_evicted_blocks: Count = 0
    blocks_verified: Count = 0
    """That landed with the right checksums."""
    checksum_failures: Count = 0
    """Blocks that landed with wrong ones, and were not used."""


class Draining(Frame, frozen=True):
    """Engine node → router: give me nothing new; I finish what I have, and stop when all routers have answered `Dismiss`."""


class Dismiss(Frame, frozen=True):
    """Router → engine node, once: nothing of mine is with you any more, nobody waits for what you wrote, and nothing new will come."""


class ListBlocks(Frame, frozen=True):
    """Router → engine node: which blocks do you hold because of other nodes? Answered `BlockList`."""

    request: Count
    """Counted by the router; the answer names it."""


class BlockList(Frame, frozen=True):
    """Engine node → router."""

    request: Count
    holdings: tuple[Holding, ...]


class CacheSnapshot(Frame, frozen=True):
    """Router → engine node: a number is missing among your `CacheEvents`: send a snapshot."""


class CacheEvents(Frame, frozen=True):
    """Engine node → router: what its prefix cache gained and lost since the last one. The first on a link is a snapshot."""

    number: Count
    """Counts from 0 on each link, by one."""
    snapshot: bool
    """`stored` is all that the node holds, and replaces what was known."""
    stored: bytes
    """Block hashes of 16 bytes each, one behind the other."""
    evicted: bytes


class Measured(Frame, frozen=True):
    """Engine node → router, at link up: what it measured of itself at its start."""

    prefill_cost: PrefillCost
    decode_base_s: Real
    """A step of one sequence that decodes."""
    decode_per_sequence_s: Real
    """What each further one adds."""


class SlowThread(Frame, frozen=True):
    """Engine node → every router, once a second while one of the node's threads does not get on; and when it does again, with 0."""

    thread: str
    seconds: Cost
    """For so long."""


class RefusedLinks(Frame, frozen=True):
    """Engine node → every router, when it grows and at link up: how many links the node has refused for one cause since its start.

    Causes are fields of a hello that differed, `secret`, and `no_hello`; or `fault`, a link that was up, over which the node itself failed.
    """

    cause: str
    total: Count


ToNode = (
    Ping
    | OpenPair
    | ConnectPair
    | PairReady
    | CheckPair
    | PushPattern
    | Generate
    | RequestGrant
    | PushPrefix
    | Prefill
    | Progress
    | Abort
    | Cancel
    | Quiesced
    | PrefillLost
    | CacheSnapshot
    | ListBlocks
    | Dismiss
)
"""What a router may send, once the two ends know each other (`handshake.py`)."""

ToRouter = (
    Ping
    | PairAgent
    | PairReady
    | PairLost
    | PatternGrant
    | PatternPushed
    | PatternRead
    | Decided
    | LocalPrefill
    | NeedPrefill
    | Refused
    | Granted
    | NoRoom
    | PrefixGrant
    | PrefixEnded
    | Prefilled
    | JobEnded
    | Progress
    | Cancel
    | Quiesced
    | Landed
    | Released
    | Tokens
    | Room
    | Credit
    | Gauges
    | CacheEvents
    | BlockList
    | Measured
    | Draining
    | RefusedLinks
    | SlowThread
)
"""What an engine node may send."""
