"""A checkup asks about every way once, two of one node never at once, and says of what cannot be checked why."""

import asyncio
from collections.abc import Callable, Iterator

import pytest

from disaggd.cluster.hello import PairAgent
from disaggd.cluster.pair_checks import CheckResult, Effort, RankCheck
from disaggd.cluster.peers import Pair, PairState
from disaggd.config import Config, NodeConfig, TransferConfig
from disaggd.errors import HelloRefused
from disaggd.ids import AgentId, Incarnation, NodeName
from disaggd.observe.checkup import Checkup
from disaggd.roles import checkups as module
from disaggd.roles.checkups import EFFORT, Checkups
from disaggd.transfer.endpoint import Endpoint
from disaggd.units import Address
from tests.support.endpoints import SOMEWHERE

P0, P1, D0, D1, R = (NodeName(name) for name in ("p0", "p1", "d0", "d1", "r"))
WAYS = [(P0, D0), (P0, D1), (P1, D0), (P1, D1)]
OK = CheckResult(
    "ok", "", (RankCheck(writer_rank=0, target_rank=1, transport="tcp", path="direct", kv_bytes=1_000_000, rounds_s=(0.001, 0.003)),)
)


class Pairs:
    """In place of the router's pairs: a check is under way until the test ends it."""

    def __init__(self, states: list[PairState]) -> None:
        self.pairs = [Pair(writer, target, state) for (writer, target), state in zip(WAYS, states, strict=False)]
        self.under_way: dict[tuple[NodeName, NodeName], Callable[[CheckResult], None]] = {}
        self.efforts: list[Effort] = []

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    def check(self, pair: Pair, effort: Effort, done: Callable[[CheckResult], None]) -> bool:
        if pair.state is not PairState.READY:
            return False
        self.efforts.append(effort)
        self.under_way[pair.writer, pair.target] = done
        return True

    def end(self, result: CheckResult = OK) -> None:
        """Of all that are under way."""
        ended, self.under_way = self.under_way, {}
        for done in ended.values():
            done(result)


class Cluster:
    """In place of the dispatcher."""

    def __init__(self, *states: PairState, up: tuple[NodeName, ...] = (P0, P1, D0, D1)) -> None:
        self.pairs = Pairs(list(states))
        self.prefills = {name: None for name in up if name.startswith("p")}
        self.decodes = {name: None for name in up if name.startswith("d")}
        nodes = [
            NodeConfig(name=name, role="prefill" if name.startswith("p") else "decode", listen=Address(f"10.0.0.1:{8101 + number}"))
            for number, name in enumerate((P0, P1, D0, D1))
        ]
        config = Config(nodes=tuple(nodes), transfer=TransferConfig(devices="eth0"))
        self.checkups = Checkups(config, R, self)  # type: ignore[arg-type]
        self.checkups.tick()

    async def run(self, *results: CheckResult) -> Checkup:
        """A checkup, whose checks end with these, and then well."""
        task = asyncio.create_task(self.checkups.run())
        answers = list(results)
        while not task.done():
            await asyncio.sleep(0)
            self.pairs.end(answers.pop(0) if answers and self.pairs.under_way else OK)
        return task.result()


def test_all_is_well() -> None:
    cluster = Cluster(*[PairState.READY] * 4)
    checkup = asyncio.run(cluster.run())
    assert checkup.ok
    assert [(way.writer, way.target, way.verdict) for way in checkup.ways] == [(*way, "ok") for way in WAYS]
    [rank] = checkup.ways[0].ranks
    assert (rank.writer_rank, rank.target_rank, rank.rounds, rank.gb_per_s, rank.p99_ms) == (0, 1, 2, 0.5, 3.0)
    assert [(node.name, node.role, node.link) for node in checkup.nodes] == [
        (P0, "prefill", "up"), (P1, "prefill", "up"), (D0, "decode", "up"), (D1, "decode", "up"),
    ]  # fmt: skip
    assert cluster.pairs.efforts == [EFFORT] * 4


async def most_at_once(cluster: Cluster) -> list[set[tuple[NodeName, NodeName]]]:
    """What is under way together, in its order."""
    task = asyncio.create_task(cluster.checkups.run())
    seen = []
    while not task.done():
        for _ in range(5):
            await asyncio.sleep(0)
        if cluster.pairs.under_way:
            seen.append(set(cluster.pairs.under_way))
        cluster.pairs.end()
    task.result()
    return seen


def test_two_ways_of_one_node_are_checked_one_after_the_other_and_others_at_once() -> None:
    seen = asyncio.run(most_at_once(Cluster(*[PairState.READY] * 4)))
    assert all(len({name for way in together for name in way}) == 2 * len(together) for together in seen)
    assert sum(map(len, seen)) == 4 and max(map(len, seen)) == 2


@pytest.mark.parametrize(("outcome", "verdict"), [("wrong", "wrong"), ("failed", "failed"), ("skipped", "unchecked")])
def test_a_way_that_is_not_well_says_why(outcome: str, verdict: str) -> None:
    checkup = asyncio.run(Cluster(PairState.READY).run(CheckResult(outcome, "such is life")))  # type: ignore[arg-type]
    assert not checkup.ok
    assert [(way.verdict, way.reason) for way in checkup.ways] == [(verdict, "such is life")]


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (PairState.OPENING, "d0 has no agent for it: are there free ports 18500-18999 on eth0? Its log says more"),
        (
            PairState.PROBING,
            "p0 has sent its probe, and nothing arrives at d0, ports 18507, 18509 on eth0: does a firewall close 18500-18999?",
        ),
        (
            PairState.LOST,
            "p0 cannot reach d0, ports 18507, 18509 on eth0: connection refused. If it never could, does a firewall close 18500-18999?",
        ),
    ],
)
def test_a_way_that_cannot_be_reached_names_ports_and_device(state: PairState, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROBE_PATIENCE_S", 0.01)
    cluster = Cluster(state)
    [pair] = cluster.pairs.pairs
    pair.reason = "connection refused"
    if state is not PairState.OPENING:
        pair.agent = PairAgent(P0, Incarnation("i"), tuple(Endpoint(AgentId(f"{port}"), b"", SOMEWHERE, port) for port in (18507, 18509)))
    checkup = asyncio.run(cluster.run())
    assert not checkup.ok
    assert [(way.verdict, way.reason) for way in checkup.ways] == [("unreachable", words)]


def test_a_way_between_nodes_whose_kv_cannot_be_each_others_is_refused_with_the_field() -> None:
    cluster = Cluster(PairState.REFUSED)
    cluster.pairs.pairs[0].reason = "head_dim differs: 64 and 128"
    checkup = asyncio.run(cluster.run())
    assert not checkup.ok
    assert [(way.verdict, way.reason) for way in checkup.ways] == [("refused", "head_dim differs: 64 and 128")]


def test_a_way_that_is_being_opened_is_waited_for() -> None:
    async def opened_meanwhile(cluster: Cluster) -> Checkup:
        task = asyncio.create_task(cluster.run())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not cluster.pairs.efforts
        cluster.pairs.pairs[0].state = PairState.READY
        cluster.checkups.tick()
        return await task

    assert asyncio.run(opened_meanwhile(Cluster(PairState.PROBING))).ok


def test_a_way_that_began_to_open_since_the_last_tick_is_waited_for() -> None:
    async def opened_meanwhile(cluster: Cluster) -> Checkup:
        cluster.pairs.pairs[0].state = PairState.OPENING
        task = asyncio.create_task(cluster.run())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not task.done()
        cluster.pairs.pairs[0].state = PairState.READY
        cluster.checkups.tick()
        return await task

    assert asyncio.run(opened_meanwhile(Cluster(PairState.READY))).ok


def test_a_check_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAY_PATIENCE_S", 0.01)
    cluster = Cluster(PairState.READY)
    checkup = asyncio.run(cluster.checkups.run())
    assert [(way.verdict, way.reason) for way in checkup.ways] == [("failed", "not done within 0.01 s")]
    cluster.pairs.end()  # nobody waits any more


def test_a_node_without_a_link_says_why() -> None:
    cluster = Cluster(up=(P0, D0))
    config = cluster.checkups._config
    cluster.checkups.no_link(config.node("p1"), HelloRefused("role", "prefill", "decode"), "")
    cluster.checkups.node_up(D1)
    cluster.checkups.node_down(D1, "silent for 3 heartbeats")
    checkup = asyncio.run(cluster.run())
    assert not checkup.ok
    assert {node.name: node.reason for node in checkup.nodes} == {
        P0: "", D0: "", P1: "it is a decode node, and this file has it as prefill", D1: "its link was lost: silent for 3 heartbeats",
    }  # fmt: skip


def test_who_asks_while_one_is_under_way_shares_the_next() -> None:
    async def ask_four_times(cluster: Cluster) -> list[Checkup]:
        tasks = [asyncio.create_task(cluster.checkups.run())]
        for _ in range(10):
            await asyncio.sleep(0)
        assert cluster.pairs.under_way
        tasks += [asyncio.create_task(cluster.checkups.run()) for _ in range(3)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            cluster.pairs.end()
        return [task.result() for task in tasks]

    cluster = Cluster(PairState.READY)
    first, *others = asyncio.run(ask_four_times(cluster))
    assert all(other is others[0] and other is not first for other in others)
    assert len(cluster.pairs.efforts) == 2
