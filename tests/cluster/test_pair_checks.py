"""A pattern goes over a pair, round by round: whatever nodes answer, or do not, the check ends and says how."""

from collections.abc import Callable
from typing import TypeVar

import msgspec
import pytest

from disaggd.cluster.check_frames import CheckPair, PatternGrant, PatternPushed, PatternRead, PushPattern, RankPush, RankRead
from disaggd.cluster.grant_relay import GrantRelay
from disaggd.cluster.hello import NodeHello, PairAgent
from disaggd.cluster.pair_checks import MANY_BYTES, MANY_TOKENS, PATIENCE_S, CheckResult, Effort, PairChecks, RankCheck
from disaggd.cluster.peers import DecodePeer, Pair, PairState, PrefillPeer
from disaggd.cluster.protocol import Cancel, Grant, Progress, Quiesced, ToNode
from disaggd.ids import AgentId, BlockId, GrantToken, Incarnation, NodeName
from tests.support.endpoints import endpoint
from tests.support.routing import D0, P0, P1, hello

AGENT = AgentId("agent")
BUDGET_S = 2.0
SENT = RankPush(0, 0, 0, 1, "direct", 1000, 0.5)
READ = RankRead(0, (), "")
WRONG = RankRead(0, (0,), "3 numbers differ")

F = TypeVar("F", bound=ToNode)


class Checks:
    """`PairChecks` of p0 → d0, whose nodes only record what they are sent; `results` are of the checks that ended."""

    def __init__(self) -> None:
        self.now = 100.0
        self.sent: dict[NodeName, list[ToNode]] = {P0: [], D0: []}
        self.prefills = {P0: PrefillPeer(P0, hello(P0, "first"), self.sent[P0].append)}
        self.decodes = {D0: DecodePeer(D0, hello(D0, "first"), self.sent[D0].append)}
        self.grants = GrantRelay(self.prefills, self.decodes)
        self.checks = PairChecks(self.prefills, self.decodes, self.grants, lambda: self.now)
        agent = PairAgent(P0, Incarnation("p0-first"), endpoint(AGENT))
        self.pair = Pair(P0, D0, PairState.CHECKING, agent)
        self.results: list[CheckResult] = []

    def start(self, num_rounds: int = 1) -> None:
        self.checks.start(self.pair, Effort(num_rounds, BUDGET_S), self.results.append)

    def last(self, name: NodeName, kind: type[F]) -> F:
        return next(frame for frame in reversed(self.sent[name]) if isinstance(frame, kind))

    @property
    def number(self) -> int:
        return self.last(D0, CheckPair).check

    def grant(self, token: bytes = b"token", target: NodeName = D0) -> None:
        grant = Grant(GrantToken(token), target, P0, AGENT, 0, (BlockId(3), BlockId(5)), 5.0)
        self.checks.on_frame(self.decodes[D0], PatternGrant(self.number, grant))

    def pushed(self, *pushes: RankPush, step: str = "done", reason: str = "", number: int | None = None) -> None:
        self.checks.on_frame(self.prefills[P0], PatternPushed(number or self.number, step, reason, "tcp over lo", pushes))  # type: ignore[arg-type]

    def read(self, *reads: RankRead, step: str = "done", reason: str = "", number: int | None = None) -> None:
        self.checks.on_frame(self.decodes[D0], PatternRead(number or self.number, step, reason, reads))  # type: ignore[arg-type]

    def round(self, seconds: float = 0.5) -> None:
        self.grant()
        self.read(READ)
        self.pushed(RankPush(0, 0, 0, 1, "direct", 1000, seconds))


def _with_block_size(node: NodeHello, size: int) -> NodeHello:
    return msgspec.structs.replace(node, kv=msgspec.structs.replace(node.kv, block_size=size))


@pytest.fixture
def checks() -> Checks:
    return Checks()


def test_the_target_grants_the_writer_fills_and_pushes_and_both_tell(checks: Checks) -> None:
    checks.start()
    order = checks.last(D0, CheckPair)
    assert (order.peer, order.agent_id, order.num_tokens) == (P0, AGENT, 8)
    assert checks.sent[P0] == []
    checks.grant()
    push = checks.last(P0, PushPattern)
    assert (push.check, push.num_tokens, push.salt) == (order.check, order.num_tokens, order.salt)
    checks.pushed(SENT)
    assert checks.results == []
    checks.read(READ)
    [result] = checks.results
    rank = RankCheck(writer_rank=0, target_rank=0, transport="tcp over lo", path="direct", kv_bytes=1000, rounds_s=(0.5,))
    assert result == CheckResult("ok", "", (rank,))
    assert rank.bytes_per_s == 2000


def test_rounds_follow_each_other_with_a_fresh_salt_each(checks: Checks) -> None:
    checks.start(3)
    for seconds in (0.1, 0.7, 0.2):
        assert checks.results == []
        checks.round(seconds)
    orders = [frame for frame in checks.sent[D0] if isinstance(frame, CheckPair)]
    assert len({order.salt for order in orders}) == len({order.check for order in orders}) == 3
    [result] = checks.results
    assert result.ranks[0].rounds_s == (0.1, 0.7, 0.2)
    assert result.ranks[0].p99_s == 0.7
    assert result.ranks[0].bytes_per_s == pytest.approx(3000)
    assert str(result) == "checked 3 times, tcp over lo, direct, 3e-06 GB/s, p99 700 ms"


@pytest.mark.parametrize(("p99_s", "shown"), [(0.00123, "1.2 ms"), (0.0477, "48 ms"), (1.234, "1234 ms")])
def test_a_time_is_shown_as_a_person_writes_it(p99_s: float, shown: str) -> None:
    rank = RankCheck(writer_rank=0, target_rank=0, transport="tcp over lo", path="direct", kv_bytes=1, rounds_s=(p99_s,))
    assert str(CheckResult("ok", "", (rank,))).endswith(f", p99 {shown}")


@pytest.mark.parametrize(
    ("sizes", "tokens"),
    [
        ((16, 64), 128),
        ((64, 16), 128),
        ((1, 1), 2),
        ((128, 4), 256),
        ((256, 16), 256),
        ((4, 1024), 1024),
        ((48, 64), 192),
        ((63, 64), 256),
        ((127, 128), 256),
        ((1023, 1024), 1024),
    ],
)
def test_a_pattern_is_of_two_of_the_larger_blocks_or_until_blocks_meet_but_of_one_that_is_large(
    sizes: tuple[int, int], tokens: int
) -> None:
    checks = Checks()
    for peer, size in zip((checks.prefills[P0], checks.decodes[D0]), sizes, strict=True):
        peer.hello = _with_block_size(peer.hello, size)
    checks.start()
    assert checks.last(D0, CheckPair).num_tokens == tokens
    assert tokens <= max(MANY_TOKENS, *sizes)
    assert not tokens % max(sizes)


def test_of_blocks_of_many_bytes_one_is_enough(checks: Checks) -> None:
    for block_bytes, tokens in ((MANY_BYTES // 2, 8), (MANY_BYTES // 2 + 2, 4)):
        for peer in (checks.prefills[P0], checks.decodes[D0]):
            [group] = peer.hello.kv.groups
            large = msgspec.structs.replace(group, head_bytes=block_bytes // group.layers)
            peer.hello = msgspec.structs.replace(peer.hello, kv=msgspec.structs.replace(peer.hello.kv, groups=(large,)))
        checks.start()
        assert checks.last(D0, CheckPair).num_tokens == tokens
        checks.round()


def test_no_round_begins_when_the_budget_is_used_up(checks: Checks) -> None:
    checks.start(20)
    checks.now += BUDGET_S - 0.1
    checks.round()
    assert checks.results == []
    checks.now += 0.1
    checks.round()
    [result] = checks.results
    assert result.outcome == "ok" and len(result.ranks[0].rounds_s) == 2


def test_the_budget_of_a_check_is_not_used_up_by_those_before_it(checks: Checks) -> None:
    checks.start()
    checks.start(2)
    checks.now += BUDGET_S
    for _ in range(3):
        assert len(checks.results) < 2
        checks.round()
    assert len(checks.results) == 2


def test_what_landed_wrong_is_told_of_the_ranks_between_which_it_went(checks: Checks) -> None:
    checks.start(5)
    checks.grant()
    checks.pushed(*(RankPush(writer, target, 2 * target + writer, 1, "direct", 500, 0.1) for target in (0, 1) for writer in (0, 1)))
    checks.read(RankRead(0, (), ""), RankRead(1, (3,), "3 numbers differ"))
    [result] = checks.results
    assert result.outcome == "wrong"
    assert result.reason == "what lands in rank 1 of d0 is not what was written: 3 numbers differ"
    assert [(rank.writer_rank, rank.target_rank) for rank in result.ranks if rank.wrong] == [(1, 1)]


@pytest.mark.parametrize("by", ["target", "writer"])
def test_no_room_is_no_fault(checks: Checks, by: str) -> None:
    checks.start()
    if by == "writer":
        checks.grant()
        checks.read(step="failed", reason="the writer does not push it")
        checks.pushed(step="no_room", reason="p0: no blocks")
    else:
        checks.read(step="no_room", reason="p0: no blocks")
    assert checks.results == [CheckResult("skipped", "p0: no blocks")]
    assert str(checks.results[0]) == "not checked: p0: no blocks"


def test_rounds_before_there_was_no_room_count(checks: Checks) -> None:
    checks.start(3)
    checks.round()
    checks.read(step="no_room", reason="d0: no blocks")
    [result] = checks.results
    assert result.outcome == "ok" and result.ranks[0].rounds_s == (0.5,)


def test_a_push_that_fails_fails_the_check_with_the_first_reason_that_says_why(checks: Checks) -> None:
    checks.start()
    checks.grant()
    checks.read(step="failed", reason="the writer does not push it, or stopped")
    checks.pushed(step="failed", reason="the push failed")
    assert checks.results == [CheckResult("failed", "the push failed")]


@pytest.mark.parametrize(
    ("steps", "silence"),
    [
        ((), "d0 has not answered"),
        (("grant",), "neither p0 nor d0 has answered"),
        (("grant", "pushed"), "d0 has not answered"),
        (("grant", "read"), "p0 has not answered"),
    ],
)
def test_nobody_is_waited_for_for_ever(checks: Checks, steps: tuple[str, ...], silence: str) -> None:
    checks.start()
    says: dict[str, Callable[[], None]] = {"grant": checks.grant, "pushed": lambda: checks.pushed(SENT), "read": lambda: checks.read(READ)}
    for step in steps:
        says[step]()
    checks.now += PATIENCE_S - 1
    checks.checks.tick()
    assert checks.results == []
    number = checks.number
    checks.now += 1
    checks.checks.tick()
    assert checks.results == [CheckResult("failed", f"{silence} within 10 s")]
    checks.pushed(SENT, number=number)
    checks.read(READ, number=number)
    assert len(checks.results) == 1, "late answers are nobody's"


@pytest.mark.parametrize("is_lost", [False, True], ids=["too late", "the writer is gone"])
def test_a_pattern_that_is_compared_after_its_check_has_ended_is_no_grant_any_more(checks: Checks, is_lost: bool) -> None:
    checks.start()
    checks.grant()
    assert checks.grants.concerns(P0)
    if is_lost:
        del checks.prefills[P0]
        checks.checks.node_down(P0)
    else:
        checks.now += PATIENCE_S
        checks.checks.tick()
    assert len(checks.results) == 1 and checks.grants.concerns(P0), "what was pushed may not have been taken in yet"
    checks.read(READ)
    assert not len(checks.grants), "else the writer, when it is told to stop, would be waited for"


@pytest.mark.parametrize("name", [P0, D0])
def test_a_lost_link_ends_the_check_and_those_that_wait_behind_it(checks: Checks, name: NodeName) -> None:
    checks.start()
    checks.start()
    checks.grant()
    checks.prefills.pop(name, None), checks.decodes.pop(name, None)
    checks.checks.node_down(name)
    assert checks.results == [CheckResult("failed", f"the link to {name} was lost"), CheckResult("failed", f"{name} is not there")]
    checks.start()
    assert len(checks.results) == 3


def test_checks_of_one_pair_wait_for_each_other(checks: Checks) -> None:
    checks.start()
    checks.start()
    assert len(checks.sent[D0]) == 1
    checks.round()
    assert len(checks.results) == 1 and len(checks.sent[D0]) == 2
    checks.round()
    assert [result.outcome for result in checks.results] == ["ok", "ok"]


def test_a_check_that_ends_may_begin_the_next(checks: Checks) -> None:
    checks.checks.start(checks.pair, Effort(1, BUDGET_S), lambda _: checks.start())
    checks.round()
    checks.round()
    assert [result.outcome for result in checks.results] == ["ok"]


def test_renewals_cancels_and_quiesces_pass_as_for_any_grant(checks: Checks) -> None:
    checks.start()
    checks.grant()
    token = GrantToken(b"token")
    checks.grants.on_progress(Progress((token,)))
    assert checks.last(D0, Progress) == Progress((token,))
    checks.grants.on_cancel(checks.decodes[D0], Cancel(token, P0, D0))
    assert checks.last(P0, Cancel) == Cancel(token, P0, D0)


def test_once_the_target_has_told_its_end_the_router_answers_a_cancel_by_itself(checks: Checks) -> None:
    checks.start()
    checks.grant()
    checks.read(READ)
    assert not len(checks.grants)
    checks.grants.on_cancel(checks.decodes[D0], Cancel(GrantToken(b"token"), P0, D0))
    assert checks.last(D0, Quiesced).clean


def test_only_the_pairs_own_nodes_are_heard(checks: Checks) -> None:
    checks.start()
    stranger = PrefillPeer(P1, hello(P1, "first"), lambda _: None)
    number = checks.number
    checks.checks.on_frame(stranger, PatternRead(number, "done", "", (READ,)))
    checks.pushed(SENT)  # of nothing that was granted
    checks.grant(target=P1)
    assert checks.sent[P0] == [] and checks.results == []
    checks.grant()
    checks.grant(b"other")
    assert len(checks.sent[P0]) == 1, "a round has one grant"
    checks.checks.on_frame(stranger, PatternPushed(number, "done", "", "", (SENT,)))
    checks.read(READ)
    assert checks.results == []


@pytest.mark.parametrize(("pushes", "reads"), [((), (READ,)), ((SENT,), ())])
def test_who_compared_nothing_has_not_checked(checks: Checks, pushes: tuple[RankPush, ...], reads: tuple[RankRead, ...]) -> None:
    checks.start()
    checks.grant()
    checks.pushed(*pushes)
    checks.read(*reads)
    assert checks.results == [CheckResult("failed", "nothing was compared")]


def test_a_target_that_compares_without_a_grant_has_not_checked(checks: Checks) -> None:
    checks.start()
    checks.read(WRONG)
    assert checks.results == [CheckResult("failed", "nothing was compared")]
