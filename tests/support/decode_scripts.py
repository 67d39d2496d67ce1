"""A decode node `d0` among scripted surroundings, and the messages that its tests send most."""

from collections.abc import Sequence

from disaggd.cluster.decision import DecisionRule
from disaggd.cluster.offer import RemoteOffer
from disaggd.cluster.protocol import Generate, Grant, Granted, RequestGrant, Tokens, pack_tokens
from disaggd.engine.engine import Engine
from disaggd.ids import AgentId, BlockId, Incarnation, NodeName, SeqId
from disaggd.prefix import PrefixHasher
from disaggd.roles.compute import Outbox
from disaggd.roles.decode_role import DecodeRole
from disaggd.roles.granting import Granting
from disaggd.sampling import SamplingParams
from disaggd.transfer import messages as transfer
from disaggd.transfer.grant import GrantState
from disaggd.transfer.layout import PoolPlace
from disaggd.transfer.notification import FirstToken
from tests.support.checks import FakePatterns, make_pair_check
from tests.support.endpoints import endpoint
from tests.support.role_nodes import (
    BLOCK,
    BYTES_PER_TOKEN,
    LAYER_GROUPS,
    LEASE_S,
    QUIESCE_S,
    VOCAB_SIZE,
    Clock,
    RoleNode,
    Submit,
    check_holdings,
    make_pushing,
    next_token,
    prompt,
)

P0 = NodeName("p0")
AGENT = AgentId("agent-1")
S = SeqId("s")
PLACE = PoolPlace(4096, 64)

Node = RoleNode[DecodeRole]


class Staging:
    """Stands where `KVStaging` stands: records what is to be copied, and says that it is done when the test does."""

    def __init__(self, num_blocks: int) -> None:
        self.place = PoolPlace(8192, num_blocks)
        self.copies: list[tuple[tuple[BlockId, ...], tuple[BlockId, ...]]] = []
        """(landed, blocks of the pool) in order."""
        self.num_done = 0

    def copy_in(self, landed: Sequence[BlockId], blocks: Sequence[BlockId]) -> transfer.IsReady:
        assert len(landed) == len(blocks)
        self.copies.append((tuple(landed), tuple(blocks)))
        number = len(self.copies)
        return lambda: self.num_done >= number

    @property
    def under_way(self) -> list[tuple[tuple[BlockId, ...], tuple[BlockId, ...]]]:
        return self.copies[self.num_done :]

    def finish(self) -> None:
        """All copies so far are done."""
        self.num_done = len(self.copies)


def make_decode_node(
    num_blocks: int = 64,
    staging: Staging | None = None,
    hasher: PrefixHasher | None = None,
    *,
    bytes_per_block: int | None = None,
    lease_s: float = LEASE_S,
    verify: bool = False,
    block_size: int = BLOCK,
    max_step_tokens: int = 16,
    patterns: FakePatterns | None = None,
) -> Node:
    """A decode node `d0` whose agent `agent-1` for prefill node `p0` is open; prompts above 16 tokens are remote."""

    def make_role(engine: Engine, outbox: Outbox, submit: Submit, clock: Clock) -> DecodeRole:
        rule = DecisionRule(max_local_prefill_tokens=16, max_prefill_queue=4)
        granting = Granting(
            NodeName("d0"),
            engine,
            lease_s=lease_s,
            quiesce_s=QUIESCE_S,
            bytes_per_block=BYTES_PER_TOKEN * block_size if bytes_per_block is None else bytes_per_block,
            submit=submit,
            clock=clock,
            staging=staging,
            verify=verify,
        )
        pushing = make_pushing(engine, outbox, submit, clock)
        return DecodeRole(
            engine,
            rule,
            granting=granting,
            pushing=pushing,
            checks=make_pair_check(
                NodeName("d0"),
                engine,
                patterns=patterns or FakePatterns(),
                pushing=pushing,
                landings=granting.landings,
                agents=granting.agents,
                outbox=outbox,
                submit=submit,
                clock=clock,
            ),
            layer_groups=LAYER_GROUPS,
            vocab_size=VOCAB_SIZE,
            outbox=outbox,
            submit=submit,
            clock=clock,
        )

    node = RoleNode(make_role, num_blocks=num_blocks, hasher=hasher, block_size=block_size, max_step_tokens=max_step_tokens)
    node.event(transfer.PairOpened(NodeName("p0"), Incarnation("p0-first"), endpoint(AgentId("agent-1"), b"", PLACE)))
    node.clear()
    node.invariant = lambda: check_decode_pool(node)
    return node


def check_decode_pool(node: Node) -> None:
    """Every block is free, cached, granted, quarantined, or used: by a running sequence, or left out of a grant.

    Every sequence and grant has its owner.

    With staging memory the quarantined are of that, and each of its other blocks is free, or waited for in the pool.
    """
    gauges, placed = node.role.gauges(), node.role._placed
    used = len(node.running_blocks.union(*(p.prefix for p in placed.values())))
    assert gauges.blocks_used == used
    in_pool = gauges.blocks_free + gauges.blocks_cached + used + gauges.blocks_granted + gauges.blocks_held
    if node.role._granting._is_staged:
        landing, intake = node.role._granting._landings._landing, node.role._checks._intake
        books = (node.role._grants, intake._book)
        assert in_pool == node.pool.num_blocks
        assert gauges.blocks_quarantined == sum(book.blocks_quarantined for book in books)
        copies = [arrival.copy for arrival in node.role._granting.arrivals] + [copy for _, copy in intake._arrivals]
        promised = sum(book.blocks_granted + book.blocks_quarantined for book in books)
        assert landing.num_free + promised + sum(len(copy.landed) for copy in copies) == landing.num_blocks
    else:
        assert in_pool + gauges.blocks_quarantined == node.pool.num_blocks
    check_holdings(node, "held", "quarantined", *(() if node.role._granting._is_staged else ("granted",)))
    assert {p.sequence for p in placed.values()} == set(node.engine.sequences.values())
    granted = {token for token, record in node.role._grants._records.items() if record.state is GrantState.GRANTED}
    assert {p.grant for p in placed.values() if p.grant is not None} == granted


def generate(
    tokens: list[int],
    seq: SeqId = S,
    *,
    attempt: int = 0,
    max_tokens: int = 4,
    num_prompt: int | None = None,
    policy: str = "auto",
    nodes: int = 1,
    depth: int = 0,
    grant_for: NodeName | None = None,
    stop: tuple[int, ...] = (),
    salt: str = "",
) -> Generate:
    sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=stop, ignore_eos=True)
    offer = RemoteOffer(grant_for or P0, nodes, depth, False, 0.0, 0, None, None, may_grant=grant_for is not None) if nodes else None
    return Generate(seq, attempt, pack_tokens(tokens), num_prompt or len(tokens), sampling, salt, policy, 2.0, offer)


def granted(node: Node, seq: SeqId = S, length: int = 20, **options: object) -> Grant:
    """A remote sequence whose blocks are out."""
    node.say(generate(prompt(length), seq, **options), RequestGrant(seq, 0, P0))
    return node.last(Granted).grant


def landed(node: Node, grant: Grant, length: int = 20) -> None:
    node.event(transfer.Landed(grant.token, FirstToken(next_token(prompt(length))), 0))


def delivered(node: Node, seq: SeqId = S) -> list[int]:
    """Tokens reported so far; asserts that their indexes run on."""
    tokens: list[int] = []
    for run in (run for frame in node.frames(Tokens) for run in frame.runs if run.seq == seq):
        assert run.start == len(tokens)
        tokens += run.tokens
    return tokens


def is_empty(node: Node) -> bool:
    landing = node.role._granting._landings._landing
    return not node.engine.sequences and node.pool.num_available == node.pool.num_blocks and landing.num_available == landing.num_blocks
