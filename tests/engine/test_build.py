"""An engine from a config's values, over the model that ships with disaggd."""

import pytest
import torch

from disaggd.engine.build import build_engine, warm_up
from disaggd.engine.engine import generate
from disaggd.engine.rank import num_blocks_in
from disaggd.engine.sequence import Sequence
from disaggd.engine.step_cost import ENOUGH
from disaggd.errors import ConfigError, ModelError, ResourceError
from disaggd.ids import SeqId
from disaggd.log import StartProgress
from disaggd.sampling import SamplingParams
from tests.support.endpoints import plain_kv

VALUES = {"path": "builtin:tiny", "kv_cache_bytes": 8 * 2**20, "block_size": 16, "max_step_tokens": 64, "max_sequences": 4}


class Progress(StartProgress):
    """Remembers what it was told."""

    def __init__(self) -> None:
        super().__init__(None, "tiny")
        self.seen: list[tuple[int, int]] = []

    def loading(self, done_bytes: int, total_bytes: int) -> None:
        self.seen.append((done_bytes, total_bytes))


def test_the_built_in_model_generates() -> None:
    progress = Progress()
    loaded = build_engine(**VALUES, progress=progress)
    outputs = list(generate(loaded.engine, [1, 2, 3], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)))
    assert len(outputs) == 5
    assert progress.seen[-1][0] == progress.seen[-1][1] > 0


def test_the_pool_is_as_large_as_the_bytes_allow() -> None:
    loaded = build_engine(**VALUES)
    num_blocks = loaded.engine.pool.num_blocks
    assert num_blocks == VALUES["kv_cache_bytes"] // loaded.kv_spec.bytes_per_block > 0
    group = loaded.kv_spec.groups[0]
    assert loaded.rank.kv.shape == (loaded.spec.num_layers, num_blocks, group.kv_heads, 2, 16, loaded.spec.head_dim)
    assert loaded.rank.kv.nbytes == num_blocks * loaded.kv_spec.bytes_per_block
    assert loaded.engine.limits.max_model_len == loaded.spec.max_position_embeddings


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kv_cache_bytes": 100}, ConfigError, "kv_cache: 100 bytes do not hold one block of"),
        ({"max_model_len": 10**9}, ConfigError, "max_model_len: 1000000000 is more than the model's"),
        ({"max_step_tokens": 15}, ConfigError, "max_step_tokens: 15 is less than a block of 16"),
        ({"path": "builtin:none"}, ModelError, "builtin:none"),
        ({"device": "cuda:99"}, ResourceError, "device cuda:99"),
    ],
)
def test_what_cannot_be_is_said_before_weights_are_read(change: dict[str, object], error: type[Exception], message: str) -> None:
    progress = Progress()
    with pytest.raises(error, match=message):
        build_engine(**(VALUES | change), progress=progress)
    assert not progress.seen, "weights were read"


def test_layers_are_reported_in_groups_of_the_size_asked_for() -> None:
    loaded = build_engine(**VALUES, layer_group=3)
    loaded.engine.add(Sequence(SeqId("s"), [1, 2, 3], SamplingParams(), num_prompt_tokens=3))
    seen: list[range] = []
    loaded.engine.step(lambda plan, layers: seen.append(layers))
    assert [layers.start for layers in seen] == list(range(0, loaded.spec.num_layers, 3))


def test_a_shorter_context_is_the_limit() -> None:
    assert build_engine(**VALUES, max_model_len=100).engine.context_limit == 100


@pytest.mark.parametrize(("num_ranks", "block_bytes"), [(1, 48), (2, 48), (3, 72), (4, 96)])
def test_a_pool_has_the_bytes_that_it_is_given_on_all_ranks_together(num_ranks: int, block_bytes: int) -> None:
    """Two heads of 24 bytes, which several ranks may hold."""
    kv = plain_kv(1, 48, kv_heads=2)
    assert num_blocks_in(kv, 3 * block_bytes - 1, num_ranks) == 2
    with pytest.raises(ConfigError, match=f"do not hold one block of {block_bytes}$"):
        num_blocks_in(kv, block_bytes - 1, num_ranks)


def test_a_warm_up_teaches_the_pace_of_steps_nothing_and_leaves_nothing_behind() -> None:
    """On a GPU its steps take what compiling their kernels takes."""
    now, tick_s = 0.0, 5.0

    def clock() -> float:
        nonlocal now
        now += tick_s
        return now

    engine = build_engine(**VALUES, clock=clock).engine
    warm_up(engine, torch.device("cpu"))
    assert engine.pool.num_free == engine.pool.num_blocks and engine.prefilled_tokens == 0
    tick_s = 0.001
    for _ in generate(engine, [1, 2, 3], SamplingParams(temperature=0, max_tokens=ENOUGH, ignore_eos=True)):
        pass
    assert engine.pace.cost is not None
    assert engine.pace.cost.decode_step_s(1, 8) == pytest.approx(tick_s, rel=0.5)
