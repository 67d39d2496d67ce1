"""`decode_node` and `prefill_node`: one role each, with a fake model and scripted surroundings."""

from collections.abc import Callable

import pytest

from disaggd.cluster.decision import DecisionRule
from disaggd.engine.engine import Engine
from disaggd.ids import AgentId, Incarnation, NodeName
from disaggd.roles.compute import Outbox
from disaggd.roles.decode import DecodeRole
from disaggd.roles.prefill import PrefillRole
from disaggd.transfer import messages as transfer
from tests.support.role_nodes import RoleNode

LEASE_S = 5.0
QUIESCE_S = 10.0
BYTES_PER_BLOCK = 96

Submit = Callable[[transfer.TransferCommand], None]
Clock = Callable[[], float]


def make_decode_node(num_blocks: int = 64) -> RoleNode[DecodeRole]:
    """A decode node `d0` whose agent `agent-1` for prefill node `p0` is open; prompts above 16 tokens are remote."""

    def make_role(engine: Engine, outbox: Outbox, submit: Submit, clock: Clock) -> DecodeRole:
        rule = DecisionRule(max_local_prefill_tokens=16, max_prefill_queue=4)
        return DecodeRole(
            NodeName("d0"),
            engine,
            rule,
            lease_s=LEASE_S,
            quiesce_s=QUIESCE_S,
            bytes_per_block=BYTES_PER_BLOCK,
            outbox=outbox,
            submit=submit,
            clock=clock,
        )

    node = RoleNode(make_role, num_blocks=num_blocks)
    node.event(transfer.PairOpened(NodeName("p0"), Incarnation("p0-first"), AgentId("agent-1"), b"", 0))
    node.clear()
    node.invariant = lambda: check_decode_pool(node)
    return node


def check_decode_pool(node: RoleNode[DecodeRole]) -> None:
    """Every block is free, a running sequence's, granted or quarantined; every sequence and grant has its owner."""
    gauges, engine = node.role.gauges(), node.engine.gauges()
    assert gauges.blocks_used == engine.blocks_used
    assert gauges.blocks_free + engine.blocks_used + gauges.blocks_granted + gauges.blocks_quarantined == node.pool.num_blocks
    placed = node.role._placed
    assert {p.sequence for p in placed.values()} == set(node.engine.sequences.values())
    grants = [p.grant for p in placed.values() if p.grant is not None]
    assert node.role._grants.blocks_granted == sum(len(record.blocks) for token in grants if (record := node.role._grants.get(token)))


def make_prefill_node(num_blocks: int = 64, max_step_tokens: int = 16) -> RoleNode[PrefillRole]:
    """A prefill node that has a ready pair with decode node `d0` at its `agent-1`."""

    def make_role(engine: Engine, outbox: Outbox, submit: Submit, clock: Clock) -> PrefillRole:
        return PrefillRole(engine, credit_tokens=1000, lease_s=LEASE_S, outbox=outbox, submit=submit, clock=clock)

    node = RoleNode(make_role, num_blocks=num_blocks, max_step_tokens=max_step_tokens)
    node.invariant = lambda: check_prefill_pool(node)
    return node


def check_prefill_pool(node: RoleNode[PrefillRole]) -> None:
    """Every block is free, a running sequence's, or held by a push; and no push reads a free block."""
    gauges, engine = node.role.gauges(), node.engine.gauges()
    assert gauges.blocks_used == engine.blocks_used
    assert gauges.blocks_free + engine.blocks_used + gauges.blocks_held == node.pool.num_blocks
    assert all(node.pool.references(block) >= reads > 0 for block, reads in node.role._reading.items())


@pytest.fixture
def decode_node() -> Callable[..., RoleNode[DecodeRole]]:
    return make_decode_node


@pytest.fixture
def prefill_node() -> Callable[..., RoleNode[PrefillRole]]:
    return make_prefill_node
