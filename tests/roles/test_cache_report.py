"""What routers know of a node's cache is what it holds, whenever a turn has ended: real pools, reports and indexes."""

from collections.abc import Iterable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from disaggd.cluster.cache_index import CacheIndex
from disaggd.cluster.protocol import CacheEvents, CacheSnapshot
from disaggd.engine.blocks import BlockPool
from disaggd.engine.engine import Engine
from disaggd.engine.scheduler import Limits
from disaggd.ids import BlockId, NodeName
from disaggd.roles.compute import Batch, Compute, FrameIn, LinkDown, LinkId, LinkUp, Outbox
from tests.roles.test_compute import NotingRole
from tests.support.role_nodes import HASHER, FakeRunner, prompt

NODE = NodeName("d0")
LINKS = st.sampled_from([LinkId(1), LinkId(2)])
SEEDS = st.integers(0, 4)


class AnyOrderOfReports(RuleBasedStateMachine):
    """The pool changes between and within turns: by steps, by grants, by what lands. Each router has an index of its own."""

    @initialize()
    def start(self) -> None:
        self.pool = BlockPool(8, 4, HASHER)
        self.engine = Engine(FakeRunner(), self.pool, Limits(16, 8, 100))
        self.outbox = Outbox(self.read)
        self.compute = Compute(self.engine, NotingRole(self.outbox), self.outbox, lambda: 0.0)
        self.indexes: dict[LinkId, CacheIndex] = {}
        self.deaf: set[LinkId] = set()
        """Routers that miss the next change."""
        self.asked: list[LinkId] = []
        self.held: list[list[BlockId]] = []

    def read(self, batch: Iterable[tuple[LinkId, object]] | Batch) -> None:
        for link, frame in batch:
            if not isinstance(frame, CacheEvents) or link not in self.indexes:
                continue
            if link in self.deaf and not frame.snapshot:
                self.deaf.discard(link)
            elif self.indexes[link].on_events(NODE, frame):
                self.asked.append(link)

    @rule(seed=SEEDS, count=st.integers(1, 3))
    def blocks_are_filled(self, seed: int, count: int) -> None:
        """By a step, or because a grant has landed."""
        digests = HASHER.digests(prompt(4 * count, seed))
        cached = self.pool.find(digests)
        self.pool.take(cached)
        fresh = self.pool.allocate(count - len(cached))
        if fresh is None:
            return self.pool.release(cached)
        for block, digest in zip(fresh, digests[len(cached) :], strict=True):
            self.pool.register(block, digest)
        self.held.append(cached + fresh)
        return None

    @rule(count=st.integers(1, 8))
    def blocks_are_wanted(self, count: int) -> None:
        if (blocks := self.pool.allocate(count)) is not None:
            self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def blocks_are_released(self, data: st.DataObject) -> None:
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule(link=LINKS)
    def link_changes(self, link: LinkId) -> None:
        if link in self.indexes:
            del self.indexes[link]
            self.deaf.discard(link)
            self.asked = [asking for asking in self.asked if asking != link]
            return self.compute.handle(LinkDown(link))
        self.indexes[link] = CacheIndex()
        self.indexes[link].node_up(NODE)
        return self.compute.handle(LinkUp(link))

    @rule(link=LINKS)
    def next_change_is_lost(self, link: LinkId) -> None:
        if link in self.indexes:
            self.deaf.add(link)

    @rule()
    def routers_ask(self) -> None:
        asked, self.asked = self.asked, []
        for link in asked:
            self.compute.handle(FrameIn(link, CacheSnapshot()))

    @rule()
    def turn(self) -> None:
        self.compute.turn()

    def teardown(self) -> None:
        """Nothing is lost any more, everybody has what he asked for."""
        if not hasattr(self, "pool"):
            return
        self.compute.turn()
        self.deaf.clear()
        for seed in (90, 91):  # one more change shows what went missing before
            self.pool.release([block for blocks in self.held for block in blocks])
            self.held = []
            self.blocks_are_filled(seed, 1)
            self.compute.turn()
            self.routers_ask()
            self.compute.turn()
        for index in self.indexes.values():
            assert index.num_held(NODE) == len(self.pool.hashes())
            assert all(index.cached_blocks([name])[NODE] for name in self.pool.hashes())


TestAnyOrderOfReports = AnyOrderOfReports.TestCase
TestAnyOrderOfReports.settings = settings(max_examples=60)
