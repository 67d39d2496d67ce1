"""The prefill role over scripted frames, transfer events, steps and time: pushes, first tokens, reports."""

import msgspec
import pytest

from disaggd.cluster.hello import PairLost, PairReady
from disaggd.cluster.offer import PrefillWork
from disaggd.cluster.protocol import Abort, Credit, JobEnded, Prefilled, Progress
from disaggd.ids import AgentId, BlockId, GrantToken, SeqId
from disaggd.roles.compute import LinkId
from disaggd.transfer import messages as transfer
from disaggd.transfer.notification import FirstToken
from tests.support.prefill_scripts import (
    AGENT,
    D0,
    S,
    T,
    connect,
    grant_for,
    handles_done,
    is_idle,
    make_prefill_node,
    prefill,
    push_ended,
    ready_node,
)
from tests.support.role_nodes import BLOCK, LAYER_GROUPS, LEASE_S, QUIESCE_S, next_token, prompt

# ── a job from its prompt to its report ──


def test_prompts_that_share_a_step_tell_of_its_whole_work_and_one_behind_a_full_step_of_what_is_left_of_it() -> None:
    node = ready_node(max_step_tokens=16)
    for i, num_tokens in enumerate((4, 8, 12)):
        node.say(prefill(prompt(num_tokens), grant_for(num_tokens, GrantToken(bytes([i] * 16))), SeqId(f"s{i}")))
    node.run()
    first = PrefillWork(16, 4 * 2 + 8 * 4 + 4 * 2)
    both = PrefillWork(16 + 8, first.context + 8 * (4 + 4))
    assert [frame.computed for frame in node.frames(Prefilled)] == [first, first, both]


def test_the_first_token_is_reported_while_the_push_is_under_way() -> None:
    node = ready_node()
    node.say(prefill(prompt(10), grant_for(10)))
    assert node.commands == [transfer.BeginPush(T, D0, AGENT, LEASE_S)]
    node.now += 0.25
    node.run()
    token = next_token(prompt(10))
    assert node.last(Prefilled) == Prefilled(S, 0, 0, token, None, None, 0, 250.0, 250.0, PrefillWork(10, 50.0))
    assert node.commands[-1] == transfer.FinishPush(T, FirstToken(token))
    assert not node.frames(JobEnded) and node.role.gauges().blocks_held == 3
    node.now += 0.75
    handles_done(node)
    push_ended(node, kv_bytes=60)
    assert node.last(JobEnded) == JobEnded(S, 0, True, "", 60, 500.0, 1000.0)
    assert is_idle(node)


def test_each_layer_groups_pushes_wait_for_what_the_device_was_asked_for_up_to_there() -> None:
    marks: list[transfer.IsReady] = []

    def mark() -> transfer.IsReady:
        marks.append(lambda: True)
        return marks[-1]

    node = ready_node(max_step_tokens=16, mark=mark)
    for seq in ("a", "b"):
        node.say(prefill(prompt(8), grant_for(8, GrantToken(seq.encode())), SeqId(seq)))
    node.run()
    pushes = node.submitted(transfer.PushBlocks)
    assert [(push.layers, marks.index(push.is_ready)) for push in pushes] == [
        (layers, index) for index, layers in enumerate(LAYER_GROUPS) for _ in "ab"
    ]


def test_a_job_without_a_grant_pushes_nothing() -> None:
    node = ready_node()
    node.say(prefill(prompt(10), None, max_tokens=1))
    node.run()
    assert node.commands == []
    assert node.last(Prefilled).finish_reason == "length"
    assert node.last(JobEnded) == JobEnded(S, 0, True, "", 0, None, None)
    assert is_idle(node)


def test_a_retrys_token_takes_the_index_after_what_was_sent() -> None:
    node = ready_node()
    node.say(prefill(prompt(10), grant_for(10), attempt=2, num_prompt=7))
    node.run()
    assert (node.last(Prefilled).attempt, node.last(Prefilled).start) == (2, 3)


def test_a_first_token_that_ends_the_sequence_stops_the_push() -> None:
    node = ready_node()
    node.say(prefill(prompt(10), grant_for(10), stop_token_ids=(next_token(prompt(10)),)))
    node.run()
    assert node.last(Prefilled).finish_reason == "stop"
    assert not node.submitted(transfer.FinishPush) and node.commands[-1] == transfer.CancelPush(T)
    handles_done(node)
    push_ended(node, finished=False)
    assert node.last(JobEnded).reason == "the first token ended the sequence"
    assert is_idle(node)


def test_a_prompt_that_fits_no_pool_ends_its_job_at_once() -> None:
    node = ready_node(num_blocks=4)
    node.say(prefill(prompt(16), grant_for(16)))
    assert not node.last(JobEnded).clean and "16 tokens" in node.last(JobEnded).reason
    assert node.commands == [] and is_idle(node)


# ── exactly once ──


@pytest.mark.parametrize("length", [1, 4, 16, 17, 37, 64])
@pytest.mark.parametrize("max_step_tokens", [4, 10, 16, 100])
def test_each_block_of_each_layer_is_pushed_once_to_its_place(length: int, max_step_tokens: int) -> None:
    node = ready_node(max_step_tokens=max_step_tokens)
    node.say(prefill(prompt(length), grant_for(length)))
    table: list[BlockId] = []
    while node.engine.has_work:
        node.step()
        table = table or list(node.engine.sequences[S].block_table) if S in node.engine.sequences else table
    pushed = [
        (layer, source, target)
        for push in node.submitted(transfer.PushBlocks)
        for layer in push.layers
        for source, target in zip(push.source.blocks, push.target, strict=True)
    ]
    num_blocks = -(-length // BLOCK)
    assert len(pushed) == len(set(pushed)) == 3 * num_blocks
    assert {target for _, _, target in pushed} == set(range(100, 100 + num_blocks))
    for layer in range(3):
        of_layer = {source: target for at, source, target in pushed if at == layer}
        assert all(of_layer[block] == 100 + i for i, block in enumerate(table))


def test_a_layer_group_is_pushed_as_soon_as_it_is_computed() -> None:
    node = ready_node()
    node.say(prefill(prompt(16), grant_for(16)))
    node.clear()
    node.step()
    assert [push.layers for push in node.submitted(transfer.PushBlocks)] == list(LAYER_GROUPS)


def test_a_second_job_of_a_sequence_ends_the_first_and_an_older_one_is_ignored() -> None:
    node = ready_node(max_step_tokens=4)
    node.say(prefill(prompt(30), grant_for(30)))
    node.step()
    newer = GrantToken(b"newer")
    node.say(prefill(prompt(30), grant_for(30, newer), attempt=1))
    assert node.submitted(transfer.CancelPush) == [transfer.CancelPush(T)]
    node.say(prefill(prompt(30), grant_for(30, GrantToken(b"older")), attempt=0))
    assert [command.token for command in node.submitted(transfer.BeginPush)] == [T, newer]


def test_a_grant_too_small_for_its_prompt_is_refused() -> None:
    node = ready_node()
    node.say(prefill(prompt(30), grant_for(20)))
    assert "does not hold 30 tokens" in node.last(JobEnded).reason


@pytest.mark.parametrize("max_step_tokens", [4, 16, 100])
@pytest.mark.parametrize("left_out", [4, 8, 20])
def test_a_prefix_that_decode_has_cached_is_not_pushed(left_out: int, max_step_tokens: int) -> None:
    node = ready_node(max_step_tokens=max_step_tokens)
    node.say(prefill(prompt(30), grant_for(30, first_token_index=left_out)))
    node.run()
    pushes = node.submitted(transfer.PushBlocks)
    assert all(push.source.blocks and len(push.source.blocks) == len(push.target) for push in pushes)
    first_group = [target for push in pushes if push.layers == LAYER_GROUPS[0] for target in push.target]
    assert first_group == [100 + i for i in range(8 - left_out // BLOCK)]


def test_jobs_that_share_a_step_push_each_into_its_own_grant() -> None:
    node = ready_node()
    a, b = GrantToken(b"a"), GrantToken(b"b")
    node.say(prefill(prompt(8), grant_for(8, a), SeqId("a")), prefill(prompt(7, 1), grant_for(7, b), SeqId("b")))
    node.step()
    assert {push.token: len(push.source.blocks) for push in node.submitted(transfer.PushBlocks)} == {a: 2, b: 2}
    sources = [set(push.source.blocks) for push in node.submitted(transfer.PushBlocks) if push.layers == LAYER_GROUPS[0]]
    assert not sources[0] & sources[1]


# ── references ──


def test_blocks_stay_referenced_until_the_last_handle_that_reads_them_is_done() -> None:
    node = ready_node()
    node.say(prefill(prompt(16), grant_for(16)))
    node.run()
    first, second = node.submitted(transfer.PushBlocks)
    assert node.pool.num_free == 60 and node.role.gauges().blocks_held == 4
    node.event(transfer.HandleDone(T, first.source.blocks, 10))
    assert node.pool.num_free == 60
    node.event(transfer.HandleDone(T, second.source.blocks, 10))
    assert node.pool.num_free == 64 and node.role.gauges().blocks_held == 0


def test_an_abort_in_mid_prefill_keeps_the_blocks_that_handles_still_read() -> None:
    node = ready_node()
    node.say(prefill(prompt(40), grant_for(40)))
    node.step()
    node.say(Abort(S, 0))
    assert not node.engine.sequences and node.commands[-1] == transfer.CancelPush(T)
    assert node.role.gauges().blocks_held == 4 and node.pool.num_free == 60
    handles_done(node, kv_bytes=0)
    assert node.pool.num_free == 64
    assert not node.frames(JobEnded), "the push has not ended"
    push_ended(node, finished=False)
    assert node.last(JobEnded).reason == "aborted" and is_idle(node)


def test_a_handle_that_ends_after_its_push_still_gives_its_blocks_back() -> None:
    node = ready_node()
    node.say(prefill(prompt(16), grant_for(16)))
    node.step()
    push_ended(node, clean=False, finished=False)
    handles_done(node, kv_bytes=0)
    assert is_idle(node)


def test_a_granted_job_is_never_preempted() -> None:
    """Its blocks are promised: a later job waits for its own."""
    node = ready_node(num_blocks=8)
    node.say(prefill(prompt(28), grant_for(28)), prefill(prompt(20, 1), grant_for(20, GrantToken(b"b")), SeqId("later")))
    while not node.frames(Prefilled):
        node.step()
    assert node.last(Prefilled).seq == S
    assert node.engine.sequences[SeqId("later")].num_computed == 0
    handles_done(node)
    node.run()
    assert node.last(Prefilled).seq == "later"


# ── jobs that end early ──


@pytest.mark.parametrize("computed", [False, True])
def test_a_job_without_a_grant_is_aborted_at_once(computed: bool) -> None:
    node = ready_node()
    node.say(prefill(prompt(40), None, max_tokens=1))
    if computed:
        node.step()
    node.say(Abort(S, 0))
    assert node.last(JobEnded) == JobEnded(S, 0, False, "aborted", 0, None, None)
    assert is_idle(node)


def test_an_abort_of_another_attempt_or_an_ended_job_changes_nothing() -> None:
    node = ready_node()
    node.say(prefill(prompt(40), grant_for(40), attempt=1), Abort(S, 0), Abort(SeqId("unknown"), 0))
    assert S in node.engine.sequences and node.sent == []


def test_an_aborted_attempt_may_drain_while_the_next_one_runs() -> None:
    node = ready_node()
    again = GrantToken(b"again")
    node.say(prefill(prompt(20), grant_for(20)))
    node.step()
    node.say(Abort(S, 0), prefill(prompt(20), grant_for(20, again), attempt=1))
    node.run()
    assert node.last(Prefilled).attempt == 1
    handles_done(node)
    push_ended(node, finished=False)
    push_ended(node, again)
    assert [(frame.attempt, frame.clean) for frame in node.frames(JobEnded)] == [(0, False), (1, True)]
    assert is_idle(node)


def test_a_push_that_fails_ends_its_job_and_its_prompt_is_computed_no_further() -> None:
    node = ready_node()
    node.say(prefill(prompt(40), grant_for(40)))
    node.step()
    handles_done(node, kv_bytes=0)
    push_ended(node, clean=False, finished=False, kv_bytes=5)
    ended = node.last(JobEnded)
    assert (ended.clean, ended.reason, ended.kv_bytes) == (False, "the push failed", 5)
    assert is_idle(node) and not node.frames(Prefilled)


def test_a_push_that_ended_unfinished_is_not_clean_though_its_handles_were() -> None:
    node = ready_node()
    node.say(prefill(prompt(40), grant_for(40)))
    push_ended(node, clean=True, finished=False)
    assert (node.last(JobEnded).clean, node.last(JobEnded).reason) == (False, "the push was stopped")


# ── pairs ──


def test_a_grant_is_refused_before_its_pair_is_ready() -> None:
    node = make_prefill_node()
    connect(node, AGENT)
    node.event(transfer.PairConnected(D0, AGENT))
    node.say(prefill(prompt(10), grant_for(10)))
    assert not node.last(JobEnded).clean and "no KV path" in node.last(JobEnded).reason
    assert not node.submitted(transfer.BeginPush) and is_idle(node)


def test_a_grant_of_an_agent_that_was_replaced_is_refused() -> None:
    node = ready_node()
    connect(node, AgentId("agent-2"))
    node.say(prefill(prompt(10), grant_for(10)))
    assert not node.last(JobEnded).clean
    node.say(PairReady(D0, AgentId("agent-2")))
    node.say(prefill(prompt(10), grant_for(10), attempt=1))
    assert not node.last(JobEnded).clean, "the grant names the old agent"
    node.say(prefill(prompt(10), grant_for(10, agent=AgentId("agent-2")), attempt=2))
    assert node.submitted(transfer.BeginPush)


def test_a_lost_pair_is_told_to_every_router_and_takes_no_more_grants() -> None:
    node = ready_node()
    node.link_up(LinkId(2))
    node.clear()
    node.event(transfer.PairFailed(D0, AGENT, "connection reset"))
    assert node.sent == [(link, PairLost(D0, AGENT, "connection reset")) for link in (1, 2)]
    node.say(prefill(prompt(10), grant_for(10)))
    assert not node.last(JobEnded).clean


def test_the_loss_of_a_replaced_agent_leaves_the_pair_ready() -> None:
    node = ready_node()
    connect(node, AgentId("agent-2"))
    node.say(PairReady(D0, AgentId("agent-2")))
    node.event(transfer.PairFailed(D0, AGENT, "connection reset"))
    node.say(prefill(prompt(10), grant_for(10, agent=AgentId("agent-2"))))
    assert node.submitted(transfer.BeginPush)


def test_another_router_that_connects_the_same_agent_stops_no_push() -> None:
    node = ready_node()
    node.link_up(LinkId(2))
    connect(node, AGENT, LinkId(2))
    node.say(prefill(prompt(10), grant_for(10)))
    assert node.submitted(transfer.BeginPush)


def test_a_peer_that_ends_no_handle_for_too_long_loses_its_pair() -> None:
    """Nothing else would give the blocks back: a peer that hangs reports no error."""
    node = ready_node()
    node.say(prefill(prompt(40), grant_for(40)))
    node.step()
    node.say(Abort(S, 0))
    node.after(QUIESCE_S * 0.9)
    assert not node.submitted(transfer.ClosePair)
    node.after(QUIESCE_S * 0.2)
    node.after(QUIESCE_S)
    assert node.submitted(transfer.ClosePair) == [transfer.ClosePair(D0)]
    assert node.frames(PairLost) == [PairLost(D0, AGENT, "writes to it do not end")]


def test_a_push_that_was_not_stopped_may_take_its_time() -> None:
    node = ready_node()
    node.say(prefill(prompt(16), grant_for(16)))
    node.run()
    node.after(QUIESCE_S * 3)
    assert not node.submitted(transfer.ClosePair)


# ── leases and credit ──


def test_leases_are_renewed_here_and_at_decode_well_before_they_run_out() -> None:
    node = ready_node()
    node.say(prefill(prompt(40), grant_for(40)))
    node.after(0.0)
    renewals = 0
    while node.now < 1000.0 + 2 * LEASE_S:
        node.clear()
        deadline = node.role.next_deadline()
        assert deadline is not None and deadline - node.now <= LEASE_S / 4
        node.after(deadline - node.now)
        assert node.submitted(transfer.RenewLease) == [transfer.RenewLease(T)]
        assert node.frames(Progress) == [Progress((T,))]
        renewals += 1
    assert renewals == 10


def test_a_job_that_waits_behind_a_long_one_is_renewed_during_its_steps() -> None:
    node = ready_node()
    waiting = GrantToken(b"waiting")
    node.say(prefill(prompt(60), grant_for(60)), prefill(prompt(60, 1), grant_for(60, waiting), SeqId("waiting")))
    node.after(0.0)
    node.now += LEASE_S / 2
    node.clear()
    node.step()
    assert {command.token for command in node.submitted(transfer.RenewLease)} == {T, waiting}
    assert node.frames(Progress) == [Progress((T, waiting))]


def test_checksums_are_sent_where_the_target_asks_for_them() -> None:
    node = ready_node()
    node.say(prefill(prompt(10), msgspec.structs.replace(grant_for(10), verify=True)))
    assert node.submitted(transfer.BeginPush) == [transfer.BeginPush(T, D0, AGENT, LEASE_S, verify=True)]


@pytest.mark.parametrize("clean", [True, False])
def test_a_lease_is_renewed_once_more_when_all_of_the_push_has_gone_out(clean: bool) -> None:
    """The last piece may be on its way for a while; of a push that failed nothing is."""
    node = ready_node()
    node.say(prefill(prompt(10), grant_for(10)))
    node.run()
    handles_done(node)
    node.clear()
    push_ended(node, clean=clean)
    node.outbox.flush()
    assert node.frames(Progress) == ([Progress((T,))] if clean else [])


def test_nothing_is_renewed_when_nothing_is_pushed() -> None:
    node = ready_node()
    node.say(prefill(prompt(10), grant_for(10)))
    node.run()
    handles_done(node)
    push_ended(node)
    node.clear()
    node.after(LEASE_S)
    assert node.sent == [] and node.commands == [] and node.role.next_deadline() is None


def test_credit_is_shared_between_the_routers() -> None:
    node = make_prefill_node()
    assert node.sent == [(1, Credit(1000))]
    node.clear()
    node.link_up(LinkId(2))
    assert node.sent == [(1, Credit(500)), (2, Credit(500))]
    node.clear()
    node.link_down(LinkId(1))
    assert node.sent == [(2, Credit(1000))]
