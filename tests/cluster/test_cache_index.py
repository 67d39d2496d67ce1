"""The router's picture of the nodes' caches equals what they hold, or holds nothing."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from disaggd.cluster.cache_index import CacheIndex
from disaggd.cluster.protocol import CacheEvents
from disaggd.ids import BlockHash, NodeName

A, B, C = NodeName("a"), NodeName("b"), NodeName("c")


def block(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "big"))


def events(number: int, stored: Iterable[int] = (), evicted: Iterable[int] = (), *, snapshot: bool = False) -> CacheEvents:
    return CacheEvents(number, snapshot, b"".join(map(block, stored)), b"".join(map(block, evicted)))


def cached(index: CacheIndex, *numbers: int) -> dict[NodeName, int]:
    return index.cached_blocks([block(number) for number in numbers])


def make_index(*names: NodeName) -> CacheIndex:
    index = CacheIndex()
    for name in names:
        index.node_up(name)
        assert not index.on_events(name, events(0, snapshot=True))
    return index


# ── what counts ──


def test_a_cache_counts_up_to_its_first_miss() -> None:
    index = make_index(A, B, C)
    index.on_events(A, events(1, [1, 2, 4]))
    index.on_events(B, events(1, [1, 2, 3, 4]))
    assert cached(index, 1, 2, 3, 4, 5) == {A: 2, B: 4, C: 0}
    assert cached(index, 1) == {A: 1, B: 1, C: 0}
    assert cached(index) == {A: 0, B: 0, C: 0}
    assert cached(index, 9, 1) == {A: 0, B: 0, C: 0}


def test_what_is_evicted_counts_no_more() -> None:
    index = make_index(A, B)
    index.on_events(A, events(1, [1, 2]))
    index.on_events(B, events(1, [1]))
    index.on_events(A, events(2, evicted=[1]))
    assert cached(index, 1, 2) == {A: 0, B: 1}
    assert (index.num_held(A), index.num_held(B), len(index)) == (1, 1, 2)


def test_a_block_that_is_evicted_and_stored_again_is_there() -> None:
    index = make_index(A)
    index.on_events(A, events(1, [1]))
    index.on_events(A, events(2, stored=[1], evicted=[1]))
    assert cached(index, 1) == {A: 1}


def test_a_block_told_twice_is_counted_once() -> None:
    index = make_index(A)
    index.on_events(A, events(1, [1, 1]))
    index.on_events(A, events(2, [1], evicted=[7]))
    assert index.num_held(A) == 1


def test_nothing_remains_of_what_nobody_holds() -> None:
    index = make_index(A, B)
    index.on_events(A, events(1, range(100)))
    index.on_events(B, events(1, range(50, 150)))
    index.on_events(A, events(2, evicted=range(100)))
    index.node_down(B)
    assert len(index) == 0


# ── gaps, snapshots, restarts ──


def test_a_missing_number_asks_for_a_snapshot_once_and_forgets_the_node() -> None:
    index = make_index(A, B)
    index.on_events(A, events(1, [1]))
    index.on_events(B, events(1, [1]))
    assert index.on_events(A, events(3, [2]))
    assert not index.on_events(A, events(4, [3])), "the snapshot is on its way"
    assert cached(index, 1) == {A: 0, B: 1}
    assert not index.on_events(A, events(5, [1, 2, 3, 4], snapshot=True))
    assert not index.on_events(A, events(6, [5], evicted=[4]))
    assert cached(index, 1, 2, 3, 4) == {A: 3, B: 1}


def test_a_number_that_comes_twice_is_out_of_turn_too() -> None:
    index = make_index(A)
    index.on_events(A, events(1, [1]))
    assert index.on_events(A, events(1, [2]))
    assert cached(index, 1) == {A: 0}


def test_a_second_gap_is_asked_for_again() -> None:
    index = make_index(A)
    assert index.on_events(A, events(2))
    index.on_events(A, events(3, [1], snapshot=True))
    assert index.on_events(A, events(5))


def test_a_node_that_goes_holds_nothing_and_begins_anew() -> None:
    index = make_index(A, B)
    index.on_events(A, events(1, [1]))
    index.node_down(A)
    assert cached(index, 1) == {B: 0}
    assert not index.on_events(A, events(2, [2])), "a frame that was under way when the link was lost"
    index.node_up(A)
    assert cached(index, 1) == {A: 0, B: 0}
    assert index.on_events(A, events(7, [1])), "of another link's count"
    assert not index.on_events(A, events(8, [1], snapshot=True))
    assert cached(index, 1) == {A: 1, B: 0}


def test_a_link_that_comes_up_twice_is_a_new_one() -> None:
    index = make_index(A)
    index.on_events(A, events(1, [1]))
    index.node_up(A)
    assert (cached(index, 1), len(index)) == ({A: 0}, 0)


def test_a_place_that_came_free_is_used_again() -> None:
    """Else every restart would make the masks longer."""
    index = make_index(A, B)
    for _ in range(200):
        index.node_down(A)
        index.node_up(A)
    index.on_events(A, events(0, [1], snapshot=True))
    index.on_events(B, events(1, [1]))
    assert max(index._masks.values()) == 0b11


def test_hashes_may_be_shorter_in_tests() -> None:
    index = CacheIndex(hash_bytes=1)
    index.node_up(A)
    index.on_events(A, CacheEvents(0, True, b"\x01\x02", b""))
    assert index.cached_blocks([BlockHash(b"\x01"), BlockHash(b"\x02"), BlockHash(b"\x03")]) == {A: 2}


# ── any order of events ──

nodes = st.sampled_from([A, B, C])
blocks = st.integers(0, 12)


@dataclass
class Link:
    """A node's link, and what the index must make of its frames."""

    number: int = 0
    """Of the next frame."""
    expected: int | None = 0
    """None: a snapshot is asked for."""
    known: set[int] = field(default_factory=set)


class AnyOrder(RuleBasedStateMachine):
    """Pools that store and evict, links that lose frames and come back: the index is the union of what is known of them."""

    def __init__(self) -> None:
        super().__init__()
        self.index = CacheIndex()
        self.pools: dict[NodeName, set[int]] = {name: set() for name in (A, B, C)}
        self.links: dict[NodeName, Link] = {}

    @rule(name=nodes)
    def link_up(self, name: NodeName) -> None:
        """It may have been up already."""
        self.index.node_up(name)
        self.links[name] = Link()
        self.send(name, events(0, self.pools[name], snapshot=True))

    @rule(name=nodes)
    def link_down(self, name: NodeName) -> None:
        self.index.node_down(name)
        self.links.pop(name, None)

    @rule(name=nodes)
    def process_restarts(self, name: NodeName) -> None:
        self.link_down(name)
        self.pools[name].clear()

    @rule(name=nodes, stored=st.sets(blocks), evicted=st.sets(blocks), is_lost=st.sampled_from([False, False, False, True]))
    def cache_changes(self, name: NodeName, stored: set[int], evicted: set[int], is_lost: bool) -> None:
        self.pools[name] -= evicted
        self.pools[name] |= stored
        if (link := self.links.get(name)) is None:
            return
        if is_lost:
            link.number += 1
        else:
            self.send(name, events(link.number, stored, evicted))

    @rule(name=nodes)
    def asked_node_answers(self, name: NodeName) -> None:
        link = self.links.get(name)
        if link is not None and link.expected is None:
            self.send(name, events(link.number, self.pools[name], snapshot=True))

    def send(self, name: NodeName, frame: CacheEvents) -> None:
        link = self.links[name]
        wants_snapshot = self.index.on_events(name, frame)
        if frame.snapshot or frame.number == link.expected:
            assert not wants_snapshot
            link.known, link.expected = set(self.pools[name]), frame.number + 1
        else:
            assert wants_snapshot == (link.expected is not None), "asked once"
            link.known, link.expected = set(), None
        link.number += 1

    @invariant()
    def the_index_is_the_union_of_what_is_known(self) -> None:
        for number in range(13):
            holders = {name for name, count in cached(self.index, number).items() if count}
            assert holders == {name for name, link in self.links.items() if number in link.known}
        assert len(self.index) == len(set().union(*(link.known for link in self.links.values())))
        for name, link in self.links.items():
            assert self.index.num_held(name) == len(link.known)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=50)
