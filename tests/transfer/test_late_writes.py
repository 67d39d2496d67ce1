"""Writes that come late: whoever owns the blocks by then loses not a byte. Real NIXL; what is stopped is a real process.

Each test fails without the rule that it is about: fence, quarantine, quiesce, probe by the agent's own id, burnt ports, the writer's lease.
"""

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from disaggd.errors import ResourceError
from disaggd.ids import BlockId, GrantToken, Incarnation, NodeName
from disaggd.transfer import messages as m
from tests.support.endpoints import span
from tests.support.live_pair import LEASE_S, LivePair
from tests.support.role_nodes import QUIESCE_S

pytestmark = pytest.mark.process

P, D = NodeName("p0"), NodeName("d0")
TOKEN = GrantToken(b"0123456789abcdef")
EVERY = tuple(BlockId(block) for block in range(16))
WRITERS, OWNER, NEXT = 1, 2, 3
"""What pools are filled with: by whom the KV is."""


@pytest.fixture
def live(make_node: Callable[..., Any]) -> LivePair:
    return LivePair(make_node)


WRITE = m.PushBlocks(TOKEN, range(4), span(EVERY), EVERY)


def num_fences(live: LivePair) -> int:
    return int(live.decode.process.call("stats").num_fences)


def push_ended(live: LivePair) -> bool:
    return any(isinstance(event, m.PushEnded) for event in live.prefill.events)


def test_a_prefill_node_that_was_stopped_mid_push_writes_nothing_into_blocks_with_a_new_owner(live: LivePair) -> None:
    """Quarantine and fence."""
    seq = live.push_that_nobody_reads()
    live.prefill.stop()
    live.decode.go_on()
    live.after(LEASE_S)
    live.dispatcher.end(seq, "abort")  # else it would ask for blocks once more
    live.next_owner_asks()
    live.wait_until(lambda: live.next_owner_has_begun(OWNER), each_s=QUIESCE_S / 4)
    live.prefill.go_on()
    live.wait_until(lambda: push_ended(live))
    assert live.decode.process.call("num_strange", OWNER) == 0
    assert num_fences(live) == 1


def test_a_decode_node_that_was_stopped_gets_nothing_of_what_the_source_blocks_are_used_for_next(live: LivePair) -> None:
    """The writer's own fence: a handle cannot be taken back, an agent can."""
    seq = live.push_that_nobody_reads()
    live.dispatcher.end(seq, "abort")
    live.pump()
    pool = live.prefill.role.pool
    assert pool.num_available < pool.num_blocks, "handles read them"
    live.after(QUIESCE_S)
    live.wait_until(lambda: pool.num_available == pool.num_blocks)
    live.prefill.fill(NEXT)
    live.decode.process.signal(signal.SIGCONT)  # it takes what is in its sockets; its role has yet to hear of anything
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        assert live.decode.process.call("num_strange", WRITERS, OWNER) == 0
    live.decode.is_stopped = False
    live.wait_until(lambda: live.decode.role.pool.num_available == live.decode.role.pool.num_blocks)
    assert live.decode.process.call("num_strange", WRITERS, OWNER) == 0


def test_when_the_router_dies_mid_push_the_blocks_come_free_without_a_fence_once_nothing_is_under_way(live: LivePair) -> None:
    """Quarantine, and the quiesce over the wire."""
    live.push_that_nobody_reads()
    live.prefill.stop()
    live.lose_router()
    live.decode.go_on()
    live.next_owner_asks()
    live.pump(0.1)
    live.next_owner_has_begun(OWNER)  # it must not have
    live.prefill.go_on()
    live.wait_until(lambda: live.next_owner_has_begun(OWNER) and push_ended(live))
    assert live.decode.process.call("num_strange", OWNER) == 0
    live.after(QUIESCE_S)
    assert num_fences(live) == 0


# ── one rule each, without roles ─────────────────────────────────────────────────────────────────────────────────────


def pair(decode: Any, prefill: Any) -> m.PairOpened:
    decode.submit(m.OpenPair(P, Incarnation("one"), 1))
    opened = decode.expect(m.PairOpened)
    prefill.submit(connect_to(opened, prefill))
    assert decode.expect(m.PairProbed).agent_id == opened.agent_id
    prefill.expect(m.PairConnected)
    return opened


def connect_to(opened: m.PairOpened, prefill: Any) -> m.ConnectPair:
    return m.ConnectPair(D, Incarnation("one"), opened.endpoints, prefill.kv)


def test_a_writer_that_was_stopped_for_longer_than_its_lease_posts_nothing_when_it_goes_on(make_node: Callable[..., Any]) -> None:
    """It looks at its own clock. The target fences nobody here, though it should."""
    decode, prefill = make_node(), make_node()
    opened = pair(decode, prefill)
    prefill.call("fill", WRITERS)
    decode.call("fill", OWNER)
    prefill.submit(m.BeginPush(TOKEN, D, opened.agent_id, 1.0), m.OpenPair(D, Incarnation("one"), 1))
    prefill.expect(m.PairOpened)  # so the lease runs: commands are obeyed in their order
    prefill.signal(signal.SIGSTOP)
    prefill.ask("submit", m.RenewLease(TOKEN), WRITE, m.FinishPush(TOKEN, None))
    time.sleep(1.1)  # a lease is a time
    prefill.signal(signal.SIGCONT)
    prefill.answer("submit")
    ended = prefill.expect(m.PushEnded)
    assert decode.call("num_strange", OWNER) == 0
    assert (ended.clean, ended.finished, ended.first_post_at) == (True, False, None)


def test_a_late_announcement_of_an_old_agent_opens_nothing_though_a_new_one_has_its_port(
    make_node: Callable[..., Any], port_range: tuple[int, int]
) -> None:
    """The probe by the agent's own id: the address is the new agent's, which would take the writes."""
    decode, prefill = make_node(ports=(port_range[0], port_range[0] + 1)), make_node(ports=(port_range[0] + 2, port_range[1]))
    prefill.call("fill", WRITERS)
    decode.call("fill", OWNER)
    decode.submit(m.OpenPair(P, Incarnation("one"), 1))
    late = decode.expect(m.PairOpened)
    decode.submit(m.Fence(P, late.agent_id))
    second = pair(decode, prefill)
    decode.submit(m.Fence(P, second.agent_id))
    while decode.expect(m.PairOpened).agent_id in (late.agent_id, second.agent_id):
        pass  # the third has the first one's port: there are but two, and the second one's is burnt
    prefill.submit(connect_to(late, prefill))
    while prefill.expect(m.PairConnected).agent_id != late.agent_id:
        pass
    probed = decode.find(m.PairProbed, 0.5)
    if probed is not None:  # a router would let it write
        prefill.submit(m.BeginPush(TOKEN, D, late.agent_id, 5.0), WRITE, m.FinishPush(TOKEN, None))
        prefill.expect(m.PushEnded)
    assert decode.call("num_strange", OWNER) == 0
    assert probed is None
    assert decode.call("stats").num_dropped_notifications == 1


def test_nobody_gets_the_port_of_a_fenced_agent_before_its_peer_has_reached_the_new_one(
    make_node: Callable[..., Any], port_range: tuple[int, int]
) -> None:
    """Burnt ports: two ports, so that the next agent on this host would have to take it."""
    ports = (port_range[0], port_range[0] + 1)
    decode, prefill, other = make_node(ports=ports), make_node(ports=(ports[1] + 1, port_range[1])), make_node(ports=ports)
    decode.submit(m.OpenPair(P, Incarnation("one"), 1))
    late = decode.expect(m.PairOpened)
    decode.submit(m.Fence(P, late.agent_id))
    decode.expect(m.PairOpened)
    other.submit(m.OpenPair(P, Incarnation("one"), 1))
    assert other.find(m.PairOpened, 1.0) is None
    assert isinstance(other.expect(m.TransferFailed).error, ResourceError)
    prefill.submit(connect_to(late, prefill))
    assert prefill.expect(m.PairFailed).agent_id == late.agent_id, "late metadata leads nowhere"
