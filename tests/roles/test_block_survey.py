"""Asking nodes for their blocks: who answers in time is heard, and nobody is waited for longer."""

import asyncio
from typing import Any

from disaggd.cluster.holdings import Holding
from disaggd.cluster.peers import DecodePeer
from disaggd.cluster.protocol import BlockList, ListBlocks
from disaggd.ids import BlockId, NodeName, SeqId
from disaggd.roles.block_survey import BlockSurvey
from tests.support.routing import hello

D0, D1 = NodeName("d0"), NodeName("d1")
HELD = Holding(state="held", memory="pool", blocks=(BlockId(3),), seq=SeqId("s"), attempt=0, peer=D1, age_s=0.5, reason="")


class Nodes:
    """That record what they are asked, and answer when the test does it for them."""

    def __init__(self, *names: NodeName, patience_s: float = 10.0) -> None:
        self.survey = BlockSurvey(patience_s)
        self.asked: list[tuple[NodeName, int]] = []
        self.peers = {name: DecodePeer(name, hello(name, "first"), self._hear(name)) for name in names}

    def _hear(self, name: NodeName) -> Any:
        def hear(frame: object) -> None:
            assert isinstance(frame, ListBlocks)
            self.asked.append((name, frame.request))

        return hear

    async def ask(self) -> "asyncio.Task[Any]":
        task = asyncio.create_task(self.survey.ask(self.peers))
        await asyncio.sleep(0)
        return task


def test_all_answers_are_there_as_soon_as_the_last_is() -> None:
    async def scenario() -> None:
        nodes = Nodes(D0, D1)
        task = await nodes.ask()
        for name, request in nodes.asked:
            nodes.survey.on_list(name, BlockList(request, (HELD,) if name == D0 else ()))
        assert await asyncio.wait_for(task, 5) == {D0: (HELD,), D1: ()}

    asyncio.run(scenario())


def test_a_node_that_does_not_answer_is_named_and_not_waited_for() -> None:
    async def scenario() -> None:
        nodes = Nodes(D0, D1, patience_s=0.05)
        task = await nodes.ask()
        ((_, request),) = {one for one in nodes.asked if one[0] == D0}
        nodes.survey.on_list(D0, BlockList(request, ()))
        assert await asyncio.wait_for(task, 5) == {D0: (), D1: None}
        nodes.survey.on_list(D1, BlockList(request, ()))
        assert nodes.survey._awaited == {}

    asyncio.run(scenario())


def test_answers_go_to_the_survey_that_asked() -> None:
    async def scenario() -> None:
        nodes = Nodes(D0)
        first, second = await nodes.ask(), await nodes.ask()
        (_, one), (_, other) = nodes.asked
        nodes.survey.on_list(D0, BlockList(other, (HELD,)))
        nodes.survey.on_list(D0, BlockList(one, ()))
        assert (await asyncio.wait_for(first, 5), await asyncio.wait_for(second, 5)) == ({D0: ()}, {D0: (HELD,)})

    asyncio.run(scenario())


def test_a_cluster_without_nodes_has_nothing_to_ask() -> None:
    assert asyncio.run(BlockSurvey().ask({})) == {}
