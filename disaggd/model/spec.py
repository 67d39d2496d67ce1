"""What a model is, as plain data. A family is a row of data, not a class. Knows no torch."""

from typing import Literal

import msgspec

from disaggd.errors import ModelError

Dtype = Literal["float32", "bfloat16", "float16"]
Weights = Literal["auto", "int8"]
"""How the projections' weights are held: as the dtype says, or in 8 bits."""

DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


class RopeScaling(msgspec.Struct, frozen=True, kw_only=True):
    """Llama 3's frequency-dependent RoPE scaling (Hugging Face `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A dense decoder-only transformer: RMSNorm, rotary attention with grouped KV heads, SwiGLU."""

    family: str
    """Hugging Face `model_type`: llama, mistral, qwen2, qwen3."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    """A bias on attention's output projection (Llama's `attention_bias` puts one on all four)."""
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    """Attend to the last `sliding_window` positions only (Mistral); None attends to all."""
    dtype: Dtype
    """Of the weights and the activations while serving."""
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def check_ranks(self, num_ranks: int) -> None:
        """Raises ModelError where a rank would have nothing to do."""
        if num_ranks > self.num_heads:
            raise ModelError(f"tp = {num_ranks}: the model has {self.num_heads} heads, too few for so many ranks; at most {self.num_heads}")
