"""`BlockSurvey`: asks engine nodes which blocks they hold because of each other, and waits for that no longer than it says.

Runs on the router's loop.
"""

import asyncio
import itertools
from collections.abc import Mapping

import msgspec

from disaggd.cluster.holdings import Holding
from disaggd.cluster.peers import Peer
from disaggd.cluster.protocol import BlockList, ListBlocks
from disaggd.ids import NodeName

PATIENCE_S = 1.0
"""A node answers between two steps. One that does not is named, and its blocks are what the gauges said last."""


class BlockSurvey:
    """One router's. Surveys may overlap."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._numbers = itertools.count(1)
        self._awaited: dict[tuple[int, NodeName], asyncio.Future[tuple[Holding, ...]]] = {}

    async def ask(self, peers: Mapping[NodeName, Peer]) -> dict[NodeName, tuple[Holding, ...] | None]:
        """What each holds; None of those that did not answer in time."""
        number, loop = next(self._numbers), asyncio.get_running_loop()
        awaited = {(number, name): loop.create_future() for name in peers}
        self._awaited |= awaited
        try:
            for peer in peers.values():
                peer.send(ListBlocks(number))
            if awaited:
                await asyncio.wait(awaited.values(), timeout=self._patience_s)
            return {name: future.result() if future.done() else None for (_, name), future in awaited.items()}
        finally:
            for key in awaited:
                del self._awaited[key]

    def on_list(self, name: NodeName, frame: BlockList) -> None:
        """An answer; nothing happens if nobody waits for it any more."""
        if (future := self._awaited.get((frame.request, name))) is not None and not future.done():
            future.set_result(frame.holdings)


def shown(node: NodeName, request_id: str | None, holding: Holding) -> dict[str, object]:
    """What a reader is told of one holding: plain JSON values, its age to the millisecond."""
    return {"node": node, "request": request_id, **msgspec.structs.asdict(holding), "age_s": round(holding.age_s, 3)}
