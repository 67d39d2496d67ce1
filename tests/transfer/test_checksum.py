"""Checksums over a pool in this process, and both sides that use them over scripted agents."""

import zlib
from dataclasses import dataclass, field

import numpy as np
import pytest

from disaggd.ids import AgentId, BlockId, GrantToken, Incarnation, NodeName
from disaggd.transfer import messages as m
from disaggd.transfer import outgoing as outgoing_module
from disaggd.transfer.checksum import Corrupt, Memory, Verification
from disaggd.transfer.incoming import Incoming
from disaggd.transfer.landing import Inconsistent
from disaggd.transfer.layout import KVGroup, KVSpec, PoolPlace
from disaggd.transfer.notification import Checksums, FirstToken, Piece
from disaggd.transfer.outgoing import Outgoing
from disaggd.transfer.pool import Pool
from disaggd.transfer.share import Share
from disaggd.transfer.source import InPlace
from tests.support.endpoints import endpoint, span
from tests.support.scripted_agent import ScriptedAgent

TOKEN = GrantToken(bytes(16))
PEER = NodeName("peer")
NUM_LAYERS, NUM_BLOCKS, BLOCK_BYTES = 2, 4, 64
GRANTED = (BlockId(3), BlockId(1))
GRANT_BYTES = NUM_LAYERS * len(GRANTED) * BLOCK_BYTES


@dataclass
class Bench:
    """A pool full of noise."""

    rows: np.ndarray = field(
        default_factory=lambda: np.random.default_rng(1).integers(0, 256, (NUM_LAYERS * NUM_BLOCKS, BLOCK_BYTES), dtype=np.uint8)
    )

    def __post_init__(self) -> None:
        group = KVGroup(layers=NUM_LAYERS, kv_heads=1, head_bytes=BLOCK_BYTES)
        spec = KVSpec(dtype="float32", block_size=1, head_dim=1, groups=(group,))
        self.pool = Pool(PoolPlace(self.rows.ctypes.data, NUM_BLOCKS), spec)
        self.memory = Memory(self.pool.whole())

    def verification(self) -> Verification:
        return Verification(self.pool, {0: self.memory}, GRANTED)

    def crc(self, layers: range, block: BlockId) -> int:
        return zlib.crc32(b"".join(self.rows[layer * NUM_BLOCKS + block].tobytes() for layer in layers))

    def piece(self, seq: int, layers: range, blocks: tuple[BlockId, ...]) -> Piece:
        sums = Checksums(layers.start, len(layers), blocks, tuple(self.crc(layers, block) for block in blocks))
        return Piece(TOKEN, 0, seq, len(layers) * len(blocks) * BLOCK_BYTES, sums=sums)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_checksum_is_of_one_block_over_its_layers_in_their_order(bench: Bench) -> None:
    layers = range(NUM_LAYERS)
    found = bench.memory.checksums(bench.pool.indices(layers, GRANTED), len(GRANTED))
    assert found == tuple(bench.crc(layers, block) for block in GRANTED)
    assert len(set(found)) == 2


def test_what_landed_as_it_was_sent_is_right(bench: Bench) -> None:
    verification = bench.verification()
    for seq, layers in enumerate((range(1), range(1, 2))):
        verification.check(bench.piece(seq, layers, GRANTED))
    verification.check(Piece(TOKEN, 0, 2, 0, total=3))


@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize("offset", [0, BLOCK_BYTES - 1])
@pytest.mark.parametrize("layer", [0, 1])
def test_one_wrong_bit_is_found_and_its_block_named(bench: Bench, layer: int, offset: int, bit: int) -> None:
    piece = bench.piece(0, range(NUM_LAYERS), GRANTED)
    bench.rows[layer * NUM_BLOCKS + GRANTED[1], offset] ^= 1 << bit
    with pytest.raises(Corrupt, match=r"1 block\(s\) .* 1 the first") as caught:
        bench.verification().check(piece)
    assert caught.value.num_blocks == 1


def test_blocks_that_landed_in_each_others_places_are_found(bench: Bench) -> None:
    piece = bench.piece(0, range(1), GRANTED)
    bench.rows[[3, 1]] = bench.rows[[1, 3]]
    with pytest.raises(Corrupt) as caught:
        bench.verification().check(piece)
    assert caught.value.num_blocks == 2


ALL = range(NUM_LAYERS)
UNSOUND = {
    "of another's block": (ALL, (BlockId(3), BlockId(0)), None, GRANT_BYTES),
    "of a block beyond the pool": (ALL, (BlockId(3), BlockId(99)), (1, 2), GRANT_BYTES),
    "of one block twice": (ALL, (BlockId(3), BlockId(3)), None, GRANT_BYTES),
    "of layers that there are not": (range(1, 3), GRANTED, (1, 2), GRANT_BYTES),
    "of layers before the first": (range(-1, 1), GRANTED, (1, 2), GRANT_BYTES),
    "of more layers than one could go through": (range(2**62), (), (), GRANT_BYTES),
    "of fewer bytes than it brought": (range(1), GRANTED, None, GRANT_BYTES),
    "of one block too few": (ALL, GRANTED, (1,), GRANT_BYTES),
}


@pytest.mark.parametrize(("layers", "blocks", "crcs", "kv_bytes"), UNSOUND.values(), ids=UNSOUND)
def test_checksums_that_are_not_of_what_came_are_refused(
    bench: Bench, layers: range, blocks: tuple[BlockId, ...], crcs: tuple[int, ...] | None, kv_bytes: int
) -> None:
    right = crcs if crcs is not None else tuple(bench.crc(layers, block) for block in blocks)
    piece = Piece(TOKEN, 0, 0, kv_bytes, sums=Checksums(layers.start, len(layers), blocks, right))
    with pytest.raises(Inconsistent, match="are not of what it brought"):
        bench.verification().check(piece)


def test_a_piece_without_checksums_or_with_those_of_another_is_refused(bench: Bench) -> None:
    verification = bench.verification()
    with pytest.raises(Inconsistent, match="has no checksums"):
        verification.check(Piece(TOKEN, 0, 0, GRANT_BYTES))
    verification.check(bench.piece(0, range(1), GRANTED))
    with pytest.raises(Inconsistent, match=r"piece 1 .* not of what it brought"):
        verification.check(bench.piece(1, range(1), GRANTED))


# ── both sides ───────────────────────────────────────────────────────────────────────────────────────────────────────


def landed_at(bench: Bench, *pieces: Piece) -> m.TransferEvent:
    events: list[m.TransferEvent] = []
    agent = ScriptedAgent(AgentId("a0"))
    incoming = Incoming(Share(bench.pool.kv), bench.pool, lambda: agent, events.append, lambda: 0.0)  # type: ignore[arg-type, return-value]
    incoming.open(m.OpenPair(PEER, Incarnation("one"), 1))
    incoming.expect(m.Expect(TOKEN, PEER, AgentId("a0"), len(GRANTED), verify=GRANTED))
    agent.arrive(*pieces, Piece(TOKEN, 0, len(pieces), 0, total=len(pieces) + 1, first=FirstToken(7)))
    incoming.deliver(incoming.poll())
    return events[-1]


def test_a_grant_whose_blocks_are_right_lands_and_says_how_many(bench: Bench) -> None:
    pieces = [bench.piece(seq, range(seq, seq + 1), GRANTED) for seq in range(2)]
    assert landed_at(bench, *pieces) == m.Landed(TOKEN, FirstToken(7), GRANT_BYTES, num_verified=2)


def test_a_grant_with_a_wrong_block_fails_and_says_how_many(bench: Bench) -> None:
    pieces = [bench.piece(seq, range(seq, seq + 1), GRANTED) for seq in range(2)]
    bench.rows[NUM_BLOCKS + 3] ^= 1
    failed = landed_at(bench, *pieces)
    assert isinstance(failed, m.LandingFailed) and failed.num_corrupt == 1


def test_a_grant_that_contradicts_itself_is_no_checksum_failure(bench: Bench) -> None:
    failed = landed_at(bench, Piece(TOKEN, 0, 0, GRANT_BYTES))
    assert isinstance(failed, m.LandingFailed) and failed.num_corrupt == 0


def pushed_from(bench: Bench, verify: bool) -> tuple[Outgoing, ScriptedAgent]:
    agent = ScriptedAgent(AgentId("near"))
    outgoing = Outgoing(InPlace(Share(bench.pool.kv), bench.pool.place), lambda: agent, lambda event: None, lambda: 0.0)  # type: ignore[arg-type, return-value]
    outgoing.connect(m.ConnectPair(PEER, Incarnation("one"), endpoint(AgentId("far"), b"", bench.pool.place), bench.pool.kv))
    outgoing.begin(m.BeginPush(TOKEN, PEER, AgentId("far"), lease_s=5.0, verify=verify))
    return outgoing, agent


def test_each_write_says_what_the_blocks_were_when_it_was_posted(bench: Bench) -> None:
    outgoing, agent = pushed_from(bench, verify=True)
    source = (BlockId(0), BlockId(2))
    outgoing.push_blocks(m.PushBlocks(TOKEN, range(1, 2), span(source), GRANTED))
    sums = Checksums(1, 1, GRANTED, tuple(bench.crc(range(1, 2), block) for block in source))
    assert agent.sent[1:] == [Piece(TOKEN, 0, 0, 2 * BLOCK_BYTES, sums=sums)]


def test_nobody_pays_for_checksums_that_were_not_asked_for(bench: Bench) -> None:
    outgoing, agent = pushed_from(bench, verify=False)
    outgoing.push_blocks(m.PushBlocks(TOKEN, range(1, 2), span(GRANTED), GRANTED))
    assert agent.sent[1:] == [Piece(TOKEN, 0, 0, 2 * BLOCK_BYTES)]


def test_checksums_of_a_long_push_take_several_turns(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are polled in between."""
    monkeypatch.setattr(outgoing_module, "MAX_WORKED_BYTES", 3 * BLOCK_BYTES)
    outgoing, agent = pushed_from(bench, verify=True)
    for _ in range(5):
        outgoing.push_blocks(m.PushBlocks(TOKEN, range(1), span(GRANTED), GRANTED))
    posted = []
    while outgoing.is_waiting:
        posted.append(len(agent.sent) - 1)
        outgoing.poll()
    assert posted == [2, 4] and len(agent.sent) == 6
