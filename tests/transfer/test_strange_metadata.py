"""What a router says of a peer's agent may be anything: whatever NIXL makes of it, the pair fails and the node lives."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from disaggd.ids import AgentId, Incarnation, NodeName
from disaggd.transfer import messages as m
from disaggd.transfer.layout import PoolPlace
from tests.support.endpoints import endpoint

P0, D0 = NodeName("p0"), NodeName("d0")
ONE = Incarnation("one")

pytestmark = pytest.mark.process


def garbled(good: bytes, draw: random.Random) -> Iterator[bytes]:
    """Nothing of it, cut short anywhere, and other bytes altogether.

    Not with single bytes changed inside the worker's address: UCX crashes over some of those, and whoever may send them, a router that
    knows the cluster's secret, may write the node's memory anyway.
    """
    yield b""
    yield from (good[:length] for length in range(1, len(good), len(good) // 8))
    yield from (draw.randbytes(length) for length in (1, 20, 200))


def test_an_agent_that_is_described_wrongly_is_out_of_reach(make_node: Callable[..., Any]) -> None:
    target, writer = make_node(), make_node()
    target.submit(m.OpenPair(P0, ONE, 1))
    opened = target.expect(m.PairOpened)
    (end,) = opened.endpoints
    size = target.num_blocks

    def outcome(agent_id: str, metadata: bytes, place: PoolPlace) -> m.PairConnected | m.PairFailed:
        writer.submit(m.ConnectPair(D0, ONE, endpoint(AgentId(agent_id), metadata, place), target.kv))
        event = writer.expect(m.TransferEvent)
        assert isinstance(event, m.PairConnected | m.PairFailed), event
        return event

    for place in (PoolPlace(end.place.address + 4096, size), PoolPlace(end.place.address, 10 * size), PoolPlace(0, size)):
        failed = outcome(opened.agent_id, end.metadata, place)
        assert isinstance(failed, m.PairFailed) and failed.agent_id == opened.agent_id, "beyond the memory that the peer has registered"
    assert isinstance(outcome("another", end.metadata, end.place), m.PairFailed)
    for number, metadata in enumerate(garbled(end.metadata, random.Random(1))):
        outcome(f"agent-{number}", metadata, end.place)
    assert isinstance(outcome(opened.agent_id, end.metadata, end.place), m.PairConnected)
    assert target.expect(m.PairProbed).agent_id == opened.agent_id
