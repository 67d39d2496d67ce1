"""Captured decode steps: which sizes there are, and, on a GPU, that they say what the same model says launched kernel by kernel."""

from collections.abc import Iterator

import msgspec
import pytest
import torch

from disaggd.engine.build import build_engine
from disaggd.engine.engine import Engine, SequenceOutput
from disaggd.engine.graphs import sizes
from disaggd.engine.sequence import Sequence
from disaggd.ids import SeqId
from disaggd.sampling import SamplingParams

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")

WAYS = [
    SamplingParams(temperature=0.0),
    SamplingParams(seed=2**63 + 1, temperature=0.8, top_p=0.9, top_k=50, top_logprobs=3),
    SamplingParams(seed=5, repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.1),
]
PROMPTS = [
    [(7 * number + 13 * i * i) % 4000 for i in range(length)] for number, length in enumerate([3, 170, 16, 41, 300, 33, 57, 1, 25, 90])
]


@pytest.mark.parametrize(
    ("max_sequences", "expected"),
    [
        (1, [1]),
        (2, [1, 2]),
        (3, [1, 2, 4]),
        (20, [1, 2, 4, 8, 16, 24]),
        (70, [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80]),
    ],
)
def test_sizes_hold_every_batch_and_pad_little(max_sequences: int, expected: list[int]) -> None:
    assert list(sizes(max_sequences)) == expected


def make(device: str, *, max_sequences: int = 6, num_blocks: int = 40) -> Engine:
    loaded = build_engine(
        "builtin:tiny",
        dtype="float32",
        device=device,
        kv_cache_bytes=num_blocks * 4 * 2 * 2 * 16 * 64 * 4,  # of 16 tokens: 4 layers, 2 KV heads of 64
        block_size=16,
        max_step_tokens=128,
        max_sequences=max_sequences,
        max_model_len=600,
    )
    return loaded.engine


def tokens(outputs: Iterator[SequenceOutput]) -> dict[SeqId, list[int]]:
    said: dict[SeqId, list[int]] = {}
    for output in outputs:
        said.setdefault(output.sequence.seq_id, []).extend(output.tokens)
    return said


def run(engine: Engine, ways: list[SamplingParams]) -> dict[SeqId, list[int]]:
    for number, prompt in enumerate(PROMPTS):
        sampling = ways[number % len(ways)]
        limited = msgspec.structs.replace(sampling, max_tokens=40)
        engine.add(Sequence(SeqId(str(number)), list(prompt), limited, num_prompt_tokens=len(prompt)))

    def steps() -> Iterator[SequenceOutput]:
        while engine.has_work:
            yield from engine.step()

    return tokens(steps())


@needs_gpu
def test_an_engine_on_a_gpu_says_what_one_on_the_cpu_says() -> None:
    """In float32, greedy and drawn, chunked, preempted, padded: 10 sequences over a pool that does not hold them all."""
    engine = make("cuda")
    said = run(engine, WAYS)
    assert engine.gauges().preemptions > 0
    assert engine.pool.num_free == engine.pool.num_blocks
    assert said == run(make("cpu"), WAYS)


@needs_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_a_step_waits_for_the_device_only_for_its_tokens() -> None:
    engine = make("cuda", num_blocks=200)
    for number, (prompt, way) in enumerate(zip(PROMPTS[:4], [*WAYS, SamplingParams(logit_bias={7: 1.0})], strict=True)):
        drawn = msgspec.structs.replace(way, max_tokens=20, ignore_eos=True)
        engine.add(Sequence(SeqId(str(number)), list(prompt), drawn, num_prompt_tokens=len(prompt)))
    for _ in range(8):
        engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            assert len(engine.step()) == 4
    finally:
        torch.cuda.set_sync_debug_mode("default")
