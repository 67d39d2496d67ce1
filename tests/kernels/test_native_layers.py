"""All layers in one call of the native library, against the operations one after another: the same bits."""

from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
import torch

from disaggd import kernels
from disaggd.kernels import FusedLayers, native
from disaggd.kernels.native import Isa, Native
from disaggd.kernels.native_int8 import NativeInt8
from disaggd.kernels.native_layers import MAX_ROWS
from disaggd.model.batch import Batch
from disaggd.model.spec import ModelSpec
from disaggd.model.transformer import Transformer

LIBRARY = native.library()
BEST = None if LIBRARY is None else native.best_isa(LIBRARY)
BLOCK = 16

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the native kernels were not built: python setup.py build_ext --inplace")

SHAPE = ModelSpec(
    family="llama",
    vocab_size=131,
    hidden_size=192,
    intermediate_size=320,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
    dtype="float32",
)


def spec(**changes):
    return ModelSpec(**{name: getattr(SHAPE, name) for name in SHAPE.__struct_fields__} | changes)


SPECS = {
    "grouped heads": spec(),
    "every head its own": spec(num_kv_heads=6),
    "head norms": spec(qk_norm=True),
    "biases": spec(qkv_bias=True, output_bias=True, mlp_bias=True),
    "a window": spec(sliding_window=40),
    "heads of no whole vector": spec(num_heads=8, head_dim=20, num_kv_heads=4),
    "heads of a panel, an odd group": spec(num_heads=5, head_dim=64, num_kv_heads=1, hidden_size=64, intermediate_size=64),
}
SEVERAL = [(40, 1), (1, 1), (1030, 1), (513, 1), (300, 1)]
CHUNKS = {
    "one": [(700, 1)],
    "its first token": [(1, 1)],
    "a whole block, and one more": [(16, 1), (17, 1)],
    "several": SEVERAL,
    "sixteen": [(3 * i + 1, 1) for i in range(16)],
    "as many as go": [(i % 50 + 1, 1) for i in range(MAX_ROWS)],
    "a prompt": [(37, 37)],
    "a prompt's chunk beside decodes": [*SEVERAL, (300, 17)],
    "chunks, one of a single token": [(90, 40), (5, 5), (61, 1), (20, 2)],
    "a chunk as long as goes": [(1100, MAX_ROWS)],
}


@pytest.fixture(params=list(Isa), ids=lambda isa: isa.name)
def isa(request) -> Isa:
    if request.param > BEST:
        pytest.skip(f"this CPU has no {request.param.name}")
    return request.param


def ops_of(isa: Isa, weights: str = "auto") -> kernels.Ops:
    ours = Native(LIBRARY, isa)
    if weights == "auto":
        return kernels.native_ops(ours)
    int8 = NativeInt8(ours)
    return replace(kernels.native_ops(ours), pack=int8.pack, linear=int8.linear, linear_silu_mul=int8.linear_silu_mul)


def transformer(of: ModelSpec, ops: kernels.Ops) -> Transformer:
    random = torch.Generator().manual_seed(11)
    made = Transformer(of, torch.device("cpu"), ops)

    def fill(tensor, spread):
        tensor.copy_(torch.randn(tensor.shape, generator=random) * spread)

    fill(made.embedding, 1)
    fill(made.head.weight, 0.1)
    for layer in made.layers:
        norms = [layer.attention_norm.weight, layer.mlp_norm.weight]
        for norm in norms if layer.attention.head_norm is None else [*norms, layer.attention.head_norm.weight]:
            fill(norm, 1)
        for linear in (layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down):
            fill(linear.weight, linear.weight.shape[1] ** -0.5)
            if linear.bias is not None:
                fill(linear.bias, 1)
    fill(made.norm.weight, 1)
    made.pack()
    return made


def batch_of(chunks: list[tuple[int, int]], vocab_size: int) -> tuple[Batch, int]:
    """The last tokens of several sequences, `(context length, new tokens)` each, in scattered blocks; and the number of blocks."""
    random = torch.Generator().manual_seed(12)
    needed = [-(-length // BLOCK) for length, _ in chunks]
    free = torch.randperm(sum(needed) + 3, generator=random).tolist()
    tables = [[free.pop() for _ in range(count)] for count in needed]
    positions = [range(length - count, length) for length, count in chunks]
    slots = [table[at // BLOCK] * BLOCK + at % BLOCK for table, span in zip(tables, positions, strict=True) for at in span]
    batch = Batch(
        tokens=torch.randint(vocab_size, (len(slots),), generator=random),
        positions=torch.tensor([at for span in positions for at in span]),
        slot_mapping=torch.tensor(slots),
        query_start=torch.tensor([0, *accumulate(count for _, count in chunks)], dtype=torch.int32),
        context_lens=torch.tensor([length for length, _ in chunks], dtype=torch.int32),
        block_tables=torch.tensor([table + [0] * (max(needed) - len(table)) for table in tables], dtype=torch.int32),
        logit_rows=torch.arange(len(slots)),
    )
    return batch, sum(needed) + 3


def pool_of(of: ModelSpec, num_blocks: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(13)
    shape = (of.num_layers, num_blocks, of.num_kv_heads, 2, BLOCK, of.head_dim)
    return torch.randn(shape, generator=random).to(getattr(torch, of.dtype))


@dataclass
class Watched:
    """Layers at once, and which of them each call was for."""

    fused: FusedLayers
    groups: list[range]

    @property
    def max_rows(self) -> int:
        return self.fused.max_rows

    def __call__(self, layers: range, *rest):
        self.groups.append(layers)
        return self.fused(layers, *rest)


def watched(ops: kernels.Ops) -> tuple[kernels.Ops, list[range]]:
    """The same operations, and a list of the calls of their fused layers."""
    groups: list[range] = []

    def fuse(layers, window):
        fused = ops.fuse(layers, window)
        return None if fused is None else Watched(fused, groups)

    return replace(ops, fuse=fuse), groups


def computed(made: Transformer, batch: Batch, pool: torch.Tensor, layers_done=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits, and what becomes of a copy of the pool."""
    pool = pool.clone()
    with torch.inference_mode():
        return made.forward(batch, pool, layers_done), pool


def assert_same_bits(of: ModelSpec, ops: kernels.Ops, *batches: list[tuple[int, int]]) -> None:
    ops, groups = watched(ops)
    made = transformer(of, ops), transformer(of, replace(ops, fuse=kernels.REFERENCE.fuse))
    for chunks in batches:
        batch, num_blocks = batch_of(chunks, of.vocab_size)
        pool = pool_of(of, num_blocks)
        results = [computed(each, batch, pool) for each in made]
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert groups == [range(of.num_layers)] * len(batches), "it was not the layers at once that computed"


def fuses(of: ModelSpec, ops: kernels.Ops, chunks: list[tuple[int, int]]) -> bool:
    ops, groups = watched(ops)
    batch, num_blocks = batch_of(chunks, of.vocab_size)
    computed(transformer(of, ops), batch, pool_of(of, num_blocks))
    return bool(groups)


@pytest.mark.parametrize("of", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_layers_at_once_are_the_operations_in_turn(isa, of, dtype):
    of = spec(**{name: getattr(of, name) for name in of.__struct_fields__} | {"dtype": dtype})
    assert_same_bits(of, ops_of(isa), *CHUNKS.values())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_however_many_threads(isa, threads):
    given = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same_bits(SPECS["head norms"], ops_of(isa), CHUNKS["a prompt's chunk beside decodes"])
    finally:
        torch.set_num_threads(given)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_int8_weights(isa, dtype):
    of = spec(dtype=dtype, qkv_bias=True, vocab_size=130)
    ops = ops_of(isa, "int8")
    if dtype == "float32" or isa >= Isa.AVX512_BF16:
        assert_same_bits(of, ops, *CHUNKS.values())
    else:
        assert not fuses(of, ops, SEVERAL), "its rows are multiplied as float32, which the layers at once do not"


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "float16"}, {"intermediate_size": 96}, {"hidden_size": 100}, {"head_dim": 34}],
    ids=str,
)
def test_what_does_not_fit_is_computed_one_by_one(isa, changes):
    assert not fuses(spec(**changes), ops_of(isa), SEVERAL)


def test_more_tokens_are_computed_one_by_one(isa):
    assert not fuses(SHAPE, ops_of(isa), [(1, 1)] * (MAX_ROWS + 1))
    assert not fuses(SHAPE, ops_of(isa), [*SEVERAL, (MAX_ROWS, MAX_ROWS)])


@pytest.mark.parametrize("chunk", [(300, 17), (300, 1)], ids=["a chunk", "a decode"])
def test_who_waits_for_layers_of_a_chunk_hears_of_each_group_as_it_is_computed(isa, chunk):
    ops, groups = watched(ops_of(isa))
    made, (batch, num_blocks) = transformer(SHAPE, ops), batch_of([*SEVERAL, chunk], SHAPE.vocab_size)
    made.layer_group, pool = 2, pool_of(SHAPE, num_blocks)
    at_once = computed(made, batch, pool)
    groups.clear()
    reported: list[range] = []
    in_groups = computed(made, batch, pool, lambda layers: reported.append(layers) or groups.append(layers))
    expected = [range(3)] if chunk[1] == 1 else [range(2), range(2, 3)]
    assert reported == expected and groups == [group for one in expected for group in (one, one)]
    assert all(torch.equal(*pair) for pair in zip(at_once, in_groups, strict=True))
