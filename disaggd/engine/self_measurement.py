"""An engine that has nothing to do yet times some steps, so that what it predicts first is not a guess.

Runs at a node's start, on the thread that loaded the engine. The steps are the runner's own, over sequences that are nobody's and blocks
that are free again afterwards: no cache, no counter and no client sees any of it.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from disaggd.engine.engine import Engine
from disaggd.engine.scheduler import Chunk, StepPlan
from disaggd.engine.sequence import Sequence
from disaggd.ids import BlockId, SeqId
from disaggd.sampling import SamplingParams

log = logging.getLogger(__name__)

LIMIT_S = 1.5
"""No step is begun that would end later, so far as is known by then."""

TURNS = 2
"""Of each step, one right behind the other."""

DECODES = (1, 4, 8)
CONTEXTS = (32, 512)
PROMPTS = (16, 64, 256, 512)
"""The first of these also run once unmeasured: memory is touched, and kernels are compiled, for the first time."""

LEAST_BLOCKS = 4 * DECODES[-1]
"""Half of them for a prompt, some for each sequence that decodes."""


def measure_steps(engine: Engine, clock: Callable[[], float]) -> None:
    """Have `engine.pace` learn from prefills of some lengths, decodes of some batches and contexts, and both at once."""
    if engine.pool.num_blocks < LEAST_BLOCKS:
        log.warning("a pool of fewer than %d blocks is too small to measure this node in: it first decides by the threshold", LEAST_BLOCKS)
        return
    began = clock()
    with _borrowed_sequences(engine) as (prompt, decodes):
        for warm_up in (_prefill(prompt, 0, PROMPTS[0]), _decode(decodes[:1], len(decodes[0].tokens))):
            engine.rehearse(warm_up, 1, learns=False)
        for plan in _plans(engine, prompt, decodes):
            predicted_s = engine.pace.predict(plan) or 0.0
            if clock() - began + TURNS * predicted_s < LIMIT_S:
                engine.rehearse(plan, TURNS, learns=True)
    cost = engine.pace.cost
    if cost is None:
        log.warning("this node is too slow to measure itself within %g s: its first decisions go by the threshold", LIMIT_S)
        return
    log.info(
        "measured in %.1f s: prefills %s tokens/s; a step of 1 and of %d sequences takes %.1f and %.1f ms",
        clock() - began,
        f"{PROMPTS[-1] / (cost.base_s + cost.prefill_s(PROMPTS[-1], 0)):,.0f}",
        len(decodes),
        cost.decode_step_s(1, CONTEXTS[-1]) * 1e3,
        cost.decode_step_s(len(decodes), len(decodes) * CONTEXTS[-1]) * 1e3,
    )


def _plans(engine: Engine, prompt: Sequence, decodes: list[Sequence]) -> Iterator[StepPlan]:
    """The cheap ones first, each twice over: what is dear is left out when time runs out."""
    longest = min(engine.limits.max_step_tokens, len(prompt.tokens) - 1)
    batches = [decodes[:count] for count in DECODES if count <= len(decodes)]
    mixed = min(PROMPTS[1], longest - len(decodes))
    for context in CONTEXTS:
        if context <= len(decodes[0].tokens):
            yield from (_decode(batch, context) for batch in batches)
    for length in PROMPTS:
        if length <= longest:
            yield _prefill(prompt, 0, length)
        if length == mixed:
            behind = len(prompt.tokens) - 1 - mixed
            yield _prefill(prompt, behind, mixed)
            yield StepPlan(_decode(decodes, len(decodes[0].tokens)).chunks + _prefill(prompt, behind // 2, mixed).chunks)


def _prefill(prompt: Sequence, start: int, num_tokens: int) -> StepPlan:
    return StepPlan((Chunk(prompt, start, start + num_tokens, samples=False),))


def _decode(decodes: list[Sequence], context: int) -> StepPlan:
    return StepPlan(tuple(Chunk(sequence, context - 1, context, samples=True) for sequence in decodes))


@contextmanager
def _borrowed_sequences(engine: Engine) -> Iterator[tuple[Sequence, list[Sequence]]]:
    """A prompt, and sequences to decode, in blocks of the pool's own: as long as it has room for."""
    num_decodes = min(DECODES[-1], engine.limits.max_sequences, engine.limits.max_step_tokens)
    prompt = _sequence(engine, min(engine.context_limit - 1, PROMPTS[-1] + 1024, engine.pool.num_blocks * engine.pool.block_size // 2))
    room = engine.pool.num_available // num_decodes * engine.pool.block_size
    decodes = [_sequence(engine, min(CONTEXTS[-1], engine.context_limit - 1, room)) for _ in range(num_decodes)]
    yield prompt, decodes
    for sequence in (prompt, *decodes):
        engine.pool.release(sequence.block_table)


def _sequence(engine: Engine, num_tokens: int) -> Sequence:
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    sequence = Sequence(SeqId("measured"), [0] * num_tokens, sampling, num_prompt_tokens=num_tokens)
    sequence.block_table = _blocks(engine, num_tokens)
    return sequence


def _blocks(engine: Engine, num_tokens: int) -> list[BlockId]:
    blocks = engine.pool.allocate(engine.pool.blocks_for(num_tokens))
    assert blocks is not None, "the pool is empty at the start"
    return blocks
