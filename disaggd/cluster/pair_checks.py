"""`PairChecks`: patterns that go over pairs to be compared, round by round, and what comes of them. Runs on the router's loop.

One check is several rounds, one after another; of each pair one check at a time. Whatever nodes do, and whether they answer or not, every
check ends, and says how: nothing of it is waited for longer than `PATIENCE_S`, and what a round leaves at its nodes resolves there as any
grant does.
"""

import itertools
import secrets
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil, lcm
from typing import Literal

import msgspec

from disaggd.cluster.check_frames import (
    CheckPair,
    CheckStep,
    PatternGrant,
    PatternPushed,
    PatternRead,
    PushPattern,
    RankPush,
    RankRead,
)
from disaggd.cluster.grant_relay import GrantRelay
from disaggd.cluster.peers import DecodePeer, Pair, Peer, PrefillPeer
from disaggd.ids import NodeName, SeqId
from disaggd.transfer.layout import KVPath, KVSpec

PATIENCE_S = 10.0
"""For one round. A node answers between two steps, and a prompt's step may take seconds."""
MANY_TOKENS, MANY_BYTES = 256, 8 * 2**20
"""More than these no pattern has, but for one block: it keeps nodes from computing."""

CheckOutcome = Literal["ok", "wrong", "failed", "skipped"]
"""`wrong`: something landed that is not the pattern. `skipped`: a node had no blocks free for it, and nothing is known."""

Frames = PatternGrant | PatternPushed | PatternRead


class RankCheck(msgspec.Struct, frozen=True, kw_only=True):
    """What went from one rank of the writer to one of the target."""

    writer_rank: int
    target_rank: int
    transport: str
    path: KVPath
    kv_bytes: int
    """In one round."""
    rounds_s: tuple[float, ...]
    """What each round took, from its first post to the end of its last write."""
    wrong: str = ""
    """What of it landed wrong; empty if nothing did."""

    @property
    def bytes_per_s(self) -> float:
        return self.kv_bytes * len(self.rounds_s) / max(sum(self.rounds_s), 1e-9)

    @property
    def p99_s(self) -> float:
        """Of the rounds: of less than a hundred it is the longest."""
        return sorted(self.rounds_s)[ceil(0.99 * len(self.rounds_s)) - 1]


class CheckResult(msgspec.Struct, frozen=True):
    """Of one check."""

    outcome: CheckOutcome
    reason: str
    """Empty if it is ok."""
    ranks: tuple[RankCheck, ...] = ()
    """Those between which something went."""

    def __str__(self) -> str:
        if self.outcome != "ok":
            return f"not checked: {self.reason}" if self.outcome == "skipped" else self.reason
        slowest = min(self.ranks, key=lambda rank: rank.bytes_per_s)
        speed, p99_ms = slowest.bytes_per_s / 1e9, slowest.p99_s * 1e3
        times = "once" if len(slowest.rounds_s) == 1 else f"{len(slowest.rounds_s)} times"
        return f"checked {times}, {slowest.transport}, {slowest.path}, {speed:.2g} GB/s, p99 {p99_ms:.{0 if p99_ms >= 10 else 1}f} ms"


class Effort(msgspec.Struct, frozen=True):
    """What a check may take: so many rounds, none of which begins later than `budget_s` after the first."""

    num_rounds: int
    budget_s: float


@dataclass(slots=True)
class _Check:
    pair: Pair
    effort: Effort
    done: Callable[[CheckResult], None]
    begun: float = 0.0
    pushes: list[PatternPushed] = field(default_factory=list)
    """Of the rounds that are over, and were right."""


@dataclass(slots=True)
class _Round:
    check: _Check
    number: int
    order: CheckPair
    deadline: float
    is_granted: bool = False
    """The writer was told, and is to answer too."""
    pushed: PatternPushed | None = None
    read: PatternRead | None = None

    @property
    def is_over(self) -> bool:
        return self.read is not None and (self.pushed is not None or not self.is_granted)

    @property
    def silence(self) -> str:
        """Who has yet to answer. Either of the two may be it that the other waits for: a write ends only when its target takes it."""
        pair = self.check.pair
        if not self.is_granted or self.pushed is not None:
            return f"{pair.target} has not answered"
        return f"{pair.writer} has not answered" if self.read is not None else f"neither {pair.writer} nor {pair.target} has answered"


class PairChecks:
    """All checks of one router. Shares the dispatcher's peer tables. `clock` is monotonic seconds."""

    def __init__(
        self,
        prefills: dict[NodeName, PrefillPeer],
        decodes: dict[NodeName, DecodePeer],
        grants: GrantRelay,
        clock: Callable[[], float],
    ) -> None:
        self._prefills = prefills
        self._decodes = decodes
        self._grants = grants
        self.clock = clock
        self._numbers = itertools.count(1)
        self._rounds: dict[int, _Round] = {}
        self._waiting: dict[tuple[NodeName, NodeName], deque[_Check]] = {}
        """By writer and target: the first is under way."""

    def start(self, pair: Pair, effort: Effort, done: Callable[[CheckResult], None]) -> None:
        """Check a pair whose agent was probed, when its checks before are over; `done` is called once, perhaps at once."""
        checks = self._waiting.setdefault((pair.writer, pair.target), deque())
        checks.append(_Check(pair, effort, done))
        if len(checks) == 1:
            self._begin(checks[0])

    def on_frame(self, peer: Peer, frame: Frames) -> None:
        """An answer; one that nobody waits for any more changes nothing of a check."""
        match frame:
            case PatternGrant():
                self._on_grant(peer, frame)
            case PatternPushed(check) if (at := self._of(check, writer=peer)) is not None and at.is_granted:
                at.pushed = frame
                self._end_if_over(at)
            case PatternRead(check):
                self._grants.over(_job(check), peer.name)  # unless a `Cancel` ended it already; also when nobody waits for it any more
                if (at := self._of(check, target=peer)) is not None:
                    at.read = frame
                    self._end_if_over(at)

    def node_down(self, name: NodeName) -> None:
        """Its link is lost: it answers nothing more."""
        for at in [at for at in self._rounds.values() if name in (at.check.pair.writer, at.check.pair.target)]:
            self._end(at, CheckResult("failed", f"the link to {name} was lost"))

    def tick(self) -> None:
        """Call a few times a second."""
        now = self.clock()
        for at in [at for at in self._rounds.values() if now >= at.deadline]:
            self._end(at, CheckResult("failed", f"{at.silence} within {PATIENCE_S:g} s"))

    # ── a round ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _begin(self, check: _Check) -> None:
        check.begun = self.clock()
        self._next_round(check)

    def _next_round(self, check: _Check) -> None:
        pair = check.pair
        writer, target = self._peer(pair.writer), self._peer(pair.target)
        if writer is None or target is None or pair.agent is None:
            missing = pair.writer if writer is None else pair.target
            return self._conclude(check, CheckResult("failed", f"{missing} is not there"))
        number = next(self._numbers)
        num_tokens = _pattern_tokens(writer.hello.kv, target.hello.kv)
        order = CheckPair(number, pair.writer, pair.agent.agent_id, num_tokens, secrets.randbits(53))
        self._rounds[number] = _Round(check, number, order, self.clock() + PATIENCE_S)
        return target.send(order)

    def _on_grant(self, target: Peer, frame: PatternGrant) -> None:
        at, grant = self._of(frame.check, target=target), frame.grant
        writer = None if at is None else self._peer(at.check.pair.writer)
        if at is None or writer is None or at.is_granted or (grant.writer, grant.target) != (writer.name, target.name):
            return  # the target hears nothing: its grant's lease runs out, and its `Cancel` is answered
        at.is_granted = True
        self._grants.forwarded(_job(at.number), grant, writer)
        writer.send(PushPattern(at.number, grant, at.order.num_tokens, at.order.salt))

    def _of(self, number: int, *, writer: Peer | None = None, target: Peer | None = None) -> _Round | None:
        """The round, if that node has a part in it."""
        at = self._rounds.get(number)
        if at is None or (writer is not None and writer.name != at.check.pair.writer):
            return None
        return at if target is None or target.name == at.check.pair.target else None

    def _end_if_over(self, at: _Round) -> None:
        if not at.is_over:
            return None
        result = _bad_end(at)
        if result is not None:
            return self._end(at, result)
        assert at.pushed is not None
        check = at.check
        check.pushes.append(at.pushed)
        if len(check.pushes) < check.effort.num_rounds and self.clock() < check.begun + check.effort.budget_s:
            del self._rounds[at.number]
            return self._next_round(check)
        return self._end(at, CheckResult("ok", "", _ranks(check.pushes)))

    def _end(self, at: _Round, result: CheckResult) -> None:
        """Whatever the nodes still do about the round; rounds that went well before it count."""
        del self._rounds[at.number]
        if result.outcome == "skipped" and at.check.pushes:
            result = CheckResult("ok", "", _ranks(at.check.pushes))
        self._conclude(at.check, result)

    def _conclude(self, check: _Check, result: CheckResult) -> None:
        key = (check.pair.writer, check.pair.target)
        checks = self._waiting[key]
        assert checks[0] is check, "of each pair one check at a time"
        check.done(result)  # which may start another
        checks.popleft()
        if checks:
            self._begin(checks[0])
        else:
            del self._waiting[key]

    def _peer(self, name: NodeName) -> Peer | None:
        return self._prefills.get(name) or self._decodes.get(name)


def _job(number: int) -> tuple[SeqId, int]:
    """By which a round's grant is known."""
    return SeqId(f"check-{number}"), 0


def _pattern_tokens(one: KVSpec, other: KVSpec) -> int:
    """Whole blocks of the larger size: two, to tell one from the next, or as many as it takes until both nodes' blocks end together.

    From there on they lie to each other as they did from the start. Of sizes that meet only after many tokens (63 and 64: 4,032) it is as
    many as may be, and the last of the smaller blocks is filled in part.
    """
    coarse = max(one, other, key=lambda kv: kv.block_size)
    may_be = min(MANY_TOKENS // coarse.block_size, MANY_BYTES // coarse.bytes_per_block)
    until_they_meet = lcm(one.block_size, other.block_size) // coarse.block_size
    return coarse.block_size * max(1, min(may_be, max(2, until_they_meet)))


def _bad_end(at: _Round) -> CheckResult | None:
    """What a round that is over makes of its check; None if it went well."""
    assert at.read is not None
    ends = [end for end in (at.pushed, at.read) if end is not None]
    for step, outcome in _OUTCOMES.items():
        for end in ends:
            if end.step == step:
                return CheckResult(outcome, end.reason)
    if at.pushed is None or not at.pushed.pushes or not at.read.reads:
        return CheckResult("failed", "nothing was compared")
    for read in at.read.reads:
        if read.wrong_heads:
            reason = f"what lands in rank {read.rank} of {at.check.pair.target} is not what was written: {read.what}"
            return CheckResult("wrong", reason, _ranks([*at.check.pushes, at.pushed], at.read.reads))
    return None


_OUTCOMES: dict[CheckStep, CheckOutcome] = {"no_room": "skipped", "failed": "failed"}
"""Of steps that are not done; a node whose peer had no room calls its own part failed."""


def _ranks(rounds: list[PatternPushed], reads: tuple[RankRead, ...] = ()) -> tuple[RankCheck, ...]:
    """By rank of the writer and of the target; `reads` are of the last round."""
    rounds_s: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
    for pushed in rounds:
        for push in pushed.pushes:
            rounds_s[push.writer_rank, push.target_rank].append(push.seconds)
    return tuple(
        RankCheck(
            writer_rank=push.writer_rank,
            target_rank=push.target_rank,
            transport=rounds[-1].transport,
            path=push.path,
            kv_bytes=push.kv_bytes,
            rounds_s=tuple(rounds_s[push.writer_rank, push.target_rank]),
            wrong=next((read.what for read in reads if _is_of(push, read)), ""),
        )
        for push in rounds[-1].pushes
    )


def _is_of(push: RankPush, read: RankRead) -> bool:
    """Whether some of the wrong heads are of this push."""
    heads = range(push.first_head, push.first_head + push.num_heads)
    return read.rank == push.target_rank and any(head in heads for head in read.wrong_heads)
