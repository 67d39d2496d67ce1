"""Pushes to a peer with other blocks: what is made for it, in which turn, and which of its blocks it is written into."""

import pytest

from disaggd.ids import AgentId, BlockId, GrantToken, HandleId, Incarnation, NodeName
from disaggd.transfer import messages as m
from disaggd.transfer import outgoing as outgoing_module
from disaggd.transfer.layout import KVGroup, KVSpec, PoolPlace, Span
from disaggd.transfer.messages import IsReady, at_once
from disaggd.transfer.notification import FirstToken, Piece
from disaggd.transfer.outgoing import Outgoing
from disaggd.transfer.path import Paths, Repacking
from disaggd.transfer.pool import Region
from disaggd.transfer.share import Share
from disaggd.transfer.source import InPlace
from tests.support.endpoints import endpoint
from tests.support.scripted_agent import ScriptedAgent

LAYERS = 6
TOKEN, PEER, FAR = GrantToken(bytes(16)), NodeName("d0"), AgentId("far")
SPAN = Span((BlockId(3), BlockId(1)), 0, 7)
TARGET = (BlockId(5), BlockId(4), BlockId(0), BlockId(9))
MADE_BYTES = len(TARGET) * 16
"""By each write: a block of two tokens, of one head of one coordinate, has 16."""


def spec(block_size: int) -> KVSpec:
    group = KVGroup(layers=LAYERS, kv_heads=1, head_bytes=8 * block_size)
    return KVSpec(dtype="float32", block_size=block_size, head_dim=1, groups=(group,))


class Notes:
    """A repacker that notes which layers it was asked for."""

    def __init__(self, num_bytes: int) -> None:
        self.region = Region(1 << 20, num_bytes)
        self.layers: list[range] = []

    def repack(self, offset: int, target: KVSpec, layers: range, heads: range, span: Span) -> IsReady:
        assert (target, heads, span) == (spec(2), range(1), SPAN)
        self.layers.append(layers)
        return at_once


class Bench:
    """A pool of blocks of four tokens, and a peer whose blocks have two."""

    def __init__(self, num_bytes: int = 4096) -> None:
        self.repacker = Notes(num_bytes)
        self.agent = ScriptedAgent(AgentId("near"))
        self.events: list[m.TransferEvent] = []
        repacking = Repacking(repacker=self.repacker, direct_slice_bytes=1, max_layers=1, max_tokens=8)
        paths = Paths(InPlace(Share(spec(4)), PoolPlace(4096, 8)), repacking)
        self.outgoing = Outgoing(paths, lambda: self.agent, self.events.append, lambda: 0.0)  # type: ignore[arg-type, return-value]
        self.outgoing.connect(m.ConnectPair(PEER, Incarnation("one"), endpoint(FAR, b"", PoolPlace(0, 99)), spec(2)))

    def push(self, num_layers: int) -> None:
        self.outgoing.begin(m.BeginPush(TOKEN, PEER, FAR, lease_s=5.0))
        for layer in range(num_layers):
            self.outgoing.push_blocks(m.PushBlocks(TOKEN, range(layer, layer + 1), SPAN, TARGET))
        self.outgoing.finish(m.FinishPush(TOKEN, FirstToken(7)))

    @property
    def pieces(self) -> list[Piece]:
        return [message for message in self.agent.sent if isinstance(message, Piece)]


def test_a_piece_weighs_what_the_targets_blocks_do() -> None:
    bench = Bench()
    bench.push(1)
    assert bench.repacker.layers == [range(0, 1)]
    assert bench.pieces == [Piece(TOKEN, 0, 0, MADE_BYTES), Piece(TOKEN, 0, 1, 0, total=2, first=FirstToken(7))]


def test_a_long_push_is_made_in_several_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is posted moves in between."""
    monkeypatch.setattr(outgoing_module, "MAX_WORKED_BYTES", 2 * MADE_BYTES)
    bench = Bench()
    bench.push(5)
    assert len(bench.repacker.layers) == len(bench.pieces) == 2
    bench.outgoing.poll()
    assert len(bench.repacker.layers) == 4
    bench.outgoing.poll()
    assert [layers.start for layers in bench.repacker.layers] == [0, 1, 2, 3, 4]
    assert bench.pieces[-1].total == 6


def test_without_room_the_rest_is_made_when_writes_have_ended() -> None:
    bench = Bench(2 * MADE_BYTES)
    bench.push(3)
    assert len(bench.repacker.layers) == 2 and len(bench.pieces) == 2
    bench.outgoing.poll()
    bench.agent.done = {HandleId(number) for number in range(len(bench.agent.sent))}
    bench.outgoing.poll()
    assert len(bench.repacker.layers) == 3


def test_a_staging_memory_that_holds_no_write_fails_the_pair_and_says_why() -> None:
    bench = Bench(MADE_BYTES - 1)
    (failed,) = bench.events
    assert isinstance(failed, m.PairFailed) and failed.for_good and "transfer.staging: 63 bytes" in failed.reason
