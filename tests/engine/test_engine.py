"""The engine over a stand-in for the model (`tests/support/slots.py`)."""

from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disaggd.engine.engine import Engine, SequenceOutput, generate
from disaggd.engine.scheduler import StepPlan
from disaggd.engine.sequence import Sequence, SequenceState
from disaggd.errors import ContextTooLong
from disaggd.ids import BlockId, SeqId
from disaggd.sampling import SamplingParams, TokenLogprob
from tests.support.slots import BLOCK, EOS, VOCAB, both, expected, grant, make_engine, next_token, prompt, run, sequence, write_kv


def test_a_step_without_work_returns_nothing_at_once() -> None:
    engine = make_engine()
    assert not engine.has_work
    assert engine.step() == []


@both
def test_tokens_follow_the_whole_context_through_chunks_and_growth(lookahead: int) -> None:
    engine = make_engine(lookahead=lookahead)
    tokens = prompt(1, 37)
    engine.add(sequence(tokens, max_tokens=12))
    outputs = run(engine)
    assert [output.start for output in outputs] == list(range(12))
    assert [token for output in outputs for token in output.tokens] == expected(tokens, 12)
    assert [output.finish_reason for output in outputs[-2:]] == [None, "length"]
    assert outputs[0].logprobs == (TokenLogprob(-0.5),)
    assert (engine.sequences, engine.pool.num_free) == ({}, 64)


@both
def test_a_retried_sequence_continues_its_indexes_and_its_limit(lookahead: int) -> None:
    engine = make_engine(lookahead=lookahead)
    tokens = prompt(2, 9)
    sent = expected(tokens, 5)
    engine.add(sequence(tokens + sent, max_tokens=8, num_prompt=9))
    outputs = run(engine)
    assert [output.start for output in outputs] == [5, 6, 7]
    assert [token for output in outputs for token in output.tokens] == expected(tokens, 8)[5:]


EOS_THIRD = next(
    tokens for tokens in (prompt(seed, 5) for seed in range(VOCAB**2)) if EOS in expected(tokens, 3)[2:] and EOS not in expected(tokens, 2)
)
"""A prompt after which the stand-in's third token is EOS."""


@both
@pytest.mark.parametrize(
    ("sampling", "reason", "count"),
    [
        ({"ignore_eos": False}, "stop", 3),
        ({"ignore_eos": True}, "length", 8),
        ({"ignore_eos": True, "stop_token_ids": (EOS,)}, "stop", 3),
        ({"ignore_eos": False, "stop_token_ids": (expected(EOS_THIRD, 2)[1],)}, "stop", 2),
    ],
)
def test_what_stops_a_sequence(sampling: dict[str, object], reason: str, count: int, lookahead: int) -> None:
    engine = make_engine(lookahead=lookahead)
    engine.add(sequence(EOS_THIRD, **sampling))
    outputs = run(engine)
    assert [token for output in outputs for token in output.tokens] == expected(EOS_THIRD, count)  # the stopping token is reported
    assert outputs[-1].finish_reason == reason
    assert outputs[-1].sequence.finish_reason == reason


@both
def test_the_context_limit_stops_a_sequence(lookahead: int) -> None:
    engine = make_engine(max_model_len=12, lookahead=lookahead)
    engine.add(sequence(prompt(1, 10), max_tokens=50))
    outputs = run(engine)
    assert (len(outputs), outputs[-1].finish_reason) == (2, "length")


@both
def test_a_sequence_that_outgrows_the_pool_alone_ends_with_length(lookahead: int) -> None:
    engine = make_engine(num_blocks=4, lookahead=lookahead)
    engine.add(sequence(prompt(1, 10), max_tokens=50))
    outputs = run(engine)
    assert (len(outputs), outputs[-1].finish_reason, engine.pool.num_free) == (6, "length", 4)


def test_what_can_never_fit_is_refused_with_both_numbers() -> None:
    with pytest.raises(ContextTooLong, match=r"12 tokens, but the model's context less one token of output holds 11"):
        make_engine(max_model_len=12).add(sequence(prompt(1, 12)))
    with pytest.raises(ContextTooLong, match=r"16 tokens, but the KV pool less one token of output holds 15"):
        make_engine(num_blocks=4).park(sequence(prompt(1, 16)))
    small = make_engine(num_blocks=4)
    small.add(sequence(prompt(1, 15)))
    assert run(small)[-1].finish_reason == "length"


# ── hand-off ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@both
def test_a_sequence_is_handed_off_after_its_first_token(lookahead: int) -> None:
    engine = make_engine(lookahead=lookahead)
    engine.add(sequence(prompt(3, 20), limit=1))
    outputs = run(engine)
    assert len(outputs) == 1
    assert (outputs[0].tokens, outputs[0].handed_off, outputs[0].finish_reason) == (tuple(expected(prompt(3, 20), 1)), True, None)
    assert (outputs[0].sequence.state, engine.sequences, engine.pool.num_free) == (SequenceState.FINISHED, {}, 64)


@both
def test_a_first_token_that_ends_the_sequence_is_no_hand_off(lookahead: int) -> None:
    engine = make_engine(lookahead=lookahead)
    engine.add(sequence(prompt(3, 20), max_tokens=1, limit=1))
    outputs = run(engine)
    assert (outputs[0].handed_off, outputs[0].finish_reason) == (False, "length")


def test_pushed_blocks_outlive_their_sequence() -> None:
    engine = make_engine()
    pushed: list[BlockId] = []

    def push(plan: StepPlan, layers: range) -> None:
        if layers.start == 0:
            new = [chunk.sequence.block_table[chunk.start // BLOCK : -(-chunk.end // BLOCK)] for chunk in plan.chunks]
            pushed.extend(block for blocks in new for block in blocks)
            engine.pool.retain(pushed[-len(new[0]) :])

    engine.add(sequence(prompt(3, 20), limit=1))
    while engine.has_work:
        engine.step(push)
    assert engine.pool.num_free == 64 - 5
    engine.pool.release(pushed)
    assert engine.pool.num_free == 64


def test_layers_are_reported_once_per_step_with_its_plan() -> None:
    engine = make_engine()
    seen: list[tuple[list[tuple[int, int]], range]] = []
    engine.add(sequence(prompt(3, 20), max_tokens=1))
    while engine.has_work:
        engine.step(lambda plan, layers: seen.append(([(chunk.start, chunk.end) for chunk in plan.chunks], layers)))
    first, second = [(0, 16)], [(16, 20)]
    assert seen == [(first, range(0, 2)), (first, range(2, 3)), (second, range(0, 2)), (second, range(2, 3))]


def test_a_resumed_sequence_continues_as_if_it_had_been_computed_here() -> None:
    engine = make_engine()
    tokens = prompt(4, 10)
    parked = sequence(tokens, max_tokens=6)
    engine.park(parked)
    assert (engine.has_work, engine.gauges().queued) == (False, 1)
    blocks = grant(engine, tokens)
    write_kv(engine, blocks, tokens)
    first, *more = expected(tokens, 6)
    output = engine.resume(parked, blocks, first)
    assert (parked.num_computed, parked.num_uncomputed) == (10, 1)
    assert (output.start, output.tokens, output.finish_reason, output.handed_off) == (0, (first,), None, False)
    outputs = run(engine)
    assert [output.start for output in outputs] == [1, 2, 3, 4, 5]
    assert [token for output in outputs for token in output.tokens] == more
    assert engine.pool.num_free == 64


def test_a_resume_whose_token_ends_the_sequence_finishes_it() -> None:
    engine = make_engine()
    parked = sequence(prompt(4, 10), ignore_eos=False)
    engine.park(parked)
    output = engine.resume(parked, grant(engine, parked.tokens), EOS)
    assert (output.finish_reason, parked.state, engine.pool.num_free) == ("stop", SequenceState.FINISHED, 64)
    assert not engine.has_work


def test_a_resumed_sequence_does_not_wait_for_a_place() -> None:
    engine = make_engine(max_sequences=1)
    engine.add(sequence(prompt(1, 4), name="a"))
    engine.step()
    parked = sequence(prompt(2, 4), name="b")
    engine.park(parked)
    engine.resume(parked, grant(engine, parked.tokens), 1)
    assert {output.sequence.seq_id for output in engine.step()} == {"a", "b"}


@both
def test_preempted_and_resumed_sequences_never_repeat_an_index(lookahead: int) -> None:
    engine = make_engine(num_blocks=8, max_step_tokens=8, lookahead=lookahead)
    local, remote = prompt(1, 11), prompt(2, 10)
    engine.add(sequence(local, max_tokens=20, name="local"))
    parked = sequence(remote, max_tokens=16, name="remote")
    engine.park(parked)
    blocks = grant(engine, remote)
    write_kv(engine, blocks, remote)
    outputs = [engine.resume(parked, blocks, expected(remote, 1)[0])]
    outputs += run(engine)
    for name, tokens, count in (("local", local, 20), ("remote", remote, 16)):
        mine = [output for output in outputs if output.sequence.seq_id == name]
        assert [output.start for output in mine] == list(range(count))
        assert [token for output in mine for token in output.tokens] == expected(tokens, count)
    assert parked.num_preemptions == 1


# ── abort ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def bring_to(engine: Engine, target: Sequence, state: str) -> None:
    if state == "queued":
        return engine.park(target)
    engine.add(target)
    if state == "waiting":
        return None
    engine.step()
    if state == "preempted":
        engine._scheduler._preempt(target)
    elif state == "paused":
        target.move(SequenceState.PAUSED)
        engine._scheduler.running.remove(target)
    return None


@pytest.mark.parametrize("state", ["waiting", "queued", "prefilling", "decoding", "preempted", "paused"])
def test_abort_in_any_state_leaves_nothing_behind(state: str) -> None:
    engine = make_engine()
    target = sequence(prompt(1, 30 if state == "prefilling" else 9))
    bring_to(engine, target, state)
    for _ in range(2):  # the second is harmless
        engine.abort(target)
        assert (target.state, target.finish_reason) == (SequenceState.FINISHED, "abort")
        assert (engine.sequences, engine.pool.num_free, engine.has_work) == ({}, 64, False)
    assert engine.step() == []


def test_abort_of_an_old_attempt_leaves_the_new_one_alone() -> None:
    engine = make_engine()
    old, new = sequence(prompt(1, 9)), sequence(prompt(1, 9))
    engine.add(old)
    engine.abort(old)
    engine.add(new)
    engine.abort(old)
    assert engine.sequences == {"s": new}


def test_abort_after_the_end_keeps_the_reason() -> None:
    engine = make_engine()
    target = sequence(prompt(1, 9), max_tokens=1)
    engine.add(target)
    run(engine)
    engine.abort(target)
    assert target.finish_reason == "length"


# ── a step launched before the last one's tokens are known ───────────────────────────────────────────────────────────


def test_tokens_come_a_step_late() -> None:
    engine = make_engine(lookahead=1)
    target = sequence(prompt(1, 9), max_tokens=2)
    engine.add(target)
    assert (engine.step(), target.num_pending) == ([], 1)
    assert (engine.step()[0].start, target.num_pending, target.is_complete) == (0, 1, True)
    [last] = engine.step()  # nothing more is launched for it
    assert (last.start, last.finish_reason, engine.has_work, engine.pool.num_free) == (1, "length", False, 64)


def test_what_a_launched_step_writes_is_nobodys_until_it_is_settled() -> None:
    engine = make_engine(lookahead=1)
    target = sequence(prompt(1, 9))
    engine.add(target)
    engine.step()
    engine.abort(target)
    assert (engine.pool.num_free, engine.has_work) == (64 - 3, True)
    assert (engine.step(), engine.pool.num_free, engine.has_work) == ([], 64, False)


def test_a_preempted_sequence_waits_for_its_pending_token() -> None:
    engine = make_engine(lookahead=1)
    target = sequence(prompt(1, 9), max_tokens=3)
    engine.add(target)
    engine.step()
    engine._scheduler._preempt(target)
    outputs = engine.step()
    assert (len(outputs), target.num_computed) == (1, 0)
    outputs += run(engine)
    assert [token for output in outputs for token in output.tokens] == expected(prompt(1, 9), 3)


# ── want of blocks ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_work_that_waits_for_blocks_held_outside_lets_the_caller_sleep() -> None:
    engine = make_engine(num_blocks=4)
    held = engine.pool.allocate(3)
    assert held is not None
    engine.add(sequence(prompt(1, 6), max_tokens=4))
    assert engine.has_work
    assert engine.step() == []
    assert not engine.has_work
    engine.pool.release(held)
    assert [token for output in run(engine) for token in output.tokens] == expected(prompt(1, 6), 4)


def test_a_lone_sequence_waits_in_place_for_blocks_held_outside() -> None:
    engine = make_engine(num_blocks=4)
    alone = sequence(prompt(1, 7), max_tokens=6)
    engine.add(alone)
    held = engine.pool.allocate(2)
    assert held is not None
    outputs = run(engine)
    assert (len(outputs), alone.state, alone.num_preemptions) == (2, SequenceState.RUNNING, 0)
    engine.pool.release(held)
    outputs += run(engine)
    assert [token for output in outputs for token in output.tokens] == expected(prompt(1, 7), 6)


def test_an_idle_step_does_not_hide_work_that_comes_after() -> None:
    engine = make_engine()
    parked = sequence(prompt(1, 4), name="parked")
    engine.park(parked)
    blocks = grant(engine, parked.tokens)
    assert engine.step() == []
    engine.resume(parked, blocks, 1)
    assert engine.has_work
    engine.abort(parked)
    assert engine.step() == []
    engine.add(sequence(prompt(1, 4), name="added"))
    assert engine.has_work


def test_an_abort_at_the_head_of_the_line_wakes_those_behind() -> None:
    engine = make_engine(num_blocks=8)
    held = engine.pool.allocate(4)
    large, small = sequence(prompt(1, 25), name="large"), sequence(prompt(2, 6), name="small")
    engine.add(large)
    engine.add(small)
    assert (engine.step(), engine.has_work) == ([], False)
    engine.abort(large)
    assert engine.has_work
    assert len(run(engine)) == 8
    assert held is not None


def test_a_grant_comes_after_what_the_preempted_wait_for() -> None:
    engine = make_engine(num_blocks=40)
    old, young = sequence(prompt(1, 4), name="old"), sequence(prompt(2, 4), name="young")
    engine.add(old)
    engine.add(young)
    engine.step()
    parked = sequence(prompt(3, 4), name="parked")
    engine.park(parked)
    assert engine.room_for_grant(parked, 38 - 2 - 2, 0)
    assert not engine.room_for_grant(parked, 38 - 2 - 2 + 1, 0)
    engine._scheduler._preempt(young)
    owed = 2  # its 5 tokens
    assert engine.room_for_grant(parked, 39 - 2 - 1 - owed, 0)
    assert not engine.room_for_grant(parked, 39 - 2 - 1 - owed + 1, 0)


def test_a_grant_waits_for_a_place_among_the_running_behind_those_who_came_before() -> None:
    """Else a stream of resumed sequences would keep a local one waiting for ever."""
    engine = make_engine(num_blocks=64, max_sequences=2)
    first, waiting = sequence(prompt(1, 4), name="first"), sequence(prompt(2, 4), name="waiting")
    earlier, later = sequence(prompt(3, 4), name="earlier"), sequence(prompt(4, 4), name="later")
    engine.add(first)
    engine.step()
    engine.park(earlier)
    engine.add(waiting)
    engine.park(later)
    assert engine.room_for_grant(earlier, 2, 0)
    assert not engine.room_for_grant(earlier, 2, 1), "another grant has the place"
    assert not engine.room_for_grant(later, 2, 0), "a local sequence came before"


# ── the whole ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_oracle_yields_one_sequence_to_its_end() -> None:
    engine = make_engine()
    outputs = list(generate(engine, prompt(5, 9), SamplingParams(max_tokens=4, ignore_eos=True)))
    assert [token for output in outputs for token in output.tokens] == expected(prompt(5, 9), 4)
    assert engine.pool.num_free == 64


def test_an_oracle_closed_early_aborts() -> None:
    engine = make_engine()
    outputs = generate(engine, prompt(5, 9), SamplingParams(max_tokens=40, ignore_eos=True))
    next(outputs)
    outputs.close()
    assert (engine.sequences, engine.pool.num_free) == ({}, 64)


class Job(NamedTuple):
    length: int
    max_tokens: int
    arrival: int
    way: str
    """How it comes: `local`, `remote` (parked, granted, resumed) or `handoff` (reserved, ends after one token)."""
    aborted_at: int | None


jobs = st.builds(
    Job,
    length=st.integers(1, 23),
    max_tokens=st.sampled_from([1, 5, 20, 40]),
    arrival=st.integers(0, 12),
    way=st.sampled_from(["local", "remote", "handoff"]),
    aborted_at=st.none() | st.none() | st.none() | st.integers(0, 30),
)


class World:
    """Drives an engine through jobs: arrivals, grants, landings, aborts; collects what came out."""

    def __init__(self, engine: Engine, work: list[Job]) -> None:
        self.engine = engine
        self.work = work
        self.sequences = [self.make(number, job) for number, job in enumerate(work)]
        self.outputs: dict[SeqId, list[SequenceOutput]] = {made.seq_id: [] for made in self.sequences}

    def make(self, number: int, job: Job) -> Sequence:
        handoff = job.way == "handoff"
        made = sequence(prompt(number, job.length), job.max_tokens, name=str(number), limit=1 if handoff else None)
        made.reserve = handoff
        return made

    def run(self) -> None:
        """Every turn: what arrives, what is aborted, what a grant can be had for, one step. Ends, or the test fails."""
        for turn in range(2_000):
            for job, made in zip(self.work, self.sequences, strict=True):
                if turn == job.arrival:
                    self.engine.park(made) if job.way == "remote" else self.engine.add(made)
                if job.aborted_at is not None and turn == job.arrival + job.aborted_at:
                    self.engine.abort(made)
                if made.state is SequenceState.QUEUED:
                    self.land(made)
            for output in self.engine.step():
                self.outputs[output.sequence.seq_id].append(output)
            if turn > 12 and not self.engine.sequences:
                return
        raise AssertionError(f"still here: {self.engine.sequences}")

    def land(self, made: Sequence) -> None:
        if self.engine.room_for_grant(made, self.engine.pool.blocks_for(len(made.tokens) + 1), 0):
            blocks = grant(self.engine, made.tokens)
            write_kv(self.engine, blocks, made.tokens)
            self.outputs[made.seq_id].append(self.engine.resume(made, blocks, next_token(made.tokens)))


@settings(max_examples=250)
@given(
    work=st.lists(jobs, min_size=1, max_size=12),
    num_blocks=st.integers(6, 16),
    max_step_tokens=st.integers(BLOCK, 20),
    max_sequences=st.integers(1, 6),
    lookahead=st.integers(0, 1),
)
def test_every_sequence_ends_as_if_alone_and_every_block_returns(
    work: list[Job], num_blocks: int, max_step_tokens: int, max_sequences: int, lookahead: int
) -> None:
    engine = make_engine(num_blocks, max_step_tokens, max_sequences, lookahead=lookahead)
    world = World(engine, work)
    world.run()
    run(engine)
    assert (engine.pool.num_free, engine.gauges().running, engine.gauges().waiting) == (num_blocks, 0, 0)
    for job, made in zip(work, world.sequences, strict=True):
        outputs = world.outputs[made.seq_id]
        assert [output.start for output in outputs] == list(range(len(outputs)))
        count = 1 if job.way == "handoff" else min(job.max_tokens, num_blocks * BLOCK - job.length)
        wanted = expected(prompt(int(made.seq_id), job.length), count)
        came = [token for output in outputs for token in output.tokens]
        assert came == (wanted[: len(came)] if made.finish_reason == "abort" else wanted)
        assert made.finish_reason != "abort" or job.aborted_at is not None
