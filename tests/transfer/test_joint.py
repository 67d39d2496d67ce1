"""Hand-offs between nodes of any number of ranks, over real NIXL: the bytes are those of nodes of one rank, and no others are touched."""

import os
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from disaggd.ids import AgentId, BlockId, GrantToken, Incarnation, NodeName
from disaggd.transfer import messages as m
from disaggd.transfer.environment import transfer_environment
from disaggd.transfer.notification import FirstToken
from disaggd.transfer.reshape import heads_of
from tests.support.clusters import free_port_range
from tests.support.endpoints import span

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60.0
P, D = NodeName("p"), NodeName("d")
TOKEN = GrantToken(b"a grant".ljust(16))
BLOCK_BYTES = 3 * 2 * 4 * 8 * 4
"""Of one head in all layers."""

pytestmark = pytest.mark.process


def blocks(*ids: int) -> tuple[BlockId, ...]:
    return tuple(BlockId(block) for block in ids)


SOURCE, TARGET = blocks(1, 2, 3, 11, 5), blocks(9, 10, 4, 14, 0)


class Nodes:
    """The test's end of a `rank_nodes.py` process."""

    def __init__(self) -> None:
        ports = free_port_range(128).split("-")
        self._connection, theirs = Pipe()
        environment = {**os.environ, **transfer_environment("lo", user_timeout_s=3.0, gpu=False), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(Path(__file__).with_name("rank_nodes.py")), str(theirs.fileno()), *ports]
        self.process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: object) -> Any:
            self._connection.send((name, arguments))
            assert self._connection.poll(DEADLINE_S), f"no answer to {name}"
            is_right, answer = self._connection.recv()
            if not is_right:
                raise answer
            return answer

        return call

    def end(self) -> None:
        self._connection.send(None)
        try:
            assert self.process.wait(DEADLINE_S) == 0
        finally:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    yield nodes
    nodes.end()


EVERY_DAY = {(2, 1, 4), (1, 2, 4), (4, 2, 2), (2, 3, 8), (3, 4, 2)}
PAIRS = [
    pytest.param(p, d, heads, marks=() if (p, d, heads) in EVERY_DAY else pytest.mark.nightly, id=f"{p}-{d}-of-{heads}")
    for heads in (4, 8, 2)
    for p in (1, 2, 3, 4)
    for d in (1, 2, 3, 4)
]


@pytest.mark.parametrize(("num_prefill", "num_decode", "kv_heads"), PAIRS)
def test_every_rank_gets_its_heads_of_each_block_and_nothing_else_is_touched(
    nodes: Nodes, num_prefill: int, num_decode: int, kv_heads: int
) -> None:
    nodes.make(num_prefill, num_decode, kv_heads)
    agent_id = nodes.pair()
    landed = nodes.push(TOKEN, agent_id, SOURCE, TARGET)
    held = sum(len(heads_of(rank, num_decode, kv_heads)) for rank in range(num_decode))
    assert landed == m.Landed(TOKEN, FirstToken(7), len(TARGET) * held * BLOCK_BYTES)
    assert nodes.num_wrong("decode") == nodes.num_wrong("prefill") == 0
    ended = nodes.expect("prefill", m.PushEnded)
    assert (ended.clean, ended.finished, ended.kv_bytes) == (True, True, landed.kv_bytes)
    assert nodes.heard("decode") == nodes.heard("prefill") == [], "each thing is said once"
    assert nodes.stats("prefill").sent_bytes == nodes.stats("decode").landed_bytes == landed.kv_bytes


@pytest.fixture
def agent_id(nodes: Nodes) -> AgentId:
    """Of a decode node of two ranks, which a prefill node of three writes to."""
    nodes.make(3, 2, 8)
    return AgentId(nodes.pair())


def test_a_second_grant_lands_beside_the_first(nodes: Nodes, agent_id: AgentId) -> None:
    nodes.push(TOKEN, agent_id, SOURCE, TARGET)
    nodes.push(GrantToken(b"another".ljust(16)), agent_id, blocks(0, 7), blocks(1, 2))
    assert nodes.num_wrong("decode") == 0


def test_checksums_are_of_what_each_rank_writes(nodes: Nodes, agent_id: AgentId) -> None:
    landed = nodes.push(TOKEN, agent_id, SOURCE, TARGET, True)
    assert landed.num_verified == len(TARGET)
    assert nodes.num_wrong("decode") == 0


def test_references_come_back_once_when_every_rank_has_written(nodes: Nodes, agent_id: AgentId) -> None:
    nodes.push(TOKEN, agent_id, SOURCE, TARGET)
    said = []
    while not said or not isinstance(said[-1], m.PushEnded):
        said.append(nodes.expect("prefill", m.TransferEvent))
    assert [type(event) for event in said] == [m.HandleDone, m.HandleDone, m.PushEnded]
    assert [event.source for event in said[:2]] == [SOURCE, SOURCE]
    assert sum(event.kv_bytes for event in said[:2]) == said[2].kv_bytes


def test_a_cancelled_push_ends_clean_on_all_ranks_and_lands_on_none(nodes: Nodes, agent_id: AgentId) -> None:
    nodes.submit("decode", m.Expect(TOKEN, P, agent_id, len(TARGET)))
    write = m.PushBlocks(TOKEN, range(3), span(SOURCE, 4), TARGET)
    nodes.submit("prefill", m.BeginPush(TOKEN, D, agent_id, 30.0), write, m.CancelPush(TOKEN), m.FinishPush(TOKEN, None))
    ended = nodes.expect("prefill", m.PushEnded)
    assert (ended.clean, ended.finished) == (True, False)
    nodes.submit("prefill", m.QuiesceByWire(TOKEN, D, clean=True))
    assert nodes.expect("decode", m.QuiescedByWire) == m.QuiescedByWire(TOKEN, True, P)
    assert nodes.heard("decode", 0.2) == [], "one message for all ranks, and no landing"


def test_a_push_that_one_rank_gives_up_is_given_up_by_all(nodes: Nodes, agent_id: AgentId) -> None:
    """As when the lease runs out on a rank that was held up."""
    nodes.submit("decode", m.Expect(TOKEN, P, agent_id, len(TARGET)))
    nodes.submit("prefill", m.BeginPush(TOKEN, D, agent_id, 30.0))
    nodes.submit_to_rank("prefill", 1, m.CancelPush(TOKEN))
    ended = nodes.expect("prefill", m.PushEnded)
    assert (ended.clean, ended.finished, ended.kv_bytes) == (True, False, 0)


def test_a_fence_is_over_when_every_rank_is_fenced_and_a_new_agent_takes_writes(nodes: Nodes, agent_id: AgentId) -> None:
    nodes.submit("decode", m.Expect(TOKEN, P, agent_id, len(TARGET)), m.Fence(P, agent_id))
    fenced, opened = nodes.expect("decode", m.Fenced), nodes.expect("decode", m.PairOpened)
    assert fenced == m.Fenced(P, agent_id) and len(opened.endpoints) == 2
    assert nodes.stats("decode").num_fences == 1
    nodes.submit("decode", m.Fence(P, agent_id))
    assert nodes.expect("decode", m.Fenced) == m.Fenced(P, agent_id), "which is gone already"
    write = m.PushBlocks(TOKEN, range(3), span(SOURCE, 4), TARGET)
    nodes.submit("prefill", m.BeginPush(TOKEN, D, agent_id, 30.0), write)
    assert nodes.expect("prefill", m.PairFailed).agent_id == agent_id
    ended = nodes.heard("prefill", 1.0)
    assert [type(event) for event in ended].count(m.PushEnded) == 1
    assert [type(event) for event in ended].count(m.PairFailed) == 0, "once, whichever ranks find out"
    assert nodes.num_wrong("decode") == 0, "nothing of it lands"
    again = nodes.pair()
    assert again == opened.agent_id
    nodes.push(GrantToken(b"another".ljust(16)), again, SOURCE, TARGET)
    assert nodes.num_wrong("decode") == 0


def test_a_new_incarnation_of_the_peer_fences_the_agent_and_opens_one_and_says_each_once(nodes: Nodes, agent_id: AgentId) -> None:
    nodes.submit("decode", m.OpenPair(P, Incarnation("two"), 3))
    assert nodes.expect("decode", m.Fenced) == m.Fenced(P, agent_id)
    opened = nodes.expect("decode", m.PairOpened)
    assert opened.peer_incarnation == "two" and opened.agent_id != agent_id
    nodes.submit("decode", m.OpenPair(P, Incarnation("two"), 3))
    assert nodes.expect("decode", m.PairOpened) == opened
    assert nodes.heard("decode", 0.2) == []


def test_a_pair_that_one_rank_loses_is_lost_and_comes_back_whole(nodes: Nodes, agent_id: AgentId) -> None:
    nodes.submit_to_rank("prefill", 2, m.ClosePair(D))
    nodes.submit("decode", m.Expect(TOKEN, P, agent_id, len(TARGET)))
    write = m.PushBlocks(TOKEN, range(3), span(SOURCE, 4), TARGET)
    nodes.submit("prefill", m.BeginPush(TOKEN, D, agent_id, 30.0), write, m.FinishPush(TOKEN, FirstToken(7)))
    ended = nodes.expect("prefill", m.PushEnded)
    assert not ended.finished
    assert nodes.heard("decode", 0.2) == [], "it has not landed"
    assert nodes.pair() == agent_id
    nodes.submit("decode", m.Forget(TOKEN))
    nodes.push(GrantToken(b"another".ljust(16)), agent_id, blocks(0, 7), blocks(1, 2))


def test_no_rank_is_written_outside_its_pool(nodes: Nodes, agent_id: AgentId) -> None:
    write = m.PushBlocks(TOKEN, range(3), span(SOURCE, 4), blocks(1, 2, 3, 4, 15))
    nodes.submit("prefill", m.BeginPush(TOKEN, D, agent_id, 30.0), write)
    ended = nodes.expect("prefill", m.PushEnded)
    assert (ended.clean, ended.finished, ended.kv_bytes) == (True, False, 0)
    assert nodes.num_wrong("decode") == 0
