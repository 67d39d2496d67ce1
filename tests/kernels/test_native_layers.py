"""All layers in one call of the native library, against the operations one after another: the same bits."""

from dataclasses import replace

import pytest
import torch

from disaggd import kernels
from disaggd.kernels import native
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
CONTEXTS = {
    "one": [700],
    "its first token": [1],
    "a whole block, and one more": [16, 17],
    "several": [40, 1, 1030, 513, 300],
    "sixteen": [3 * i + 1 for i in range(16)],
    "as many as go": [i % 50 + 1 for i in range(MAX_ROWS)],
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


def decode_batch(contexts: list[int], vocab_size: int) -> tuple[Batch, int]:
    """The last token of each of several sequences in scattered blocks, and the number of blocks."""
    random = torch.Generator().manual_seed(12)
    needed = [-(-length // BLOCK) for length in contexts]
    free = torch.randperm(sum(needed) + 3, generator=random).tolist()
    tables = [[free.pop() for _ in range(count)] for count in needed]
    positions = [length - 1 for length in contexts]
    slots = [table[at // BLOCK] * BLOCK + at % BLOCK for table, at in zip(tables, positions, strict=True)]
    batch = Batch(
        tokens=torch.randint(vocab_size, (len(contexts),), generator=random),
        positions=torch.tensor(positions),
        slot_mapping=torch.tensor(slots),
        query_start=torch.arange(len(contexts) + 1, dtype=torch.int32),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        block_tables=torch.tensor([table + [0] * (max(needed) - len(table)) for table in tables], dtype=torch.int32),
        logit_rows=torch.arange(len(contexts)),
    )
    return batch, sum(needed) + 3


def pool_of(of: ModelSpec, num_blocks: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(13)
    shape = (of.num_layers, num_blocks, of.num_kv_heads, 2, BLOCK, of.head_dim)
    return torch.randn(shape, generator=random).to(getattr(torch, of.dtype))


def assert_same_bits(of: ModelSpec, ops: kernels.Ops, contexts: list[int]) -> None:
    fused, plain = transformer(of, ops), transformer(of, replace(ops, fuse=kernels.REFERENCE.fuse))
    batch, num_blocks = decode_batch(contexts, of.vocab_size)
    pools = [pool_of(of, num_blocks) for _ in range(2)]
    with torch.inference_mode():
        logits = [made.forward(batch, pool) for made, pool in zip((fused, plain), pools, strict=True)]
    assert calls_of(fused, batch, pools[0].clone()) == 1, "it was not the layers at once that computed"
    assert torch.equal(*logits) and torch.equal(*pools)


def calls_of(made: Transformer, batch: Batch, pool: torch.Tensor) -> int:
    """How often the layers report: once, if they are one operation."""
    made.layer_group = 1
    reported: list[range] = []
    with torch.inference_mode():
        made.forward(batch, pool, reported.append)
    assert [index for group in reported for index in group] == list(range(made.spec.num_layers))
    return len(reported)


def fuses(of: ModelSpec, ops: kernels.Ops) -> bool:
    batch, num_blocks = decode_batch([20], of.vocab_size)
    return calls_of(transformer(of, ops), batch, pool_of(of, num_blocks)) == 1


@pytest.mark.parametrize("of", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_layers_at_once_are_the_operations_in_turn(isa, of, dtype):
    of = spec(**{name: getattr(of, name) for name in of.__struct_fields__} | {"dtype": dtype})
    for contexts in CONTEXTS.values():
        assert_same_bits(of, ops_of(isa), contexts)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_however_many_threads(isa, threads):
    given = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same_bits(SPECS["head norms"], ops_of(isa), CONTEXTS["several"])
    finally:
        torch.set_num_threads(given)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_int8_weights(isa, dtype):
    of = spec(dtype=dtype, qkv_bias=True, vocab_size=130)
    ops = ops_of(isa, "int8")
    if dtype == "float32" or isa >= Isa.AVX512_BF16:
        for contexts in CONTEXTS.values():
            assert_same_bits(of, ops, contexts)
    else:
        assert not fuses(of, ops), "its rows are multiplied as float32, which the layers at once do not"


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "float16"}, {"intermediate_size": 96}, {"hidden_size": 100}, {"head_dim": 34}],
    ids=str,
)
def test_what_does_not_fit_is_computed_one_by_one(isa, changes):
    assert not fuses(spec(**changes), ops_of(isa))


def test_more_rows_and_longer_chunks_are_computed_one_by_one(isa):
    made = transformer(SHAPE, ops_of(isa))
    batch, num_blocks = decode_batch([1] * (MAX_ROWS + 1), SHAPE.vocab_size)
    assert calls_of(made, batch, pool_of(SHAPE, num_blocks)) == SHAPE.num_layers
    two_of_one = replace(
        decode_batch([2], SHAPE.vocab_size)[0],
        tokens=torch.tensor([1, 2]),
        positions=torch.tensor([0, 1]),
        slot_mapping=torch.tensor([0, 1]),
        query_start=torch.tensor([0, 2], dtype=torch.int32),
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
    )
    assert calls_of(made, two_of_one, pool_of(SHAPE, 1)) == SHAPE.num_layers
