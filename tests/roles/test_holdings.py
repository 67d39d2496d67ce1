"""What a node says of blocks that it holds because of others. That all of them are listed, the invariants of every role test check."""

from disaggd.cluster.holdings import Holding
from disaggd.cluster.protocol import Abort, BlockList, ListBlocks, PrefillLost
from disaggd.engine.blocks import BlockPool
from disaggd.ids import GrantToken, SeqId
from disaggd.roles.compute import Compute, FrameIn
from disaggd.roles.source_reads import SourceReads
from tests.support.decode_scripts import P0, S, Staging, granted, landed, make_decode_node
from tests.support.prefill_scripts import D0, grant_for, handles_done, prefill, push_ended, ready_node
from tests.support.role_nodes import LINK, prompt


def only(holdings: object) -> Holding:
    (holding,) = holdings  # type: ignore[misc]
    return holding


def test_a_grant_that_is_out_and_one_that_was_given_up() -> None:
    node = make_decode_node()
    grant = granted(node)
    node.after(2.0)
    granted_ = Holding(state="granted", memory="pool", blocks=grant.block_ids, seq=S, attempt=0, peer=P0, age_s=2.0, reason="")
    assert only(node.role.holdings()) == granted_
    node.say(PrefillLost(S, 0))
    node.after(3.0)
    given_up = only(node.role.holdings())
    assert (given_up.state, given_up.blocks, given_up.age_s) == ("quarantined", grant.block_ids, 3.0)
    assert given_up.reason == "its prefill failed or is lost"


def test_blocks_that_only_a_push_reads() -> None:
    node = ready_node()
    node.say(prefill(prompt(40), grant_for(40)))
    node.step()
    assert list(node.role.holdings()) == [], "a sequence has them, too"
    node.say(Abort(SeqId("s"), 0))
    node.after(1.5)
    held = only(node.role.holdings())
    assert (held.state, held.memory, len(held.blocks), held.seq, held.peer, held.age_s) == ("held", "pool", 4, "s", D0, 1.5)
    assert held.reason == "told to stop 1.5 s ago; its writes have not ended"
    handles_done(node)
    push_ended(node, clean=True, finished=False)
    assert list(node.role.holdings()) == []


def test_a_block_is_held_when_only_pushes_read_it_and_listed_with_each() -> None:
    pool = BlockPool(4, 4)
    reads = SourceReads[str](pool)
    one, other = GrantToken(b"1"), GrantToken(b"2")
    blocks = tuple(pool.allocate(2) or ())
    reads.begin(one, "one", blocks)
    reads.begin(other, "other", blocks[:1])
    reads.begin(other, "other", blocks[:1])
    assert reads.num_held == 0 and list(reads.held()) == []
    pool.release(blocks)
    assert reads.num_held == 2 and list(reads.held()) == [("one", blocks), ("other", blocks[:1])]
    reads.end(other, blocks[:1])
    reads.end(one, blocks)
    assert list(reads.held()) == [("other", blocks[:1])]
    reads.end(other, blocks[:1])
    assert (reads.num_held, list(reads.held()), pool.num_free) == (0, [], 4)


def test_on_a_gpu_what_has_landed_is_listed_until_it_is_copied() -> None:
    staging = Staging(16)
    node = make_decode_node(staging=staging)
    grant = granted(node)
    assert (only(node.role.holdings()).memory, only(node.role.holdings()).blocks) == ("staging", grant.block_ids)
    landed(node, grant)
    copied = only(node.role.holdings())
    assert (copied.state, copied.memory, len(copied.blocks)) == ("granted", "pool", 6)
    staging.finish()
    node.after(0.0)
    assert list(node.role.holdings()) == []


def test_whoever_asks_is_answered_whatever_the_role() -> None:
    for node in (make_decode_node(), ready_node()):
        compute = Compute(node.engine, node.role, node.outbox, lambda: 0.0)
        compute.handle(FrameIn(LINK, ListBlocks(7)))
        node.outbox.flush()
        assert node.last(BlockList) == BlockList(7, ())
