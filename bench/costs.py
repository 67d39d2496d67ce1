"""What a step must move and multiply at least, from a model's shape: the numerators of "% of roofline". Pure arithmetic."""

from disaggd.model.spec import DTYPE_BYTES, ModelSpec, Weights


def layer_weights(spec: ModelSpec) -> int:
    """Parameters of all layers' projections."""
    attention = spec.hidden_size * spec.head_dim * (2 * spec.num_heads + 2 * spec.num_kv_heads)
    return spec.num_layers * (attention + 3 * spec.hidden_size * spec.intermediate_size)


def head_weights(spec: ModelSpec) -> int:
    return spec.vocab_size * spec.hidden_size


def kv_bytes_per_token(spec: ModelSpec) -> int:
    """Over all layers."""
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * DTYPE_BYTES[spec.dtype]


def weight_bytes(spec: ModelSpec, weights: Weights) -> int:
    """Of all projections and the head; in int8 the scales, 4 bytes for hundreds of weights, are left out."""
    return (layer_weights(spec) + head_weights(spec)) * (1 if weights == "int8" else DTYPE_BYTES[spec.dtype])


def decode_bytes(spec: ModelSpec, weights: Weights, batch: int, context: float) -> float:
    """Read in one decode step: every weight once, and the keys and values of every sequence."""
    return weight_bytes(spec, weights) + batch * context * kv_bytes_per_token(spec)


def prefill_flops(spec: ModelSpec, num_tokens: int) -> float:
    """Of one causal prompt: the projections of all tokens, attention's two products over half the square, one row of logits."""
    attention = 2 * num_tokens**2 * spec.num_heads * spec.head_dim * spec.num_layers
    return 2 * num_tokens * layer_weights(spec) + attention + 2 * head_weights(spec)
