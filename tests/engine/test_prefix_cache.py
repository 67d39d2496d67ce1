"""What was computed once is not computed again, and what is found is what was asked for."""

from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disaggd.engine.engine import Engine, SequenceOutput
from disaggd.engine.scheduler import StepPlan
from disaggd.engine.sequence import Sequence, SequenceState
from disaggd.ids import BlockId, SeqId
from disaggd.prefix import PrefixHasher
from tests.support.slots import BLOCK, SlotRunner, both, expected, grant, make_engine, next_token, prompt, run, sequence, write_kv

HASHER = PrefixHasher("model", "float32", BLOCK)


def cached_engine(num_blocks: int = 64, lookahead: int = 0, hasher: PrefixHasher = HASHER, **limits: int) -> Engine:
    return make_engine(num_blocks, lookahead=lookahead, hasher=hasher, **limits)


def serve(engine: Engine, made: Sequence) -> tuple[list[int], int]:
    """Its tokens, and how many were computed for them, in an engine with nothing else to do."""
    spent: list[int] = []

    def count(plan: StepPlan, layers: range) -> None:
        if layers.start == 0:
            spent.append(plan.num_tokens)

    engine.add(made)
    outputs: list[SequenceOutput] = []
    while engine.has_work:
        outputs += engine.step(count)
    return [token for output in outputs for token in output.tokens], sum(spent)


def check(engine: Engine) -> None:
    """Each block is free, cached or held; and what can be found is what was computed for those tokens."""
    pool = engine.pool
    held = [block for block in range(pool.num_blocks) if pool.references(BlockId(block))]
    assert pool.num_free + pool.num_cached + len(held) == pool.num_blocks
    assert not set(held) & {*pool._free, *pool._cached}


# ── reuse ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_prompt_that_waits_counts_as_work_for_what_is_not_cached() -> None:
    engine = cached_engine(max_sequences=1)
    engine.add(sequence(prompt(1, 37), 1))
    while engine.has_work:
        engine.step()
    engine.add(sequence(prompt(2, 8), 4, name="runs"))
    engine.step()
    engine.add(sequence(prompt(1, 37), 1))
    assert engine.load().prefills == ((1, 36),)
    assert engine.gauges().prefill_backlog_tokens == 1


@both
def test_a_repeated_prompt_computes_only_its_tail(lookahead: int) -> None:
    engine = cached_engine(lookahead=lookahead)
    tokens = prompt(1, 37)
    assert serve(engine, sequence(tokens, 1)) == (expected(tokens, 1), 37)
    again = sequence(tokens, 1)
    assert serve(engine, again) == (expected(tokens, 1), 1)
    assert again.num_cached == 36
    assert (engine.cache.queried_tokens, engine.cache.hit_tokens) == (74, 36)


@both
def test_of_a_prompt_of_whole_blocks_the_last_is_computed_again_and_elsewhere(lookahead: int) -> None:
    engine = cached_engine(lookahead=lookahead)
    tokens = prompt(1, 16)
    serve(engine, sequence(tokens, 1))
    (last,) = engine.pool.find(HASHER.digests(tokens))[3:]
    engine.pool.take([last])  # whoever reads it meanwhile
    again = sequence(tokens, 1)
    engine.add(again)
    engine.step()
    assert again.num_cached == 12
    assert last not in again.block_table
    run(engine)
    assert engine.pool.references(last) == 1


@both
def test_turn_two_computes_only_what_is_new(lookahead: int) -> None:
    engine = cached_engine(lookahead=lookahead)
    first = prompt(1, 18)
    answer, _ = serve(engine, sequence(first, 21))
    second = first + answer + prompt(2, 7)
    found = (len(first) + len(answer) - 1) // BLOCK * BLOCK  # the answer's last token was never computed
    assert serve(engine, sequence(second, 1)) == (expected(second, 1), len(second) - found)


def test_sequences_of_another_salt_share_nothing() -> None:
    engine = cached_engine()
    tokens = prompt(1, 20)
    serve(engine, sequence(tokens, 1))
    other = sequence(tokens, 1)
    other.salt = "theirs"
    assert serve(engine, other)[1] == 20
    mine = sequence(tokens, 1)
    assert serve(engine, mine)[1] == 4


def test_sequences_that_run_at_once_share_the_blocks_of_their_prefix() -> None:
    engine = cached_engine(num_blocks=9, max_step_tokens=32)
    common = prompt(1, 16)
    branches = [sequence(common + prompt(seed, 3), 4, name=str(seed)) for seed in (2, 3, 4)]
    engine.add(branches[0])
    engine.step()
    for branch in branches[1:]:
        engine.add(branch)
    engine.step()
    assert len({tuple(branch.block_table[:4]) for branch in branches}) == 1
    assert engine.pool.num_available == 9 - 4 - 3  # apart they would need 15
    run(engine)
    for branch in branches:
        given = branch.tokens[: branch.num_given]
        assert branch.tokens == given + expected(given, 4)
    assert engine.pool.num_available == 9


@both
def test_a_preempted_sequence_finds_its_own_blocks_again(lookahead: int) -> None:
    engine = cached_engine(lookahead=lookahead)
    made = sequence(prompt(1, 30), 6)
    engine.add(made)
    outputs = [output for _ in range(4) for output in engine.step()]
    engine._scheduler._preempt(made)
    queried = engine.cache.queried_tokens
    outputs += engine.step()
    if not made.num_computed:
        outputs += engine.step()
    assert made.num_computed >= 30
    assert (made.num_cached, engine.cache.queried_tokens) == (0, queried)
    assert [token for output in outputs + run(engine) for token in output.tokens] == expected(prompt(1, 30), 6)


def test_a_resumed_sequence_leaves_its_prompt_behind_and_starts_from_what_was_found() -> None:
    engine = cached_engine()
    tokens = prompt(1, 18)
    parked = sequence(tokens, 2)
    engine.park(parked)
    blocks = grant(engine, tokens)
    write_kv(engine, blocks, tokens)
    engine.resume(parked, blocks, next_token(tokens))
    longer = tokens + prompt(5, 9)
    second = sequence(longer, 2, name="second")
    engine.park(second)
    found = engine.cache.find(second)
    assert found == blocks[:4]
    engine.pool.take(found)
    rest = engine.pool.allocate(engine.pool.blocks_for(len(longer) + 1) - 4) or []
    write_kv(engine, found + rest, longer)
    engine.resume(second, found + rest, next_token(longer), num_cached=16)
    assert (second.num_cached, second.num_computed) == (16, 27)
    run(engine)
    assert engine.cache.hit_tokens == 16
    assert engine.cache.find(sequence(longer + [1] * BLOCK)) != []
    assert len(engine.cache.find(sequence(longer))) == 6
    check(engine)


# ── one prefill for those who wait together ──────────────────────────────────────────────────────────────────────────


@both
def test_identical_prompts_waiting_at_once_share_one_prefill(lookahead: int) -> None:
    engine = cached_engine(lookahead=lookahead)
    tokens = prompt(1, 40)
    twins = [sequence(tokens, 1, name=str(number)) for number in range(4)]
    for twin in twins:
        engine.add(twin)
    spent: list[int] = []
    while engine.has_work:
        engine.step(lambda plan, layers: spent.append(plan.num_tokens) if layers.start == 0 else None)
    assert sum(spent) == 40 + 3 * BLOCK  # the last block of each is computed, for its logits
    assert [twin.tokens for twin in twins] == [tokens + expected(tokens, 1)] * 4
    assert engine.cache._pending == {}


def test_those_behind_one_that_waits_for_another_pass_it_and_it_loses_no_place() -> None:
    engine = cached_engine(max_step_tokens=24)
    for name, tokens in (("first", prompt(1, 40)), ("twin", prompt(1, 40)), ("other", prompt(2, 30)), ("last", prompt(3, 30))):
        engine.add(sequence(tokens, 1, name=name))
    spans = []
    while engine.has_work:
        engine.step(lambda plan, layers: layers.start or spans.append([(c.sequence.seq_id, c.start, c.end) for c in plan.chunks]))
    assert spans == [
        [("first", 0, 24)],
        [("first", 24, 40), ("other", 0, 8)],
        [("other", 8, 30)],  # two tokens are left: under the twin's last block
        [("twin", 36, 40), ("last", 0, 20)],
        [("last", 20, 30)],
    ]


@pytest.mark.parametrize("how", ["abort", "preempt"])
def test_who_waits_for_one_that_leaves_computes_itself(how: str) -> None:
    engine = cached_engine(max_step_tokens=8)
    tokens = prompt(1, 40)
    first, twin = sequence(tokens, 2, name="first"), sequence(tokens, 2, name="twin")
    engine.add(first)
    engine.add(twin)
    engine.step()
    assert twin.state is SequenceState.WAITING
    engine.abort(first) if how == "abort" else engine._scheduler._preempt(first)
    assert engine.cache._pending == {}
    outputs = run(engine)
    assert [token for output in outputs if output.sequence is twin for token in output.tokens] == expected(tokens, 2)
    assert engine.cache._pending == {}


def test_a_block_that_a_hash_collision_keeps_out_is_not_waited_for_for_ever() -> None:
    engine = cached_engine(hasher=PrefixHasher("model", "float32", BLOCK, hash_bytes=1))
    for number in range(60):  # by now most of the 256 hashes stand for another's block
        serve(engine, sequence(prompt(number, 20), 1, name=str(number)))
    twins = [sequence(prompt(7, 41), 1, name=f"twin{number}") for number in range(3)]
    for twin in twins:
        engine.add(twin)
    run(engine)
    assert [twin.tokens for twin in twins] == [prompt(7, 41) + expected(prompt(7, 41), 1)] * 3


# ── what is not to be found ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_step_that_is_not_settled_yet_has_left_nothing() -> None:
    engine = cached_engine(lookahead=1)
    tokens = prompt(1, 9)
    made = sequence(tokens)
    engine.add(made)
    engine.step()
    assert engine.pool.hashes() == []
    engine.step()
    assert engine.pool.find(HASHER.digests(tokens)) == made.block_table[:2]


def test_what_an_aborted_sequence_had_launched_is_not_registered() -> None:
    """Its blocks may be overwritten before the device has read them, and what it computes from them is nobody's."""
    engine = cached_engine(lookahead=1)
    made = sequence(prompt(1, 9))
    engine.add(made)
    engine.step()
    engine.abort(made)
    run(engine)
    assert (engine.pool.hashes(), engine.pool.num_free) == ([], 64)


def test_what_a_preempted_sequence_had_launched_is_not_taken_for_what_it_computes_anew() -> None:
    engine = cached_engine(lookahead=1)
    made = sequence(prompt(1, 40))
    engine.add(made)
    engine.step()
    engine._scheduler._preempt(made)
    engine.step()  # admitted anew, in other blocks; what is settled now was launched for the old ones
    assert (made.num_computed, engine.pool.hashes()) == (16, [])
    engine.step()
    assert engine.pool.find(made.digests) == made.block_table[:4]


def test_a_flood_of_unique_prompts_evicts_and_never_leaks() -> None:
    engine = cached_engine(num_blocks=16)
    for number in range(50):
        tokens = prompt(number, 23)
        assert serve(engine, sequence(tokens, 3))[0] == expected(tokens, 3)
        check(engine)
        assert len(engine.pool.hashes()) == engine.pool.num_cached <= 16
    assert engine.pool.num_evicted > 200
    assert engine.pool.num_available == 16


def test_cached_blocks_are_room_for_whoever_needs_it() -> None:
    engine = cached_engine(num_blocks=16)
    serve(engine, sequence(prompt(1, 60), 1))
    assert (engine.pool.num_free, engine.pool.num_cached) == (1, 15)
    parked = sequence(prompt(2, 60), name="parked")
    engine.park(parked)
    assert engine.room_for_grant(parked, 16, 0)
    assert engine.pool.allocate(16) is not None
    assert engine.pool.hashes() == []


# ── the whole ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Job(NamedTuple):
    family: int
    """Prompts of one family begin alike."""
    shared: int
    length: int
    max_tokens: int
    arrival: int
    way: str
    """How it comes: `local`, `remote` (parked, granted what it lacks, resumed) or `handoff` (reserved, ends after one token)."""
    salt: str
    follows: bool
    """It goes on where the job before it in the list ended: its prompt, its answer, and its own tokens."""
    aborted_at: int | None


jobs = st.builds(
    Job,
    family=st.integers(0, 1),
    shared=st.integers(0, 20),
    length=st.integers(1, 12),
    max_tokens=st.sampled_from([1, 5, 20]),
    arrival=st.integers(0, 20),
    way=st.sampled_from(["local", "local", "remote", "handoff"]),
    salt=st.sampled_from(["", "", "s"]),
    follows=st.booleans(),
    aborted_at=st.none() | st.none() | st.none() | st.integers(0, 20),
)


class World:
    """Drives an engine through jobs, and checks after every turn that what can be found is right."""

    def __init__(self, engine: Engine, work: list[Job], most_tokens: int) -> None:
        self.engine = engine
        self.work = work
        self.blocks: dict[bytes, list[int]] = {}
        """What a block with that digest must hold."""
        self.sequences: list[Sequence] = []
        self.outputs: dict[SeqId, list[int]] = {}
        before: list[int] = []
        for number, job in enumerate(work):
            tokens = prompt(job.family, job.shared) + prompt(50 + number, job.length)
            if job.follows and len(before) + job.length <= most_tokens:
                tokens = before + prompt(50 + number, job.length)
            self.sequences.append(self.make(number, job, tokens))
            self.outputs[self.sequences[-1].seq_id] = []
            before = tokens + expected(tokens, job.max_tokens)
            assert engine.pool.hasher is not None
            for index, digest in enumerate(engine.pool.hasher.digests(before, job.salt)):
                self.blocks[digest] = before[index * BLOCK : (index + 1) * BLOCK]

    def make(self, number: int, job: Job, tokens: list[int]) -> Sequence:
        handoff = job.way == "handoff"
        made = sequence(tokens, job.max_tokens, name=str(number), limit=1 if handoff else None)
        made.reserve, made.salt = handoff, job.salt
        return made

    def run(self) -> None:
        for turn in range(2_000):
            for job, made in zip(self.work, self.sequences, strict=True):
                if turn == job.arrival:
                    self.engine.park(made) if job.way == "remote" else self.engine.add(made)
                if job.aborted_at is not None and turn == job.arrival + job.aborted_at:
                    self.engine.abort(made)
                if made.state is SequenceState.QUEUED:
                    self.land(made)
            for output in self.engine.step():
                self.outputs[output.sequence.seq_id] += output.tokens
            self.check()
            if turn > 20 and not self.engine.sequences:
                return
        raise AssertionError(f"still here: {self.engine.sequences}")

    def land(self, made: Sequence) -> None:
        pool, found = self.engine.pool, self.engine.cache.find(made)
        missing = pool.blocks_for(len(made.tokens) + 1) - len(found)
        if self.engine.room_for_grant(made, missing + pool.num_unheld(found), 0):
            pool.take(found)
            blocks = found + (pool.allocate(missing) or [])
            runner = self.engine._runner
            assert isinstance(runner, SlotRunner)
            runner.write(blocks, made.tokens, range(len(found) * BLOCK, len(made.tokens)))
            output = self.engine.resume(made, blocks, next_token(made.tokens), num_cached=len(found) * BLOCK)
            self.outputs[made.seq_id] += output.tokens

    def check(self) -> None:
        check(self.engine)
        runner, pool = self.engine._runner, self.engine.pool
        assert isinstance(runner, SlotRunner)
        for block, digest in pool._digests.items():
            assert runner.slots[block * BLOCK : (block + 1) * BLOCK] == self.blocks[digest]


@settings(max_examples=300)
@given(
    work=st.lists(jobs, min_size=1, max_size=12),
    num_blocks=st.integers(12, 24),
    max_step_tokens=st.integers(BLOCK, 20),
    max_sequences=st.integers(1, 6),
    lookahead=st.integers(0, 1),
    hash_bytes=st.sampled_from([1, 16]),
)
def test_with_a_cache_every_sequence_ends_as_if_alone_and_every_block_is_accounted_for(
    work: list[Job], num_blocks: int, max_step_tokens: int, max_sequences: int, lookahead: int, hash_bytes: int
) -> None:
    hasher = PrefixHasher("model", "float32", BLOCK, hash_bytes)
    engine = make_engine(num_blocks, max_step_tokens, max_sequences, lookahead=lookahead, hasher=hasher)
    most_tokens = num_blocks * BLOCK - 1
    world = World(engine, work, most_tokens)
    world.run()
    run(engine)
    world.check()
    assert (engine.pool.num_available, engine.cache._pending, engine.sequences) == (num_blocks, {}, {})
    for job, made in zip(work, world.sequences, strict=True):
        came, tokens = world.outputs[made.seq_id], made.tokens[: made.num_given]
        count = 1 if job.way == "handoff" else min(job.max_tokens, num_blocks * BLOCK - len(tokens))
        wanted = expected(tokens, count)
        assert came == (wanted[: len(came)] if made.finish_reason == "abort" else wanted)
        assert made.finish_reason != "abort" or job.aborted_at is not None
