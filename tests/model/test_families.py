"""config.json becomes a ModelSpec; whatever it asks for that we lack is refused by name."""

import json

import pytest

from disaggd.errors import ModelError
from disaggd.model.families import read_spec
from disaggd.model.spec import RopeScaling

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture
def spec(tmp_path):
    def read(model_type="llama", generation=None, dtype=None, **config):
        raw = {key: value for key, value in {"model_type": model_type, **SIZES, **config}.items() if value != "absent"}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return read_spec(tmp_path, dtype)

    return read


@pytest.mark.parametrize("config", ["LlamaConfig", "MistralConfig", "Qwen2Config", "Qwen3Config"])
def test_what_transformers_writes_is_read(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    written = getattr(transformers, config)(**SIZES, rope_theta=5e5, dtype="bfloat16")
    written.save_pretrained(tmp_path)
    spec = read_spec(tmp_path, None)
    assert (spec.num_kv_heads, spec.rope_theta, spec.dtype, spec.tie_word_embeddings) == (2, 5e5, "bfloat16", False)
    assert spec.head_dim == getattr(written, "head_dim", 16)
    assert spec.sliding_window == written.to_dict().get("sliding_window")


def test_families_differ_in_biases_and_norms(spec):
    flags = {
        name: (made.qkv_bias, made.output_bias, made.qk_norm) for name in ("llama", "mistral", "qwen2", "qwen3") for made in [spec(name)]
    }
    nothing = (False, False, False)
    assert flags == {"llama": nothing, "mistral": nothing, "qwen2": (True, False, False), "qwen3": (False, False, True)}
    biased = spec("llama", attention_bias=True, mlp_bias=True)
    assert (biased.qkv_bias, biased.output_bias, biased.mlp_bias) == (True, True, True)
    assert spec("qwen3", attention_bias=True).output_bias


def test_absent_keys_have_the_familys_defaults(spec):
    assert spec("llama", num_key_value_heads="absent").num_kv_heads == 4
    assert spec("mistral", num_key_value_heads="absent", num_attention_heads=16).num_kv_heads == 8
    assert spec("qwen3").head_dim == 128
    assert spec("qwen2").head_dim == 16
    assert spec("mistral").sliding_window == 4096
    assert spec("mistral", sliding_window=None).sliding_window is None
    assert spec("llama").dtype == "float32"
    assert spec("llama", num_key_value_heads=None).num_kv_heads == 4


def test_both_spellings_of_rope(spec):
    old = spec(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3})
    new = spec(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    oldest = spec(rope_theta=5e5, rope_scaling={"type": "llama3", **LLAMA3})
    assert old == new == oldest
    assert (new.rope_theta, new.rope_scaling) == (5e5, RopeScaling(**LLAMA3))
    assert spec(rope_parameters={"rope_type": "default", "rope_theta": 7.0}).rope_theta == 7.0
    assert spec().rope_theta == 10_000.0
    assert spec(rope_theta=9.0, rope_scaling=None).rope_theta == 9.0


def test_both_spellings_of_dtype_and_the_callers(spec, tmp_path):
    assert spec(torch_dtype="float16").dtype == "float16"
    assert spec(dtype="bfloat16").dtype == "bfloat16"
    assert read_spec(tmp_path, "float32").dtype == "float32"


def test_end_of_sequence_tokens_are_merged(spec):
    assert spec(eos_token_id=None, generation={}).eos_token_ids == ()
    assert spec(eos_token_id=2).eos_token_ids == (2,)
    made = spec(eos_token_id=[5, 2], generation={"eos_token_id": [7, 5]}, bos_token_id=1)
    assert (made.eos_token_ids, made.bos_token_id) == ((7, 5, 2), 1)


def test_qwen_windows(spec):
    window = {"use_sliding_window": True, "sliding_window": 30}
    assert spec("qwen2", use_sliding_window=False, sliding_window=30, max_window_layers=0).sliding_window is None
    assert spec("qwen2", **window, max_window_layers=2).sliding_window is None
    assert spec("qwen2", **window, max_window_layers=0).sliding_window == 30
    assert spec("qwen3", **window, layer_types=["sliding_attention"] * 2).sliding_window == 30
    with pytest.raises(ModelError, match="max_window_layers is 1"):
        spec("qwen2", **window, max_window_layers=1)
    with pytest.raises(ModelError, match=r"layer_types is \['full_attention', 'sliding_attention'\]"):
        spec("qwen3", **window, layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(ModelError, match="sliding_window is None"):
        spec("qwen3", layer_types=["sliding_attention"] * 2)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "model_type is 'mixtral'"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": ["llama"]}, "model_type is"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling.rope_type is 'linear'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "rope_parameters.rope_type is 'dynamic'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention is"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_theta": "many"}, "rope_theta"),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"model_type": "llama", "sliding_window": 100}, "sliding_window is 100"),
        ({"model_type": "qwen2", "mlp_bias": True}, "mlp_bias is True"),
        ({"auto_map": {"AutoModelForCausalLM": "custom.Model"}}, "auto_map is"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is True"),
        ({"torch_dtype": "float64"}, "float64"),
        ({"vocab_size": "100"}, "vocab_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_hidden_layers": "absent"}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"head_dim": 15}, "head_dim 15"),
        ({"generation": {"eos_token_id": "two"}}, "generation_config.json: eos_token_id"),
    ],
)
def test_what_we_lack_is_refused_by_name(spec, tmp_path, config, named):
    with pytest.raises(ModelError) as refused:
        spec(**config)
    assert named in str(refused.value)
    assert str(tmp_path) in str(refused.value)


def test_keys_that_ask_for_nothing_are_ignored(spec):
    assert spec(quantization_config=None, is_encoder_decoder=False, sliding_window=None, _name_or_path="x", use_cache=True, pad_token_id=0)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"model_type": "llama"'])
def test_a_config_that_is_no_object(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_spec(tmp_path, None)
