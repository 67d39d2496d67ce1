"""Two and more processes, real NIXL, loopback: what only the real thing can show."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from disaggd.ids import AgentId, BlockId, GrantToken, Incarnation, NodeName
from disaggd.sampling import TokenLogprob
from disaggd.transfer import messages as m
from disaggd.transfer.notification import FirstToken

pytestmark = pytest.mark.process

P, D = NodeName("p0"), NodeName("d0")
TOKEN = GrantToken(b"0123456789abcdef")
FIRST = FirstToken(42, TokenLogprob(-0.5, ((42, -0.5), (7, -1.5))))


def blocks(*ids: int) -> tuple[BlockId, ...]:
    return tuple(BlockId(block) for block in ids)


def open_pair(decode: Any, incarnation: str = "one") -> m.PairOpened:
    decode.submit(m.OpenPair(P, Incarnation(incarnation)))
    return decode.expect(m.PairOpened)


def connect(prefill: Any, opened: m.PairOpened, decode: Any) -> None:
    prefill.submit(
        m.ConnectPair(D, Incarnation("one"), opened.agent_id, opened.metadata, opened.base_address, decode.num_blocks)
    )


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
    decode.submit(m.Expect(TOKEN, P, agent_id, kv_bytes))
    prefill.submit(
        m.BeginPush(TOKEN, D, agent_id, 5.0),
        m.PushBlocks(TOKEN, range(0, 2), source[:2], target[:2]),
        m.PushBlocks(TOKEN, range(2, 4), source[:2], target[:2]),
        m.PushBlocks(TOKEN, range(0, 4), source[2:], target[2:]),
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
    assert decode.call("checksums") == expected
    assert (prefill.stop(), decode.stop()) == (0, 0)


def test_killed_writer_never_lands_and_its_successor_does(start_node: Callable[..., Any]) -> None:
    decode, prefill = start_node(block_bytes=1 << 18), start_node(block_bytes=1 << 18)
    agent_id = pair(decode, prefill)
    every = blocks(*range(16))
    decode.submit(m.Expect(TOKEN, P, agent_id, 16 << 20))
    decode.signal(signal.SIGSTOP)  # it reads no more: the write stays in flight once the socket buffers are full
    prefill.submit(m.BeginPush(TOKEN, D, agent_id, 5.0), m.PushBlocks(TOKEN, range(4), every, every), m.FinishPush(TOKEN, FIRST))
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
    decode.submit(m.Expect(other, P, successor_agent, 16 << 20))
    successor.submit(
        m.BeginPush(other, D, successor_agent, 5.0), m.PushBlocks(other, range(4), every, every), m.FinishPush(other, FIRST)
    )
    assert decode.expect(m.Landed).token == other
    assert decode.call("checksums") == successor.call("checksums")


def test_writes_that_wake_up_after_the_fence_change_nothing(start_node: Callable[..., Any]) -> None:
    decode, prefill = start_node(block_bytes=1 << 18), start_node(block_bytes=1 << 18)
    agent_id = pair(decode, prefill)
    prefill.call("fill", 1)
    every = blocks(*range(16))
    decode.submit(m.Expect(TOKEN, P, agent_id, 16 << 20))
    decode.signal(signal.SIGSTOP)
    prefill.submit(m.BeginPush(TOKEN, D, agent_id, 5.0), m.PushBlocks(TOKEN, range(4), every, every))
    assert prefill.find(m.HandleDone, 0.2) is None
    prefill.signal(signal.SIGSTOP)
    decode.signal(signal.SIGCONT)
    decode.submit(m.Fence(P, agent_id))
    decode.expect(m.Fenced)
    decode.call("fill", 2)
    before = decode.call("checksums")
    prefill.signal(signal.SIGCONT)
    ended = prefill.expect(m.PushEnded)
    assert (ended.clean, ended.finished, ended.kv_bytes) == (False, False, 0)
    assert prefill.expect(m.PairFailed).agent_id == agent_id
    assert decode.call("checksums") == before
    assert decode.find(m.Landed, 0.1) is None
