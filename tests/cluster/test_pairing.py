"""A prefill node's agent meets a decode node's: nothing is granted before that very agent has received its own id."""

from collections.abc import Callable

import msgspec
import pytest
from msgspec.structs import replace

from disaggd.cluster.grant_relay import GrantRelay
from disaggd.cluster.hello import ConnectPair, OpenPair, PairAgent, PairLost, PairReady
from disaggd.cluster.pair_checks import CheckResult, Effort, PairChecks, RankCheck
from disaggd.cluster.pairing import AT_FIRST, RECHECK_S, RETRY_S, PairBook
from disaggd.cluster.peers import DecodePeer, Pair, PairState, PrefillPeer
from disaggd.cluster.protocol import ToNode
from disaggd.ids import AgentId, Incarnation, NodeName
from disaggd.transfer.layout import KVSpec, PoolPlace, in_fp8
from tests.support.endpoints import endpoint
from tests.support.routing import D0, D1, KV, P0, P1, hello

OLD, NEW = AgentId("old"), AgentId("new")


class Pairing:
    """A pair book with fake nodes; `sent` by node."""

    def __init__(self) -> None:
        self.prefills: dict[NodeName, PrefillPeer] = {}
        self.decodes: dict[NodeName, DecodePeer] = {}
        self.book = PairBook(self.prefills, self.decodes)
        self.sent: dict[NodeName, list[ToNode]] = {}
        self.now = 0.0

    def prefill_up(self, name: NodeName = P0, incarnation: str = "first", kv: KVSpec = KV) -> None:
        self.sent[name] = []
        greeting = msgspec.structs.replace(hello(name, incarnation), kv=kv)
        self.prefills[name] = PrefillPeer(name, greeting, self.sent[name].append)
        self.book.prefill_up(self.prefills[name], self.now)

    def decode_up(self, name: NodeName = D0) -> None:
        self.sent[name] = []
        self.decodes[name] = DecodePeer(name, hello(name, "first"), self.sent[name].append)
        self.book.decode_up(self.decodes[name], self.now)

    def down(self, name: NodeName) -> None:
        self.prefills.pop(name, None), self.decodes.pop(name, None)
        self.book.node_down(name)

    def agent(self, agent_id: AgentId, incarnation: str = "p0-first") -> None:
        frame = PairAgent(P0, Incarnation(incarnation), endpoint(agent_id, b"metadata", PLACE))
        self.book.on_agent(self.decodes[D0], frame, self.now)

    def ready(self, agent_id: AgentId) -> bool:
        return self.book.on_ready(self.decodes[D0], PairReady(P0, agent_id))

    def lost(self, agent_id: AgentId) -> None:
        self.book.on_lost(self.prefills[P0], PairLost(D0, agent_id, "connection reset"), self.now)

    def state(self) -> PairState:
        (pair,) = self.book
        return pair.state

    def clear(self) -> None:
        for frames in self.sent.values():
            frames.clear()

    def after(self, seconds: float) -> None:
        self.now += seconds
        self.book.tick(self.now)


def ready_pair() -> Pairing:
    pairing = Pairing()
    pairing.decode_up()
    pairing.prefill_up()
    pairing.agent(OLD)
    assert pairing.ready(OLD)
    pairing.clear()
    return pairing


def test_a_pair_of_which_its_writer_says_that_there_is_no_way_is_refused_and_not_tried_again() -> None:
    pairing = ready_pair()
    why = "transfer.staging: 1,024 bytes are less than one write takes in other blocks; it must have 2,048"
    pairing.book.on_lost(pairing.prefills[P0], PairLost(D0, OLD, why, for_good=True), pairing.now)
    pairing.after(100 * RETRY_S)
    pairing.agent(NEW)
    (pair,) = pairing.book
    assert (pair.state, pair.reason) == (PairState.REFUSED, why)
    assert pairing.sent == {P0: [], D0: []}
    pairing.down(P0)
    pairing.prefill_up(incarnation="second")
    assert pairing.state() is PairState.OPENING, "with another file, perhaps"


def test_when_a_target_has_another_agent_than_we_know_it_is_asked_for_one() -> None:
    """Another router believed in another writer, and had the agent fenced that we know; its successor is for nobody."""
    pairing = ready_pair()
    pairing.agent(NEW, incarnation="p0-not-there")
    assert pairing.state() is PairState.READY and pairing.sent == {P0: [], D0: []}
    pairing.lost(NEW)
    assert pairing.state() is PairState.OPENING
    assert pairing.sent == {P0: [], D0: [OpenPair(P0, Incarnation("p0-first"), 1)]}
    pairing.lost(NEW)
    assert len(pairing.sent[D0]) == 1, "once"
    pairing.agent(AgentId("newest"))
    assert pairing.ready(AgentId("newest"))


def test_a_writer_is_told_the_geometry_that_shall_land() -> None:
    pairing = Pairing()
    pairing.decode_up()
    pairing.decodes[D0].hello = msgspec.structs.replace(pairing.decodes[D0].hello, lands_in_fp8=True)
    pairing.prefill_up()
    pairing.agent(OLD)
    (told,) = [frame for frame in pairing.sent[P0] if isinstance(frame, ConnectPair)]
    assert told.kv == in_fp8(KV) != KV


PLACE = PoolPlace(4096, 64)
CONNECT = ConnectPair(D0, Incarnation("d0-first"), endpoint(OLD, b"metadata", PLACE), KV)


@pytest.mark.parametrize("prefill_first", [True, False])
def test_a_pair_is_opened_probed_and_then_ready(prefill_first: bool) -> None:
    pairing = Pairing()
    for up in (pairing.prefill_up, pairing.decode_up) if prefill_first else (pairing.decode_up, pairing.prefill_up):
        up()
    assert pairing.sent == {P0: [], D0: [OpenPair(P0, Incarnation("p0-first"), 1)]}
    pairing.agent(OLD)
    assert pairing.sent[P0] == [CONNECT]
    assert not pairing.book.is_ready(P0, D0), "the agent has not received its own id yet"
    assert pairing.ready(OLD)
    assert pairing.sent[P0] == [CONNECT, PairReady(D0, OLD)]
    assert pairing.book.is_ready(P0, D0)


def test_every_node_is_paired_with_every_node_of_the_other_kind() -> None:
    pairing = Pairing()
    for name in (P0, P1):
        pairing.prefill_up(name)
    for name in (D0, D1):
        pairing.decode_up(name)
    assert {(pair.writer, pair.target) for pair in pairing.book} == {(P0, D0), (P0, D1), (P1, D0), (P1, D1)}


def test_only_ready_pairs_are_reachable() -> None:
    pairing = ready_pair()
    pairing.prefill_up(P1)
    assert [peer.name for peer in pairing.book.reachable(D0)] == [P0]
    assert pairing.book.reachable(D1) == []


def test_what_another_agent_received_makes_no_pair_ready() -> None:
    pairing = Pairing()
    pairing.decode_up()
    pairing.prefill_up()
    assert not pairing.ready(OLD), "no agent is known"
    pairing.agent(NEW)
    assert not pairing.ready(OLD)
    assert pairing.state() is PairState.PROBING
    assert PairReady(D0, OLD) not in pairing.sent[P0]


def test_a_rebuilt_agent_is_not_ready_before_it_is_probed_anew() -> None:
    pairing = ready_pair()
    pairing.agent(NEW)
    assert not pairing.book.is_ready(P0, D0)
    assert [frame.agent_id for frame in pairing.sent[P0] if isinstance(frame, ConnectPair)] == [NEW]
    assert not pairing.ready(OLD)
    assert pairing.ready(NEW)


def test_an_agent_made_for_another_start_of_the_prefill_node_is_ignored() -> None:
    pairing = Pairing()
    pairing.decode_up()
    pairing.prefill_up(incarnation="second")
    pairing.agent(OLD, "p0-first")
    assert pairing.sent[P0] == [] and pairing.state() is PairState.OPENING


def test_a_lost_pair_is_probed_again_after_a_pause() -> None:
    pairing = ready_pair()
    pairing.lost(OLD)
    assert not pairing.book.is_ready(P0, D0)
    pairing.after(RETRY_S / 2)
    assert pairing.sent[P0] == []
    pairing.after(RETRY_S)
    assert pairing.sent[P0] == [CONNECT]
    assert pairing.ready(OLD)


def test_the_loss_of_an_agent_that_was_replaced_changes_nothing() -> None:
    pairing = ready_pair()
    pairing.agent(NEW)
    pairing.ready(NEW)
    pairing.lost(OLD)
    assert pairing.book.is_ready(P0, D0)


def test_a_confirmation_older_than_the_loss_makes_no_pair_ready() -> None:
    """Prefill would push into a connection that it has given up, and never report the loss again."""
    pairing = Pairing()
    pairing.decode_up()
    pairing.prefill_up()
    pairing.agent(OLD)
    pairing.lost(OLD)
    assert not pairing.ready(OLD)
    pairing.after(2 * RETRY_S)
    assert pairing.ready(OLD)


def test_a_silent_pair_is_asked_again() -> None:
    pairing = Pairing()
    pairing.decode_up()
    pairing.prefill_up()
    pairing.clear()
    pairing.after(6 * RETRY_S)
    assert pairing.sent == {P0: [], D0: [OpenPair(P0, Incarnation("p0-first"), 1)]}
    pairing.agent(OLD)
    pairing.clear()
    pairing.after(6 * RETRY_S)
    assert pairing.sent == {P0: [CONNECT], D0: []}


def test_a_ready_pair_is_left_alone() -> None:
    pairing = ready_pair()
    pairing.after(1000.0)
    assert pairing.sent == {P0: [], D0: []}


# ── geometries ──

[GROUP] = KV.groups


@pytest.mark.parametrize(
    ("kv", "why"),
    [
        (msgspec.structs.replace(KV, head_dim=16), "head_dim differs: 16 and 8"),
        (msgspec.structs.replace(KV, groups=(msgspec.structs.replace(GROUP, layers=3),)), "num_layers differs: 3 and 2"),
        (
            msgspec.structs.replace(KV, groups=(msgspec.structs.replace(GROUP, kv_heads=4),)),
            "kv_heads differ: 4 in 2 layers and 1 in 2 layers",
        ),
        (
            msgspec.structs.replace(KV, groups=(msgspec.structs.replace(GROUP, layers=1),) * 2),
            "kv_heads differ: 1 in 1 layers, 1 in 1 layers",
        ),
    ],
)
def test_nodes_whose_kv_can_never_be_each_others_are_not_brought_together(kv: KVSpec, why: str) -> None:
    pairing = Pairing()
    pairing.decode_up()
    pairing.prefill_up(kv=kv)
    (pair,) = pairing.book
    assert pair.state is PairState.REFUSED and pair.reason.startswith(why)
    pairing.agent(OLD)  # another router has asked for it
    assert not pairing.ready(OLD)
    pairing.after(1000.0)
    assert pairing.sent == {P0: [], D0: []}
    pairing.prefill_up(P1)
    assert pairing.sent[D0] == [OpenPair(P1, Incarnation("p1-first"), 1)], "the cluster serves with the rest"


def test_blocks_of_another_size_or_dtype_are_no_obstacle_and_the_writer_is_told() -> None:
    pairing = Pairing()
    pairing.decode_up()
    pairing.prefill_up(kv=msgspec.structs.replace(KV, block_size=16, dtype="bfloat16"))
    pairing.agent(OLD)
    assert pairing.sent[P0] == [CONNECT] and CONNECT.kv == pairing.decodes[D0].hello.kv
    assert pairing.ready(OLD)


def test_why_a_pair_is_lost_is_said_as_long_as_it_is() -> None:
    pairing = ready_pair()
    pairing.lost(OLD)
    assert [pair.reason for pair in pairing.book] == ["connection reset"]
    pairing.after(2 * RETRY_S)
    assert pairing.ready(OLD)
    assert [pair.reason for pair in pairing.book] == [""]


@pytest.mark.parametrize("name", [P0, D0])
def test_a_nodes_pairs_go_with_it_and_come_back_unready(name: NodeName) -> None:
    pairing = ready_pair()
    pairing.down(name)
    assert list(pairing.book) == []
    pairing.after(1000.0)
    (pairing.prefill_up if name == P0 else pairing.decode_up)()
    assert pairing.state() is PairState.OPENING


def test_frames_about_nodes_that_left_are_ignored() -> None:
    pairing = ready_pair()
    decode, prefill = pairing.decodes[D0], pairing.prefills[P0]
    pairing.down(P0)
    pairing.agent(NEW)
    assert not pairing.book.on_ready(decode, PairReady(P0, OLD))
    pairing.book.on_lost(prefill, PairLost(D0, OLD, ""), 0.0)
    assert list(pairing.book) == []


def test_the_target_hears_how_many_ranks_write_and_the_writer_of_each_rank_and_the_geometry() -> None:
    pairing = Pairing()
    pairing.decode_up()
    pairing.sent[P0] = []
    pairing.prefills[P0] = PrefillPeer(P0, replace(hello(P0, "first"), num_ranks=3), pairing.sent[P0].append)
    pairing.book.prefill_up(pairing.prefills[P0], pairing.now)
    assert pairing.sent[D0] == [OpenPair(P0, Incarnation("p0-first"), 3)]
    endpoints = (*endpoint(OLD, b"metadata", PLACE), *endpoint(NEW, b"another", PLACE))
    pairing.book.on_agent(pairing.decodes[D0], PairAgent(P0, Incarnation("p0-first"), endpoints), pairing.now)
    assert pairing.sent[P0] == [ConnectPair(D0, Incarnation("d0-first"), endpoints, KV)]
    assert not pairing.ready(NEW) and pairing.ready(OLD), "the first rank's id is that of all"


# ── checks ──

OK = CheckResult("ok", "", (RankCheck(writer_rank=0, target_rank=0, transport="tcp", path="direct", kv_bytes=1, rounds_s=(0.1,)),))
WRONG = CheckResult("wrong", "3 numbers differ")
FAILED = CheckResult("failed", "the push failed")
SKIPPED = CheckResult("skipped", "p0: no blocks are free")


class CheckedPairing(Pairing):
    """One whose checks are answered by the test, each by `ends`."""

    def __init__(self) -> None:
        super().__init__()
        self.checks: list[tuple[Pair, Effort, Callable[[CheckResult], None]]] = []
        checks = PairChecks(self.prefills, self.decodes, GrantRelay(self.prefills, self.decodes), lambda: self.now)
        checks.start = lambda *check: self.checks.append(check)  # type: ignore[method-assign, assignment]
        self.book = PairBook(self.prefills, self.decodes, checks)
        self.decode_up()
        self.prefill_up()
        self.agent(OLD)

    def ends(self, result: CheckResult) -> None:
        _, _, done = self.checks.pop(0)
        done(result)

    @property
    def pair(self) -> Pair:
        (pair,) = self.book
        return pair


def test_a_pair_is_ready_once_a_pattern_has_arrived_as_it_was() -> None:
    pairing = CheckedPairing()
    assert not pairing.ready(OLD)
    assert pairing.state() is PairState.CHECKING and not pairing.book.is_ready(P0, D0)
    assert PairReady(D0, OLD) not in pairing.sent[P0]
    assert not pairing.ready(OLD), "another router's probe is no reason to check it twice"
    [(pair, effort, _)] = pairing.checks
    assert (pair.writer, pair.target, effort) == (P0, D0, AT_FIRST)
    pairing.ends(OK)
    assert pairing.book.is_ready(P0, D0)
    assert pairing.sent[P0][-1] == PairReady(D0, OLD)


def test_an_agent_that_was_checked_is_not_checked_again_when_another_router_has_it_probed() -> None:
    pairing = CheckedPairing()
    pairing.ready(OLD)
    pairing.ends(OK)
    pairing.agent(OLD)
    assert pairing.ready(OLD)
    assert not pairing.checks


def test_a_rebuilt_agent_is_checked_anew() -> None:
    pairing = CheckedPairing()
    pairing.ready(OLD)
    pairing.ends(OK)
    pairing.agent(NEW)
    pairing.ready(NEW)
    assert pairing.state() is PairState.CHECKING and len(pairing.checks) == 1


@pytest.mark.parametrize(("result", "pause_s"), [(WRONG, RECHECK_S), (FAILED, 5 * RETRY_S)])
def test_a_pair_that_fails_is_not_used_says_why_and_is_checked_again_after_a_pause(result: CheckResult, pause_s: float) -> None:
    pairing = CheckedPairing()
    pairing.ready(OLD)
    pairing.ends(result)
    assert (pairing.state(), pairing.pair.reason) == (PairState.FAILED, result.reason)
    pairing.after(pause_s - 1)
    assert not pairing.checks
    pairing.after(1)
    assert pairing.state() is PairState.CHECKING
    pairing.after(1000)
    assert len(pairing.checks) == 1
    pairing.ends(OK)
    assert pairing.book.is_ready(P0, D0) and not pairing.pair.reason


def test_a_pair_whose_nodes_are_busy_is_used_unchecked_and_checked_when_they_have_room() -> None:
    pairing = CheckedPairing()
    pairing.ready(OLD)
    pairing.ends(SKIPPED)
    assert pairing.book.is_ready(P0, D0)
    assert pairing.pair.reason == SKIPPED.reason
    for _ in range(2):
        pairing.after(RECHECK_S)
        assert pairing.book.is_ready(P0, D0), "it is used meanwhile"
        pairing.ends(SKIPPED)
    pairing.after(RECHECK_S)
    pairing.ends(OK)
    assert pairing.book.is_ready(P0, D0) and not pairing.pair.reason
    pairing.after(1000)
    assert not pairing.checks


@pytest.mark.parametrize(("result", "is_ready"), [(OK, True), (SKIPPED, True), (FAILED, True), (WRONG, False)])
def test_of_one_in_use_only_wrong_bytes_make_an_end(result: CheckResult, is_ready: bool) -> None:
    pairing = CheckedPairing()
    pairing.ready(OLD)
    pairing.ends(OK)
    told: list[CheckResult] = []
    assert pairing.book.check(pairing.pair, Effort(20, 1.0), told.append)
    pairing.ends(result)
    assert told == [result] and pairing.book.is_ready(P0, D0) is is_ready


def test_one_that_failed_is_used_once_somebody_has_found_it_right() -> None:
    pairing = CheckedPairing()
    pairing.ready(OLD)
    pairing.ends(FAILED)
    assert pairing.book.check(pairing.pair, Effort(20, 1.0), lambda _: None)
    pairing.ends(OK)
    assert pairing.book.is_ready(P0, D0)
    assert pairing.sent[P0][-1] == PairReady(D0, OLD)


def test_one_that_is_not_probed_cannot_be_checked() -> None:
    pairing = CheckedPairing()
    assert not pairing.book.check(pairing.pair, Effort(20, 1.0), lambda _: None)
    assert not ready_pair().book.check(next(iter(ready_pair().book)), Effort(20, 1.0), lambda _: None), "nor where nothing is"


def lost(pairing: CheckedPairing) -> None:
    pairing.lost(OLD)


def rebuilt(pairing: CheckedPairing) -> None:
    pairing.agent(NEW)


def gone(pairing: CheckedPairing) -> None:
    pairing.down(P0)


def restarted(pairing: CheckedPairing) -> None:
    pairing.down(P0)
    pairing.prefill_up(incarnation="second")


@pytest.mark.parametrize("happens", [lost, rebuilt, gone, restarted])
@pytest.mark.parametrize("result", [OK, WRONG])
def test_what_a_check_finds_is_of_the_agent_that_was_checked(happens: Callable[[CheckedPairing], None], result: CheckResult) -> None:
    pairing = CheckedPairing()
    pairing.ready(OLD)
    happens(pairing)
    states = [pair.state for pair in pairing.book]
    pairing.clear()
    pairing.ends(result)
    assert [pair.state for pair in pairing.book] == states
    assert pairing.sent[P0] == []


def test_what_fails_at_every_probe_is_logged_once_until_the_pair_has_come_up(caplog: pytest.LogCaptureFixture) -> None:
    pairing = Pairing()
    pairing.prefill_up()
    pairing.decode_up()
    pairing.agent(OLD)
    for _ in range(3):
        pairing.lost(OLD)
        pairing.now += RETRY_S
        pairing.book.tick(pairing.now)
    assert [record.getMessage() for record in caplog.records] == ["p0 → d0: KV path is lost, trying again: connection reset"]
    assert pairing.ready(OLD)
    pairing.lost(OLD)
    assert sum("is lost" in record.getMessage() for record in caplog.records) == 2
