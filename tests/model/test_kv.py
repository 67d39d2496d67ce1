"""The pool has the layout's shape and is there when it is promised."""

import pytest
import torch

from disaggd.errors import ResourceError
from disaggd.model.kv import allocate_kv
from disaggd.model.spec import ModelSpec
from disaggd.transfer.layout import kv_spec

SPEC = ModelSpec(
    family="llama",
    vocab_size=10,
    hidden_size=64,
    intermediate_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=128,
    tie_word_embeddings=True,
    dtype="bfloat16",
)


def test_pool_has_the_layouts_shape_and_bytes():
    layout = kv_spec(SPEC, 8)
    kv = allocate_kv(layout, 5, torch.device("cpu"))
    assert (kv.shape, kv.dtype, kv.is_contiguous()) == ((3, 5, 2, 2, 8, 16), torch.bfloat16, True)
    assert kv.nbytes == 5 * layout.bytes_per_block
    assert not kv.any()


def test_pool_larger_than_memory_is_refused():
    with pytest.raises(ResourceError, match="no memory for a KV pool of"):
        allocate_kv(kv_spec(SPEC, 8), 1 << 45, torch.device("cpu"))
