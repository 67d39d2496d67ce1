"""Plans become batches; and a whole engine over a tiny random model says what its oracle says."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disaggd import kernels
from disaggd.engine.batch import build_batch
from disaggd.engine.blocks import BlockPool
from disaggd.engine.engine import Engine, SequenceOutput, generate
from disaggd.engine.forward import Forward
from disaggd.engine.runner import ModelRunner
from disaggd.engine.scheduler import Chunk, Limits, StepPlan
from disaggd.engine.sequence import Sequence
from disaggd.engine.step_cost import StepPace
from disaggd.ids import BlockId, SeqId
from disaggd.kernels import native
from disaggd.model.kv import allocate_kv
from disaggd.model.spec import ModelSpec
from disaggd.model.transformer import Transformer
from disaggd.model.weights import weight_targets
from disaggd.prefix import PrefixHasher
from disaggd.sampling import SamplingParams
from disaggd.transfer.layout import kv_spec

CPU = torch.device("cpu")
BLOCK = 8
SPEC = ModelSpec(
    family="qwen3",
    vocab_size=151,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=256,
    tie_word_embeddings=True,
    qk_norm=True,
    dtype="float32",
)
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
GREEDY_OF = {n: SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 4, 12)}
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, top_k=40, seed=2**63 + 5, max_tokens=24, repetition_penalty=1.1, ignore_eos=True)
PROMPTS = [
    [(7 * number + 13 * i * i) % SPEC.vocab_size for i in range(length)]
    for number, length in enumerate([3, 70, 16, 41, 8, 33, 57, 1, 25, 90])
]


@dataclass(frozen=True)
class Node:
    engine: Engine
    kv: torch.Tensor


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    return made_of(SPEC)


def made_of(spec: ModelSpec) -> Transformer:
    made = Transformer(spec, CPU, kernels.select(CPU), layer_group=2)
    random = torch.Generator().manual_seed(1)
    for key, target in weight_targets(made).items():
        mean, deviation = (1.0, 0.2) if key.endswith("norm.weight") else (0.0, 0.15)
        target.tensor.normal_(mean, deviation, generator=random)
    return made


def make_node(
    transformer: Transformer,
    num_blocks: int = 200,
    max_step_tokens: int = 48,
    max_sequences: int = 8,
    lookahead: int = 0,
    hasher: PrefixHasher | None = None,
) -> Node:
    """Without a `hasher` nothing is cached."""
    kv = allocate_kv(kv_spec(SPEC, BLOCK), num_blocks, CPU)
    pool, limits = BlockPool(num_blocks, BLOCK, hasher), Limits(max_step_tokens, max_sequences, 256)
    runner = ModelRunner(Forward(transformer, kv, max_step_tokens))
    runner.lookahead = lookahead
    return Node(Engine(runner, pool, limits), kv)


def make_sequence(number: int, tokens: list[int], sampling: SamplingParams, limit: int | None = None) -> Sequence:
    return Sequence(SeqId(str(number)), list(tokens), sampling, num_prompt_tokens=len(tokens), reserve=limit == 1, output_limit=limit)


def tokens_of(outputs: list[SequenceOutput]) -> list[int]:
    return [token for output in outputs for token in output.tokens]


def oracle(transformer: Transformer, tokens: list[int], sampling: SamplingParams) -> list[int]:
    return tokens_of(list(generate(make_node(transformer, max_step_tokens=256).engine, tokens, sampling)))


def run(engine: Engine) -> Iterator[SequenceOutput]:
    while engine.has_work:
        yield from engine.step()


def by_sequence(outputs: list[SequenceOutput]) -> list[list[int]]:
    ordered: dict[int, list[int]] = {number: [] for number in range(len(PROMPTS))}
    for output in outputs:
        assert output.start == len(ordered[int(output.sequence.seq_id)])
        ordered[int(output.sequence.seq_id)] += output.tokens
    return list(ordered.values())


def test_a_batch_holds_the_chunks_one_after_another() -> None:
    prefill, decode = make_sequence(0, list(range(100, 120)), GREEDY), make_sequence(1, list(range(50, 55)), GREEDY)
    prefill.block_table, decode.block_table = [BlockId(4), BlockId(9), BlockId(2)], [BlockId(7)]
    plan = StepPlan((Chunk(decode, 4, 5, samples=True), Chunk(prefill, 8, 16, samples=False), Chunk(prefill, 16, 20, samples=True)))
    batch = build_batch(plan, BLOCK, {})
    assert batch.tokens.tolist() == [54, *range(108, 120)]
    assert batch.positions.tolist() == [4, *range(8, 20)]
    assert batch.slot_mapping.tolist() == [7 * BLOCK + 4, *range(9 * BLOCK, 10 * BLOCK), *range(2 * BLOCK, 2 * BLOCK + 4)]
    assert batch.query_start.tolist() == [0, 1, 9, 13]
    assert batch.context_lens.tolist() == [5, 16, 20]
    assert batch.block_tables.tolist() == [[7, 0, 0], [4, 9, 2], [4, 9, 2]]
    assert batch.logit_rows.tolist() == [0, 12]
    int64, int32 = np.int64, np.int32
    dtypes = [batch.tokens.dtype, batch.positions.dtype, batch.slot_mapping.dtype, batch.logit_rows.dtype]
    assert dtypes == [int64] * 4
    assert [batch.query_start.dtype, batch.context_lens.dtype, batch.block_tables.dtype] == [int32] * 3


def test_a_pending_token_comes_from_its_row_of_the_step_before() -> None:
    known, pending = make_sequence(0, [7, 8, 9], GREEDY), make_sequence(1, [4, 5], GREEDY)
    known.block_table, pending.block_table, pending.num_pending = [BlockId(0)], [BlockId(1)], 1
    plan = StepPlan((Chunk(known, 2, 3, samples=True), Chunk(pending, 2, 3, samples=True)))
    batch = build_batch(plan, BLOCK, {known: 0, pending: 5})
    assert (batch.tokens.tolist(), batch.sources.tolist(), batch.has_pending, batch.has_one_token_each) == ([9, 0], [-1, 5], True, True)
    padded = batch.padded(4, 3)
    assert (padded.tokens.tolist(), padded.sources.tolist()) == ([9, 0, 0, 0], [-1, 5, -1, -1])
    assert (padded.slot_mapping.tolist(), padded.context_lens.tolist()) == ([2, BLOCK + 2, -1, -1], [3, 3, 0, 0])
    assert (padded.query_start.tolist(), padded.block_tables.tolist()) == ([0, 1, 2, 3, 4], [[0] * 3, [1, 0, 0], [0] * 3, [0] * 3])


def test_slots_of_a_large_pool_do_not_overflow() -> None:
    decode = make_sequence(0, [1], GREEDY)
    decode.block_table = [BlockId(2**30)]
    batch = build_batch(StepPlan((Chunk(decode, 0, 1, samples=True),)), BLOCK, {})
    assert batch.slot_mapping.tolist() == [2**33]


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_many_at_once_in_chunks_and_preempted_say_what_the_oracle_says(
    transformer: Transformer, sampling: SamplingParams, lookahead: int
) -> None:
    engine = make_node(transformer, num_blocks=24, lookahead=lookahead).engine
    sequences = [make_sequence(number, tokens, sampling) for number, tokens in enumerate(PROMPTS)]
    for sequence in sequences:
        engine.add(sequence)
    outputs = by_sequence(list(run(engine)))
    assert sum(sequence.num_preemptions for sequence in sequences) > 0
    assert engine.pool.num_free == 24
    expected = [oracle(transformer, tokens, sampling) for tokens in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS), "too dull to tell anything"
    assert outputs == expected


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_prefilled_on_one_node_and_decoded_on_another_says_what_the_oracle_says(transformer: Transformer, sampling: SamplingParams) -> None:
    prefill, decode = make_node(transformer), make_node(transformer, num_blocks=60)
    parked = {SeqId(str(number)): make_sequence(number, tokens, sampling) for number, tokens in enumerate(PROMPTS)}
    for number, tokens in enumerate(PROMPTS):
        prefill.engine.add(make_sequence(number, tokens, sampling, limit=1))
        decode.engine.park(parked[SeqId(str(number))])
    granted = {
        name: decode.engine.pool.allocate(decode.engine.pool.blocks_for(len(waiting.tokens) + 1)) for name, waiting in parked.items()
    }
    assert all(granted.values())

    def push(plan: StepPlan, layers: range) -> None:
        """What NIXL does: this step's blocks of these layers, into those granted."""
        for chunk in plan.chunks:
            ours = chunk.sequence.block_table[chunk.start // BLOCK : -(-chunk.end // BLOCK)]
            theirs = granted[chunk.sequence.seq_id][chunk.start // BLOCK :][: len(ours)]
            decode.kv[layers.start : layers.stop, theirs] = prefill.kv[layers.start : layers.stop, ours]

    outputs = []
    while prefill.engine.has_work:
        for first in prefill.engine.step(push):
            assert first.handed_off
            name = first.sequence.seq_id
            outputs.append(decode.engine.resume(parked[name], granted[name], first.tokens[0]))
    outputs += run(decode.engine)
    assert by_sequence(outputs) == [oracle(transformer, tokens, sampling) for tokens in PROMPTS]
    assert (prefill.engine.pool.num_free, decode.engine.pool.num_free) == (200, 60)


def test_a_retry_on_another_engine_continues_token_for_token(transformer: Transformer) -> None:
    whole = oracle(transformer, PROMPTS[1], SEEDED)
    engine = make_node(transformer).engine
    engine.add(Sequence(SeqId("retry"), PROMPTS[1] + whole[:9], SEEDED, num_prompt_tokens=len(PROMPTS[1])))
    assert tokens_of(list(run(engine))) == whole[9:]


def test_every_layer_is_reported_once_per_step(transformer: Transformer) -> None:
    engine = make_node(transformer).engine
    engine.add(make_sequence(0, PROMPTS[1], GREEDY))
    for _ in range(3):
        seen: list[range] = []
        engine.step(lambda _, layers, seen=seen: seen.append(layers))
        assert seen == [range(0, 2), range(2, 3)]


class Hurry(StepPace):
    """Decodes leave a prompt no time: it gets the least it must have in each step."""

    def prefill_tokens(self, decodes: int, decode_context: int, start: int) -> int | None:
        return 0


NO_NATIVE = pytest.mark.skipif(native.library() is None, reason="the native kernels were not built")


@pytest.mark.parametrize("at_once", [pytest.param(False, id="by layers"), pytest.param(True, id="all layers at once", marks=NO_NATIVE)])
def test_chunks_that_end_inside_blocks_change_no_token_and_may_be_found_again(at_once: bool) -> None:
    transformer = made_of(msgspec.structs.replace(SPEC, intermediate_size=128) if at_once else SPEC)
    if at_once:
        transformer.pack()
    block, num_blocks = 32, 60
    kv = allocate_kv(kv_spec(SPEC, block), num_blocks, CPU)
    pool = BlockPool(num_blocks, block, PrefixHasher("model", "float32", block))
    engine = Engine(ModelRunner(Forward(transformer, kv, 48)), pool, Limits(48, 8, 256), pace=Hurry(None, lambda: 0.0))
    expected = [oracle(transformer, tokens, GREEDY) for tokens in PROMPTS]
    ends, groups = [], set()

    def layers_done(plan: StepPlan, layers: range) -> None:
        ends.extend(chunk.end for chunk in plan.chunks if not chunk.samples)
        groups.add(layers)

    for _ in range(2):
        for number, tokens in enumerate(PROMPTS):
            engine.add(make_sequence(number, tokens, GREEDY))
        outputs = []
        while engine.has_work:
            outputs += engine.step(layers_done)
        assert by_sequence(outputs) == expected
    assert any(end % block for end in ends)
    assert (range(3) in groups) is at_once  # the steps of decodes only tell
    assert engine.cache.hit_tokens > 0


# ── with a prefix cache ──


class Turn(NamedTuple):
    """One sequence: so many tokens of one of `PROMPTS`, then its own."""

    conversation: int
    shared: int
    own: int
    max_tokens: int
    arrival: int
    aborted_at: int | None


turns = st.builds(
    Turn,
    conversation=st.sampled_from([6, 9]),
    shared=st.integers(0, 40),
    own=st.integers(1, 9),
    max_tokens=st.sampled_from([1, 4, 12]),
    arrival=st.integers(0, 12),
    aborted_at=st.none() | st.none() | st.none() | st.integers(0, 12),
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(work=st.lists(turns, min_size=2, max_size=8), num_blocks=st.integers(10, 16), max_step_tokens=st.sampled_from([8, 24, 48]))
def test_whatever_was_cached_shared_evicted_or_aborted_outputs_are_the_oracles(
    transformer: Transformer, work: list[Turn], num_blocks: int, max_step_tokens: int
) -> None:
    """In float32, token for token, over a pool so small that running sequences are preempted and cached blocks evicted."""
    hasher = PrefixHasher("tiny", "float32", BLOCK)
    engine = make_node(transformer, num_blocks, max_step_tokens, max_sequences=4, hasher=hasher).engine
    pool = engine.pool
    sequences = [
        make_sequence(
            number, PROMPTS[turn.conversation][: turn.shared] + PROMPTS[1][number : number + turn.own], GREEDY_OF[turn.max_tokens]
        )
        for number, turn in enumerate(work)
    ]
    for clock in count():
        for turn, sequence in zip(work, sequences, strict=True):
            if clock == turn.arrival:
                engine.add(sequence)
            if turn.aborted_at is not None and clock == turn.arrival + turn.aborted_at:
                engine.abort(sequence)
        engine.step()
        held = [block for block in range(num_blocks) if pool.references(BlockId(block))]
        assert pool.num_free + pool.num_cached + len(held) == num_blocks
        assert not set(held) & {*pool._free, *pool._cached}
        if clock > 12 and not engine.sequences:
            break
    assert pool.num_available == num_blocks
    for sequence in sequences:
        given, came = sequence.tokens[: sequence.num_given], sequence.tokens[sequence.num_given :]
        wanted = oracle(transformer, given, sequence.sampling)
        assert came == (wanted[: len(came)] if sequence.finish_reason == "abort" else wanted)
