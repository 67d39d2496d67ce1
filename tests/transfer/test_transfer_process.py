"""Two and more processes, real NIXL, loopback: what only the real thing can show."""

import signal
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch

from disaggd.errors import ResourceError
from disaggd.ids import AgentId, BlockId, GrantToken, Incarnation, NodeName
from disaggd.sampling import TokenLogprob
from disaggd.transfer import messages as m
from disaggd.transfer.notification import FirstToken
from disaggd.transfer.ports import is_free
from tests.support.endpoints import endpoint, span

pytestmark = pytest.mark.process

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

by_day_in_one_memory = pytest.mark.parametrize(
    "start_node",
    ["cpu", pytest.param("staged", marks=pytest.mark.nightly), pytest.param("cuda:0", marks=[needs_gpu, pytest.mark.nightly])],
    indirect=True,
)
"""What agents, ports and deaths come to is the same in all."""

P, D = NodeName("p0"), NodeName("d0")
TOKEN = GrantToken(b"0123456789abcdef")
FIRST = FirstToken(42, TokenLogprob(-0.5, ((42, -0.5), (7, -1.5))))


def blocks(*ids: int) -> tuple[BlockId, ...]:
    return tuple(BlockId(block) for block in ids)


def open_pair(decode: Any, incarnation: str = "one") -> m.PairOpened:
    decode.submit(m.OpenPair(P, Incarnation(incarnation), 1))
    return decode.expect(m.PairOpened)


def connect(prefill: Any, opened: m.PairOpened, decode: Any) -> None:
    prefill.submit(m.ConnectPair(D, Incarnation("one"), opened.endpoints, prefill.kv))


def pair(decode: Any, prefill: Any, incarnation: str = "one") -> AgentId:
    """Open, connect and probe: the agent to push to."""
    opened = open_pair(decode, incarnation)
    connect(prefill, opened, decode)
    prefill.expect(m.PairConnected)
    assert decode.expect(m.PairProbed) == m.PairProbed(P, opened.agent_id)
    return opened.agent_id


def test_push_of_several_handles_lands_and_touches_nothing_else(start_node: Callable[..., Any]) -> None:
    decode, prefill = start_node(num_blocks=20), start_node(num_blocks=16)
    agent_id = pair(decode, prefill)
    prefill.call("fill", 1)
    decode.call("fill", 2)
    before, sent = decode.call("checksums"), prefill.call("checksums")
    source, target = blocks(1, 2, 3, 15), blocks(9, 10, 4, 19)
    kv_bytes = 4 * 4 * 4096
    decode.submit(m.Expect(TOKEN, P, agent_id, 4))
    prefill.submit(
        m.BeginPush(TOKEN, D, agent_id, 5.0),
        m.PushBlocks(TOKEN, range(0, 2), span(source[:2]), target[:2]),
        m.PushBlocks(TOKEN, range(2, 4), span(source[:2]), target[:2]),
        m.PushBlocks(TOKEN, range(0, 4), span(source[2:]), target[2:]),
        m.FinishPush(TOKEN, FIRST),
    )
    assert decode.expect(m.Landed) == m.Landed(TOKEN, FIRST, kv_bytes)
    handles = [prefill.expect(m.HandleDone) for _ in range(3)]
    assert sum(handle.kv_bytes for handle in handles) == kv_bytes
    ended = prefill.expect(m.PushEnded)
    assert (ended.clean, ended.finished, ended.kv_bytes) == (True, True, kv_bytes)
    assert ended.first_post_at <= ended.last_done_at
    expected = list(before)
    for layer in range(4):
        for here, there in zip(source, target, strict=True):
            expected[layer * 20 + there] = sent[layer * 16 + here]
    decode.call("bring_in", target)
    assert decode.call("checksums") == expected
    assert (prefill.stop(), decode.stop()) == (0, 0)


@pytest.mark.parametrize(
    ("near", "far"),
    [
        ("staged", "cpu"),
        ("cpu", "staged"),
        pytest.param("cuda:0", "cpu", marks=needs_gpu),
        pytest.param("cpu", "cuda:0", marks=needs_gpu),
    ],
)
def test_push_lands_in_memory_of_another_kind(make_node: Callable[..., Any], near: str, far: str) -> None:
    decode, prefill = make_node(device=far, block_bytes=1 << 18), make_node(device=near, block_bytes=1 << 18)
    agent_id = pair(decode, prefill)
    prefill.call("fill", 1)
    every = blocks(*range(16))
    decode.submit(m.Expect(TOKEN, P, agent_id, 16))
    prefill.submit(m.BeginPush(TOKEN, D, agent_id, 5.0), m.PushBlocks(TOKEN, range(4), span(every), every), m.FinishPush(TOKEN, FIRST))
    assert decode.expect(m.Landed).token == TOKEN
    decode.call("bring_in", every)
    assert decode.call("checksums") == prefill.call("checksums")


def test_killed_writer_never_lands_and_its_successor_does(start_node: Callable[..., Any]) -> None:
    decode, prefill = start_node(block_bytes=1 << 18), start_node(block_bytes=1 << 18)
    agent_id = pair(decode, prefill)
    every = blocks(*range(16))
    decode.submit(m.Expect(TOKEN, P, agent_id, 16))
    decode.signal(signal.SIGSTOP)  # it reads no more: the write stays in flight once the socket buffers are full
    prefill.submit(m.BeginPush(TOKEN, D, agent_id, 5.0), m.PushBlocks(TOKEN, range(4), span(every), every), m.FinishPush(TOKEN, FIRST))
    assert prefill.find(m.HandleDone, 0.2) is None
    prefill.kill()
    decode.signal(signal.SIGCONT)
    decode.submit(m.Fence(P, agent_id))
    assert decode.expect(m.Fenced) == m.Fenced(P, agent_id)
    renewed = decode.expect(m.PairOpened)
    assert renewed.agent_id != agent_id
    assert decode.find(m.Landed, 0.1) is None

    successor = start_node(block_bytes=1 << 18)
    assert decode.find(m.LandingFailed, 0) is None
    successor_agent = pair(decode, successor, "two")
    assert decode.expect(m.Fenced) == m.Fenced(P, renewed.agent_id)
    successor.call("fill", 3)
    other = GrantToken(b"another token...")
    decode.submit(m.Expect(other, P, successor_agent, 16))
    write = m.PushBlocks(other, range(4), span(every), every)
    successor.submit(m.BeginPush(other, D, successor_agent, 5.0), write, m.FinishPush(other, FIRST))
    assert decode.expect(m.Landed).token == other
    decode.call("bring_in", every)
    assert decode.call("checksums") == successor.call("checksums")


def test_writes_that_wake_up_after_the_fence_change_nothing(start_node: Callable[..., Any]) -> None:
    decode, prefill = start_node(block_bytes=1 << 18), start_node(block_bytes=1 << 18)
    agent_id = pair(decode, prefill)
    prefill.call("fill", 1)
    every = blocks(*range(16))
    decode.submit(m.Expect(TOKEN, P, agent_id, 16))
    decode.signal(signal.SIGSTOP)
    prefill.submit(m.BeginPush(TOKEN, D, agent_id, 5.0), m.PushBlocks(TOKEN, range(4), span(every), every))
    assert prefill.find(m.HandleDone, 0.2) is None
    prefill.signal(signal.SIGSTOP)
    decode.signal(signal.SIGCONT)
    decode.submit(m.Fence(P, agent_id))
    decode.expect(m.Fenced)
    decode.call("fill", 2)
    decode.call("bring_in", every)
    before = decode.call("checksums")
    prefill.signal(signal.SIGCONT)
    ended = prefill.expect(m.PushEnded)
    assert (ended.clean, ended.finished, ended.kv_bytes) == (False, False, 0)
    assert prefill.expect(m.PairFailed).agent_id == agent_id
    decode.call("bring_in", every)
    assert decode.call("checksums") == before
    assert decode.find(m.Landed, 0.1) is None


def test_killed_reader_fails_the_pair_and_its_pushes_and_not_the_process(start_node: Callable[..., Any]) -> None:
    decode, prefill = start_node(block_bytes=1 << 18), start_node(block_bytes=1 << 18)
    agent_id = pair(decode, prefill)
    every = blocks(*range(16))
    decode.signal(signal.SIGSTOP)
    prefill.submit(m.BeginPush(TOKEN, D, agent_id, 5.0), m.PushBlocks(TOKEN, range(4), span(every), every))
    assert prefill.find(m.HandleDone, 0.2) is None
    decode.kill()
    assert prefill.expect(m.HandleDone) == m.HandleDone(TOKEN, every, 0)
    assert not prefill.expect(m.PushEnded).clean
    assert prefill.expect(m.PairFailed).agent_id == agent_id
    prefill.submit(m.BeginPush(TOKEN, D, agent_id, 5.0))
    assert prefill.expect(m.PushEnded).clean, "nothing was posted, so nothing can be under way"
    assert prefill.stop() == 0


@by_day_in_one_memory
def test_peer_that_died_while_idle_is_noticed_at_the_next_push(start_node: Callable[..., Any]) -> None:
    decode, prefill = start_node(), start_node()
    agent_id = pair(decode, prefill)
    decode.kill()
    prefill.submit(m.BeginPush(TOKEN, D, agent_id, 5.0), m.PushBlocks(TOKEN, range(4), span(blocks(1)), blocks(1)))
    assert prefill.expect(m.HandleDone).kv_bytes == 0
    assert not prefill.expect(m.PushEnded).clean
    prefill.expect(m.PairFailed)


def test_stop_ends_with_writes_in_flight(start_node: Callable[..., Any]) -> None:
    decode, prefill = start_node(block_bytes=1 << 18), start_node(block_bytes=1 << 18)
    agent_id = pair(decode, prefill)
    every = blocks(*range(16))
    decode.signal(signal.SIGSTOP)
    prefill.submit(m.BeginPush(TOKEN, D, agent_id, 5.0), m.PushBlocks(TOKEN, range(4), span(every), every))
    assert prefill.find(m.HandleDone, 0.2) is None
    assert prefill.stop() == 0
    decode.signal(signal.SIGCONT)
    assert decode.stop() == 0


@by_day_in_one_memory
def test_metadata_of_a_fenced_agent_leads_nowhere(start_node: Callable[..., Any]) -> None:
    decode, prefill = start_node(), start_node()
    old = open_pair(decode)
    decode.submit(m.Fence(P, old.agent_id))
    new = decode.expect(m.PairOpened)
    connect(prefill, old, decode)
    assert prefill.expect(m.PairFailed).agent_id == old.agent_id
    (end,) = new.endpoints
    connect(prefill, m.PairOpened(P, old.peer_incarnation, endpoint(old.agent_id, end.metadata, end.place)), decode)
    assert "announced with the metadata of" in prefill.expect(m.PairFailed).reason
    assert decode.find(m.PairProbed, 0.2) is None
    connect(prefill, new, decode)
    assert decode.expect(m.PairProbed).agent_id == new.agent_id


@by_day_in_one_memory
def test_garbage_for_metadata_fails_the_pair(start_node: Callable[..., Any]) -> None:
    decode, prefill = start_node(), start_node()
    opened = open_pair(decode)
    (end,) = opened.endpoints
    for metadata in (b"", b"garbage", end.metadata[:100]):
        connect(prefill, m.PairOpened(P, opened.peer_incarnation, endpoint(opened.agent_id, metadata, end.place)), decode)
        prefill.expect(m.PairFailed)
    assert prefill.stop() == 0


@by_day_in_one_memory
def test_fenced_port_stays_bound_until_the_new_agent_is_reached(start_node: Callable[..., Any], port_range: tuple[int, int]) -> None:
    def taken() -> set[int]:
        return {port for port in range(port_range[0], port_range[1] + 1) if not is_free(port)}

    decode = start_node()
    opened = open_pair(decode)
    burnt = taken()
    assert len(burnt) == 1
    decode.submit(m.Fence(P, opened.agent_id))
    decode.expect(m.Fenced)
    decode.expect(m.PairOpened)
    assert burnt < taken() and len(taken()) == 2
    pair(decode, start_node())
    assert taken().isdisjoint(burnt)


@by_day_in_one_memory
def test_a_range_without_a_free_port_ends_the_thread_and_says_so(start_node: Callable[..., Any], port_range: tuple[int, int]) -> None:
    with socket.create_server(("127.0.0.1", port_range[0])):
        decode = start_node(ports=(port_range[0], port_range[0]))
        decode.submit(m.OpenPair(P, Incarnation("one"), 1))
        error = decode.expect(m.TransferFailed).error
    assert isinstance(error, ResourceError) and "no free port" in str(error)
    assert decode.stop() == 0


@by_day_in_one_memory
def test_a_range_that_is_used_up_costs_the_next_pair_and_not_the_node(start_node: Callable[..., Any], port_range: tuple[int, int]) -> None:
    """Routers name the peers: whoever names many must not end the node."""
    node = start_node(ports=(port_range[0], port_range[0]))
    opened = open_pair(node)
    node.submit(m.OpenPair(NodeName("p1"), Incarnation("one"), 1))
    node.submit(m.ConnectPair(NodeName("d1"), Incarnation("one"), opened.endpoints, node.kv))
    assert "no free port" in node.expect(m.PairFailed).reason
    assert open_pair(node) == opened
    assert node.stop() == 0


@by_day_in_one_memory
def test_processes_that_race_for_ports_share_the_range(start_node: Callable[..., Any], port_range: tuple[int, int]) -> None:
    nodes = [start_node(ports=(port_range[0], port_range[0] + 5)) for _ in range(2)]
    for peer in ("p0", "p1", "p2"):
        for node in nodes:
            node.submit(m.OpenPair(NodeName(peer), Incarnation("one"), 1))
    for node in nodes:
        assert {node.expect(m.PairOpened).peer for _ in range(3)} == {"p0", "p1", "p2"}


@by_day_in_one_memory
def test_quiesced_reaches_the_peer_without_a_router(start_node: Callable[..., Any]) -> None:
    decode, prefill = start_node(), start_node()
    pair(decode, prefill)
    prefill.submit(m.QuiesceByWire(TOKEN, D, clean=True))
    assert decode.expect(m.QuiescedByWire) == m.QuiescedByWire(TOKEN, True, P)
