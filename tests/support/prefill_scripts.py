"""A prefill node `p0` among scripted surroundings, and the messages that its tests send most."""

from collections.abc import Callable

from disaggd.cluster.hello import ConnectPair, PairReady
from disaggd.cluster.protocol import Grant, Prefill, PrefixSource, pack_tokens
from disaggd.engine.engine import Engine
from disaggd.ids import AgentId, BlockId, GrantToken, Incarnation, NodeName, SeqId
from disaggd.prefix import PrefixHasher
from disaggd.roles.compute import LinkId, Outbox
from disaggd.roles.landing import Landings
from disaggd.roles.prefill_role import PrefillRole
from disaggd.roles.prefixes import PrefixIntake
from disaggd.sampling import SamplingParams
from disaggd.transfer import messages as transfer
from disaggd.transfer.grant import GrantState
from disaggd.transfer.layout import KVSpec, PoolPlace
from tests.support.checks import FakePatterns, make_pair_check
from tests.support.endpoints import endpoint
from tests.support.role_nodes import (
    BLOCK,
    KV,
    LEASE_S,
    LINK,
    QUIESCE_S,
    VOCAB_SIZE,
    Clock,
    RoleNode,
    Submit,
    check_holdings,
    hasher_of,
    kv_of,
    make_pushing,
)

D0, P0 = NodeName("d0"), NodeName("p0")
AGENT, INTAKE = AgentId("agent-1"), AgentId("intake-1")
"""Of `d0`, which we write to; and ours, which `d0` writes to."""
S = SeqId("s")
T = GrantToken(b"token")

Node = RoleNode[PrefillRole]


def make_prefill_node(
    num_blocks: int = 64,
    max_step_tokens: int = 16,
    mark: Callable[[], transfer.IsReady] = lambda: transfer.at_once,
    hasher: PrefixHasher | None = None,
    *,
    verify: bool = False,
    block_size: int = BLOCK,
    patterns: FakePatterns | None = None,
) -> Node:
    """A prefill node that knows no decode node yet."""

    def make_role(engine: Engine, outbox: Outbox, submit: Submit, clock: Clock) -> PrefillRole:
        pushing = make_pushing(engine, outbox, submit, clock)
        prefixes = PrefixIntake(
            P0,
            engine,
            lease_s=LEASE_S,
            quiesce_s=QUIESCE_S,
            outbox=outbox,
            submit=submit,
            clock=clock,
            verify=verify,
        )
        return PrefillRole(
            engine,
            credit_tokens=1000,
            pushing=pushing,
            prefixes=prefixes,
            checks=make_pair_check(
                P0,
                engine,
                patterns=patterns or FakePatterns(),
                pushing=pushing,
                landings=Landings(engine.pool, None),
                agents=prefixes.agents,
                outbox=outbox,
                submit=submit,
                clock=clock,
                mark=mark,
            ),
            vocab_size=VOCAB_SIZE,
            outbox=outbox,
            mark=mark,
            clock=clock,
        )

    node = RoleNode(make_role, num_blocks=num_blocks, max_step_tokens=max_step_tokens, hasher=hasher, block_size=block_size)
    node.invariant = lambda: check_prefill_pool(node)
    return node


def check_prefill_pool(node: Node) -> None:
    """Every block is free, cached, a running sequence's, promised to decode, held for a sequence to begin behind, or by a push.

    No push reads a free block.
    """
    gauges, prefixes = node.role.gauges(), node.role._prefixes
    used = node.running_blocks | {block for prefix in prefixes._prefixes.values() for block in prefix.held}
    assert gauges.blocks_used == len(used)
    promised = gauges.blocks_granted + gauges.blocks_quarantined
    assert node.pool.num_available + len(used) + gauges.blocks_held + promised == node.pool.num_blocks
    check_holdings(node, "granted", "held", "quarantined")
    granted = {token for token, record in prefixes._book._records.items() if record.state is GrantState.GRANTED}
    assert {prefix.grant.token for prefix in prefixes._prefixes.values() if prefix.grant is not None} == granted
    assert all(node.pool.references(block) >= reads > 0 for block, reads in node.role._pushing._reads._reads.items())


def grant_for(length: int, token: GrantToken = T, *, first_token_index: int = 0, agent: AgentId = AGENT, block_size: int = BLOCK) -> Grant:
    """What decode, whose blocks are of `block_size`, reserves for a prompt: target block 100 + i for its i-th block that is not left
    out, one more for the output."""
    num_blocks = -(-(length + 1 - first_token_index) // block_size)
    return Grant(token, D0, P0, agent, first_token_index, tuple(BlockId(100 + i) for i in range(num_blocks)), LEASE_S)


def prefill(
    tokens: list[int],
    grant: Grant | None,
    seq: SeqId = S,
    *,
    attempt: int = 0,
    num_prompt: int | None = None,
    prefix: PrefixSource | None = None,
    **sampling: object,
) -> Prefill:
    params = SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **sampling})
    return Prefill(seq, attempt, pack_tokens(tokens), num_prompt or len(tokens), params, "", grant, prefix)


def ready_node(
    num_blocks: int = 64,
    max_step_tokens: int = 16,
    mark: Callable[[], transfer.IsReady] = lambda: transfer.at_once,
    hasher: PrefixHasher | None = None,
    *,
    verify: bool = False,
    block_size: int = BLOCK,
    target_size: int = BLOCK,
) -> Node:
    """A node that may push to `d0`, whose blocks are of `target_size`."""
    node = make_prefill_node(num_blocks, max_step_tokens, mark, hasher, verify=verify, block_size=block_size)
    connect(node, AGENT, kv=kv_of(target_size))
    node.say(PairReady(D0, AGENT))
    node.clear()
    return node


def taking_node(num_blocks: int = 64, max_step_tokens: int = 16, *, verify: bool = False, block_size: int = BLOCK) -> Node:
    """A node with a prefix cache to which `d0` may push, by agent `INTAKE`."""
    node = ready_node(num_blocks, max_step_tokens, hasher=hasher_of(block_size), verify=verify, block_size=block_size)
    node.event(transfer.PairOpened(D0, Incarnation("d0-first"), endpoint(INTAKE, b"", PoolPlace(0, 64))))
    node.clear()
    return node


def connect(node: Node, agent: AgentId, link: LinkId = LINK, kv: KVSpec = KV) -> None:
    node.say(ConnectPair(D0, Incarnation("d0-first"), endpoint(agent, b"", PoolPlace(0, 64)), kv), link=link)


def handles_done(node: Node, kv_bytes: int = 10) -> None:
    """The transfer thread ends every handle that was submitted since the last `clear`."""
    for push in node.submitted(transfer.PushBlocks):
        node.event(transfer.HandleDone(push.token, push.source.blocks, kv_bytes))


def push_ended(node: Node, token: GrantToken = T, *, clean: bool = True, finished: bool = True, kv_bytes: int = 60) -> None:
    node.event(transfer.PushEnded(token, clean, finished, kv_bytes, node.now - 0.5, node.now))


def is_idle(node: Node) -> bool:
    return (
        node.pool.num_available == node.pool.num_blocks
        and not node.engine.sequences
        and not node.role._jobs
        and not node.role._pushed
        and not node.role._pushing._pushes
        and not node.role._prefixes._prefixes
    )
