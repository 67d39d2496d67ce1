"""`config.json` → ModelSpec. A family is a row of data; what a config asks for and no row has is an error that names it. Torch-free.

The families' defaults are Hugging Face's, whose writer leaves out what equals them. Keys of rotary embedding come in two spellings:
`rope_theta` with `rope_scaling`, and transformers 5's `rope_parameters` that holds both.
"""

from pathlib import Path
from typing import Annotated, Any

import msgspec

from disaggd.errors import ModelError
from disaggd.model.spec import Dtype, ModelSpec, RopeScaling

Positive = Annotated[int, msgspec.Meta(ge=1)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """What sets one `model_type` apart."""

    architecture: str
    keys: frozenset[str] = frozenset()
    """Config keys that this family obeys beyond those that all obey."""
    defaults: dict[str, int] = {}
    """Of keys that are absent; a null is not absent."""
    qkv_bias: bool = False
    """Always on; `attention_bias` may turn it on elsewhere."""
    qk_norm: bool = False


_QWEN_WINDOW = frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"})

FAMILIES = {
    "llama": Family(architecture="LlamaForCausalLM", keys=frozenset({"attention_bias", "mlp_bias"})),
    "mistral": Family(
        architecture="MistralForCausalLM",
        keys=frozenset({"sliding_window"}),
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        keys=_QWEN_WINDOW,
        defaults={"num_key_value_heads": 32, "sliding_window": 4096},
        qkv_bias=True,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        keys=_QWEN_WINDOW | {"attention_bias"},
        defaults={"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
        qk_norm=True,
    ),
}


class _Config(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of `config.json` that matter, with the types that they must have."""

    vocab_size: Positive
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    max_position_embeddings: Positive
    num_key_value_heads: Positive | None = None
    head_dim: Positive | None = None
    hidden_act: str = "silu"
    rms_norm_eps: PositiveFloat = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: PositiveFloat | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: Positive | None = None
    use_sliding_window: bool = False
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    architectures: list[str] | None = None
    dtype: Dtype | None = None
    torch_dtype: Dtype | None = None
    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None


_COMMON_KEYS = {"model_type", *_Config.__struct_fields__}.difference(*(family.keys for family in FAMILIES.values()))

# Of training, of generation (the gateway's business) or of bookkeeping: they change nothing in what the model computes.
_IRRELEVANT_KEYS = {
    *("transformers_version", "use_cache", "initializer_range", "attention_dropout", "pretraining_tp", "attn_implementation"),
    *("pad_token_id", "unk_token_id", "sep_token_id", "tokenizer_class", "do_sample", "temperature", "top_k", "top_p", "max_length"),
    *("output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward"),
    *("id2label", "label2id", "problem_type", "task_specific_params", "finetuning_task", "unsloth_version", "unsloth_fixed"),
}


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`. Raises ModelError naming the file."""
    try:
        content = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ModelError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: a JSON object is wanted, this is a {type(content).__name__}")
    return content


def read_spec(root: Path, dtype: Dtype | None) -> ModelSpec:
    """The model that `root`/config.json describes, served in `dtype`; None: in the dtype that the config names, or float32.

    End-of-sequence tokens are those of generation_config.json, then those of config.json. Raises ModelError.
    """
    path = root / "config.json"
    raw = read_json(path)
    family = _family_of(raw, path)
    config = _typed(family.defaults | _obeyed(raw, family, path), path)
    _check_what_we_lack(config, family, path)
    heads = config.num_attention_heads
    kv_heads = heads if config.num_key_value_heads is None else config.num_key_value_heads
    head_dim = config.hidden_size // heads if config.head_dim is None else config.head_dim
    _check_heads(heads, kv_heads, head_dim, path)
    theta, scaling = _rope(config, path)
    return ModelSpec(
        family=raw["model_type"],
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        qkv_bias=family.qkv_bias or config.attention_bias,
        output_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        qk_norm=family.qk_norm,
        sliding_window=_window(config, family, path),
        dtype=dtype or config.dtype or config.torch_dtype or "float32",
        eos_token_ids=_eos_token_ids(config, root),
        bos_token_id=(_ids(config.bos_token_id) or (None,))[0],
    )


def _family_of(raw: dict[str, Any], path: Path) -> Family:
    model_type = raw.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise _lacking(path, "model_type", model_type, f"one of {', '.join(FAMILIES)}")
    return family


def _obeyed(raw: dict[str, Any], family: Family, path: Path) -> dict[str, Any]:
    """The keys that a model of `family` obeys. Any other that asks for something is an error; null, false and empty ask for nothing."""
    known = _COMMON_KEYS | family.keys
    for key, value in raw.items():
        if key not in known | _IRRELEVANT_KEYS and not key.startswith("_") and value not in (None, False, "", [], {}):
            raise _lacking(path, key, value, f"no {key} in a {raw['model_type']} model")
    return {key: value for key, value in raw.items() if key in known}


def _typed(raw: dict[str, Any], path: Path) -> _Config:
    try:
        return msgspec.convert(raw, _Config)
    except msgspec.ValidationError as error:
        raise ModelError(f"{path}: {error}") from error


def _check_what_we_lack(config: _Config, family: Family, path: Path) -> None:
    if config.hidden_act != "silu":
        raise _lacking(path, "hidden_act", config.hidden_act, "silu")
    if config.architectures is not None and config.architectures != [family.architecture]:
        raise _lacking(path, "architectures", config.architectures, family.architecture)


def _check_heads(heads: int, kv_heads: int, head_dim: int, path: Path) -> None:
    if heads % kv_heads:
        raise ModelError(f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if head_dim % 2:
        raise ModelError(f"{path}: head_dim {head_dim} is odd: rotary embedding turns pairs of coordinates")


def _rope(config: _Config, path: Path) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from either spelling."""
    name = "rope_scaling" if config.rope_scaling else "rope_parameters"
    given = {key: value for key, value in (config.rope_scaling or config.rope_parameters or {}).items() if value is not None}
    theta = given.pop("rope_theta", config.rope_theta or 10_000.0)
    old_kind = given.pop("type", "default")
    kind = given.pop("rope_type", old_kind)
    if kind not in ("default", "llama3"):
        raise _lacking(path, f"{name}.rope_type", kind, "default or llama3")
    partial = given.pop("partial_rotary_factor", 1)
    if partial != 1:
        raise _lacking(path, f"{name}.partial_rotary_factor", partial, "rotary embedding of whole heads")
    obeyed = RopeScaling.__struct_fields__ if kind == "llama3" else ()
    for key in given:
        if key not in obeyed:
            raise _lacking(path, f"{name}.{key}", given[key], f"no {key} with rope_type {kind}")
    try:
        return msgspec.convert(theta, PositiveFloat), msgspec.convert(given, RopeScaling) if kind == "llama3" else None
    except msgspec.ValidationError as error:
        raise ModelError(f"{path}: {name}: {error}") from error


def _window(config: _Config, family: Family, path: Path) -> int | None:
    """The sliding window that all layers share; a mixture is an error."""
    if "use_sliding_window" not in family.keys:
        return config.sliding_window
    window = config.sliding_window if config.use_sliding_window else None
    sliding = [
        "full_attention" if window is None or i < config.max_window_layers else "sliding_attention" for i in range(config.num_hidden_layers)
    ]
    kinds = set(sliding if config.layer_types is None else config.layer_types)
    if kinds == {"full_attention"}:
        return None
    if kinds == {"sliding_attention"} and window is not None:
        return window
    if config.layer_types is None:
        raise _lacking(path, "max_window_layers", config.max_window_layers, "full attention or one window in all layers")
    raise _lacking(path, "layer_types", sorted(kinds), f"full attention or one window in all layers (sliding_window is {window})")


def _eos_token_ids(config: _Config, root: Path) -> tuple[int, ...]:
    path = root / "generation_config.json"
    generation = read_json(path).get("eos_token_id") if path.exists() else None
    try:
        first = _ids(msgspec.convert(generation, int | list[int] | None))
    except msgspec.ValidationError as error:
        raise ModelError(f"{path}: eos_token_id: {error}") from error
    return tuple(dict.fromkeys((*first, *_ids(config.eos_token_id))))


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _lacking(path: Path, key: str, value: object, wanted: str) -> ModelError:
    return ModelError(f"{path}: {key} is {value!r}; disaggd serves: {wanted}")
