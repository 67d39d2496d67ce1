"""What an engine node says of itself to its routers. Read on the compute thread; the gauges every turn: they walk over no blocks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from disaggd.cluster.holdings import Holding
from disaggd.cluster.protocol import Gauges
from disaggd.engine.engine import Engine
from disaggd.transfer.grant import GrantBook, GrantState
from disaggd.transfer.messages import Landed, LandingFailed


@dataclass(slots=True)
class Verified:
    """Blocks whose checksums were compared when they had landed, since the node's start."""

    num_blocks: int = 0
    """That were right."""
    num_failures: int = 0

    def landed(self, event: Landed) -> None:
        self.num_blocks += event.num_verified

    def failed(self, event: LandingFailed) -> None:
        self.num_failures += event.num_corrupt


def node_gauges(engine: Engine, verified: Verified, *, granted: int = 0, quarantined: int = 0, promised: int = 0, held: int = 0) -> Gauges:
    """The engine's own gauges, with the blocks that others count on.

    `promised` are those of the pool that a grant holds; `quarantined` may lie elsewhere. What is neither free, cached, promised nor
    held by pushes alone is used: by sequences that run, or as a prefix that a grant leaves out.
    """
    own, pool = engine.gauges(), engine.pool
    return Gauges(
        waiting=own.waiting,
        running=own.running,
        queued=own.queued,
        blocks_free=own.blocks_free,
        blocks_cached=own.blocks_cached,
        blocks_used=pool.num_blocks - pool.num_available - promised - held,
        blocks_granted=granted,
        blocks_held=held,
        blocks_quarantined=quarantined,
        preemptions=own.preemptions,
        prefill_backlog_tokens=own.prefill_backlog_tokens,
        prefix_queried_tokens=engine.cache.queried_tokens,
        prefix_hit_tokens=engine.cache.hit_tokens,
        prefix_evicted_blocks=pool.num_evicted,
        blocks_verified=verified.num_blocks,
        checksum_failures=verified.num_failures,
    )


def grant_holdings(book: GrantBook, memory: Literal["pool", "staging"], now: float) -> Iterator[Holding]:
    """The blocks of grants that are out or given up, when somebody asks: one by one."""
    for record in book:
        yield Holding(
            state="granted" if record.state is GrantState.GRANTED else "quarantined",
            memory=memory,
            blocks=record.blocks,
            seq=record.seq_id,
            attempt=record.attempt,
            peer=record.peer,
            age_s=now - record.since,
            reason=record.reason or "",
        )
