"""The receiving side over scripted message orders: probes, landings, fences, burnt ports."""

from dataclasses import dataclass, field

import pytest

from disaggd.ids import AgentId, GrantToken, Incarnation, NodeName
from disaggd.transfer import messages as m
from disaggd.transfer.agent import NoAgent
from disaggd.transfer.incoming import RETRY_S, Incoming
from disaggd.transfer.layout import KVGroup, KVSpec, PoolPlace
from disaggd.transfer.notification import Connect, FirstToken, Piece, WireQuiesced
from disaggd.transfer.pool import Pool
from disaggd.transfer.share import Share
from tests.support.endpoints import endpoint
from tests.support.scripted_agent import ScriptedAgent

P0, P1 = NodeName("p0"), NodeName("p1")
ONE, TWO = Incarnation("one"), Incarnation("two")
TOKEN = GrantToken(bytes(16))
FIRST = FirstToken(7)
POOL = Pool(PoolPlace(4096, 4), KVSpec(dtype="float32", block_size=1, head_dim=1, groups=(KVGroup(layers=1, kv_heads=1, head_bytes=8),)))


@dataclass
class Bench:
    """An `Incoming` with scripted agents a0, a1, … in the order of their making."""

    agents: list[ScriptedAgent] = field(default_factory=list)
    events: list[m.TransferEvent] = field(default_factory=list)
    now: float = 0.0
    num_refused: int = 0
    is_network_down: bool = False

    def __post_init__(self) -> None:
        self.incoming = Incoming(Share(POOL.kv), POOL, self._make, self.events.append, lambda: self.now)  # type: ignore[arg-type, return-value]

    def _make(self) -> ScriptedAgent:
        if self.is_network_down:
            self.num_refused += 1
            raise NoAgent("no such device")
        self.agents.append(ScriptedAgent(AgentId(f"a{len(self.agents)}")))
        return self.agents[-1]

    def turn(self) -> list[m.TransferEvent]:
        """Poll and deliver; the events since the last turn."""
        self.incoming.deliver(self.incoming.poll())
        events, self.events[:] = list(self.events), []
        return events


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    bench.incoming.open(m.OpenPair(P0, ONE, 1))
    return bench


def opened(agent: ScriptedAgent, incarnation: Incarnation = ONE, peer: NodeName = P0) -> m.PairOpened:
    return m.PairOpened(peer, incarnation, endpoint(agent.agent_id, agent.metadata, POOL.place))


def test_opening_again_announces_the_same_agent(bench: Bench) -> None:
    bench.incoming.open(m.OpenPair(P0, ONE, 1))
    assert bench.turn() == [opened(bench.agents[0])] * 2
    assert len(bench.agents) == 1


def test_new_incarnation_fences_the_old_agent_first(bench: Bench) -> None:
    bench.turn()
    bench.incoming.open(m.OpenPair(P0, TWO, 1))
    old, new = bench.agents
    assert old.is_destroyed
    assert bench.turn() == [m.Fenced(P0, old.agent_id), opened(new, TWO)]


def test_only_its_own_id_proves_an_agent_reached(bench: Bench) -> None:
    bench.turn()
    bench.incoming.fence(m.Fence(P0, AgentId("a0")))
    bench.turn()
    bench.agents[1].arrive(Connect(AgentId("a0"), 0))
    assert bench.turn() == [], "late metadata of the fenced agent has reached the new one: no writes"
    bench.agents[1].arrive(Connect(AgentId("a1"), 0))
    assert bench.turn() == [m.PairProbed(P0, AgentId("a1"))]


def test_fenced_port_is_kept_until_the_peer_has_reached_the_new_agent(bench: Bench) -> None:
    bench.incoming.fence(m.Fence(P0, AgentId("a0")))
    bench.incoming.fence(m.Fence(P0, AgentId("a1")))
    bench.agents[2].arrive(Connect(AgentId("a1"), 0))
    bench.turn()
    assert [agent.port.is_released for agent in bench.agents] == [False, False, False]
    bench.agents[2].arrive(Connect(AgentId("a2"), 0))
    bench.turn()
    assert [agent.port.is_released for agent in bench.agents] == [True, True, False]


def test_fence_of_an_agent_that_is_gone_only_confirms(bench: Bench) -> None:
    bench.turn()
    bench.incoming.fence(m.Fence(P0, AgentId("older")))
    bench.incoming.fence(m.Fence(P1, AgentId("never")))
    assert bench.turn() == [m.Fenced(P0, AgentId("older")), m.Fenced(P1, AgentId("never"))]
    assert not bench.agents[0].is_destroyed


@pytest.fixture
def cut_off(bench: Bench) -> Bench:
    """a0 was fenced while the network was down: nobody stands in for it."""
    bench.turn()
    bench.is_network_down = True
    bench.incoming.fence(m.Fence(P0, AgentId("a0")))
    assert bench.turn() == [m.Fenced(P0, AgentId("a0"))], "its blocks are free, whatever becomes of the next one"
    return bench


def test_an_agent_that_cannot_be_made_is_made_when_the_network_is_back(cut_off: Bench) -> None:
    cut_off.is_network_down = False
    cut_off.incoming.retry()
    assert cut_off.turn() == [] and cut_off.incoming.is_lacking
    cut_off.now = RETRY_S
    cut_off.incoming.retry()
    assert cut_off.turn() == [opened(cut_off.agents[1])] and not cut_off.incoming.is_lacking
    cut_off.now = 2 * RETRY_S
    cut_off.incoming.retry()
    assert cut_off.turn() == [] and len(cut_off.agents) == 2


def test_attempts_to_make_an_agent_are_a_second_apart(cut_off: Bench) -> None:
    for tenths in range(30):
        cut_off.now = tenths / 10
        cut_off.incoming.retry()
    assert cut_off.num_refused == 3 and cut_off.incoming.num_agents == 0


def test_a_late_agent_is_for_the_latest_incarnation_of_its_peer(cut_off: Bench) -> None:
    cut_off.incoming.open(m.OpenPair(P0, TWO, 1))
    assert cut_off.turn() == []
    cut_off.is_network_down = False
    cut_off.now = RETRY_S
    cut_off.incoming.retry()
    assert cut_off.turn() == [opened(cut_off.agents[1], TWO)]


def test_the_port_of_a_fenced_agent_is_kept_however_late_the_next_one_is(cut_off: Bench) -> None:
    cut_off.is_network_down = False
    cut_off.incoming.open(m.OpenPair(P0, ONE, 1))
    assert not cut_off.agents[0].port.is_released
    cut_off.agents[1].arrive(Connect(AgentId("a1"), 0))
    cut_off.turn()
    assert cut_off.agents[0].port.is_released


def test_closing_gives_up_what_is_lacking_and_every_port(cut_off: Bench) -> None:
    cut_off.incoming.close_all()
    assert not cut_off.incoming.is_lacking and cut_off.agents[0].port.is_released


def test_pieces_in_any_order_land_once(bench: Bench) -> None:
    bench.turn()
    bench.incoming.expect(m.Expect(TOKEN, P0, AgentId("a0"), 3))
    bench.agents[0].arrive(Piece(TOKEN, 0, 2, 0, total=3, first=FIRST), Piece(TOKEN, 0, 1, 16))
    assert bench.turn() == []
    assert bench.incoming.is_landing
    bench.agents[0].arrive(Piece(TOKEN, 0, 0, 8))
    assert bench.turn() == [m.Landed(TOKEN, FIRST, 24)]
    bench.agents[0].arrive(Piece(TOKEN, 0, 0, 8))
    assert bench.turn() == []
    assert (bench.incoming.num_dropped, bench.incoming.landed_bytes) == (1, 24)


def test_contradiction_fails_the_landing_once(bench: Bench) -> None:
    bench.turn()
    bench.incoming.expect(m.Expect(TOKEN, P0, AgentId("a0"), 3))
    bench.agents[0].arrive(Piece(TOKEN, 0, 0, 8), Piece(TOKEN, 0, 0, 8), Piece(TOKEN, 0, 1, 8))
    (failed,) = bench.turn()
    assert isinstance(failed, m.LandingFailed) and "twice" in failed.reason
    assert bench.incoming.num_dropped == 1


def test_pieces_at_another_peers_agent_do_not_count(bench: Bench) -> None:
    bench.incoming.open(m.OpenPair(P1, ONE, 1))
    bench.turn()
    bench.incoming.expect(m.Expect(TOKEN, P0, AgentId("a0"), 1))
    bench.agents[1].arrive(Piece(TOKEN, 0, 0, 8), Piece(TOKEN, 0, 1, 0, total=2, first=FIRST))
    assert bench.turn() == []
    assert bench.incoming.num_dropped == 2


def test_forgotten_grant_does_not_land(bench: Bench) -> None:
    bench.turn()
    bench.incoming.expect(m.Expect(TOKEN, P0, AgentId("a0"), 0))
    bench.incoming.forget(TOKEN)
    bench.agents[0].arrive(Piece(TOKEN, 0, 0, 0, total=1, first=FIRST))
    assert bench.turn() == []


def test_fence_ends_what_was_landing_there_and_nothing_else(bench: Bench) -> None:
    bench.incoming.open(m.OpenPair(P1, ONE, 1))
    other = GrantToken(b"1" * 16)
    bench.incoming.expect(m.Expect(TOKEN, P0, AgentId("a0"), 0))
    bench.incoming.expect(m.Expect(other, P1, AgentId("a1"), 0))
    for agent, token in zip(bench.agents, (TOKEN, other), strict=True):
        agent.arrive(Piece(token, 0, 0, 0, total=1, first=FIRST))
    arrived = bench.incoming.poll()
    bench.incoming.fence(m.Fence(P0, AgentId("a0")))
    bench.events.clear()
    bench.incoming.deliver(arrived)
    assert bench.events == [m.Landed(other, FIRST, 0)], "what was fetched before the fence is dropped"


def test_quiesced_by_wire_names_the_pairs_peer(bench: Bench) -> None:
    bench.turn()
    bench.agents[0].arrive(WireQuiesced(TOKEN, clean=True))
    assert bench.turn() == [m.QuiescedByWire(TOKEN, True, P0)]


def test_foreign_bytes_are_counted_and_dropped(bench: Bench) -> None:
    bench.turn()
    bench.agents[0].arriving = [b"", b"GET / HTTP/1.1"]
    assert bench.turn() == []
    assert bench.incoming.num_dropped == 2


def test_closed_pair_frees_its_ports(bench: Bench) -> None:
    bench.incoming.fence(m.Fence(P0, AgentId("a0")))
    bench.turn()
    bench.incoming.close(P0)
    assert bench.turn() == [m.Fenced(P0, AgentId("a1"))]
    assert [agent.port.is_released for agent in bench.agents] == [True, True]
    assert bench.incoming.num_agents == 0
