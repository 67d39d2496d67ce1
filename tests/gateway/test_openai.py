"""Request bodies: what each field becomes, and that every refusal names its field."""

from typing import Any

import pytest

from disaggd.errors import InvalidRequest, ModelNotFound
from disaggd.gateway.limits import GatewayLimits
from disaggd.gateway.openai import Chat, Completion, read_chat, read_completion
from disaggd.sampling import SamplingParams

LIMITS = GatewayLimits(max_prompts=3)


def completion(**fields: Any) -> Completion:
    return read_completion({"prompt": "x", **fields}, "tiny", 100, LIMITS)


def chat(**fields: Any) -> Chat:
    return read_chat({"messages": [{"role": "user", "content": "x"}], **fields}, "tiny", 100)


def test_a_bare_prompt_has_openais_defaults() -> None:
    asked = completion()
    assert asked.prompts == ["x"]
    assert asked.options.sampling == SamplingParams()
    assert (asked.options.max_tokens, asked.options.default_max_tokens) == (None, 16)
    assert (asked.options.seeded, asked.options.stop, asked.options.stream, asked.add_special_tokens) == (False, (), False, True)


def test_every_sampling_field_reaches_the_sampler() -> None:
    fields = {
        "temperature": 0.5,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": 7,
        "stop_token_ids": [3, 4],
        "ignore_eos": True,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "logit_bias": {"5": -100},
        "logprobs": 2,
    }
    expected = {**fields, "stop_token_ids": (3, 4), "logit_bias": {5: -100.0}, "top_logprobs": 2}
    del expected["logprobs"]
    assert completion(**fields).options.sampling == SamplingParams(**expected)
    assert completion(seed=0).options.seeded


def test_salt_and_priority_are_the_requests_own() -> None:
    for options in (completion(cache_salt="tenant é", priority=-100).options, chat(cache_salt="tenant é", priority=-100).options):
        assert (options.cache_salt, options.priority) == ("tenant é", -100)
    assert (completion().options.cache_salt, completion().options.priority) == ("", 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("cache_salt", value) for value in (7, ["x"], {"x": 1}, True, "x" * 129)),
        *(("priority", value) for value in ("1", 1.0, True, [1], 101, -101, 10**30)),
    ],
)
def test_a_salt_or_priority_of_a_wrong_type_or_range_is_refused(field: str, value: object) -> None:
    for read in (completion, chat):
        with pytest.raises(InvalidRequest) as refused:
            read(**{field: value})
        assert refused.value.param == field


@pytest.mark.parametrize(("given", "seed"), [(-1, 2**64 - 1), (2**64 - 1, 2**64 - 1), (-(2**63), 2**63)])
def test_a_seed_is_64_bits_of_either_sign(given: int, seed: int) -> None:
    assert completion(seed=given).options.sampling.seed == seed


def test_null_is_the_default() -> None:
    names = [
        "max_tokens",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "logprobs",
        "logit_bias",
        "n",
        "echo",
        "suffix",
        "user",
        "best_of",
    ]
    assert completion(**dict.fromkeys(names)) == completion()


def test_fields_at_a_harmless_value_are_accepted() -> None:
    harmless = {
        "n": 1,
        "best_of": 1,
        "echo": False,
        "suffix": "",
        "user": "me",
        "metadata": {"a": "b"},
        "response_format": {"type": "text"},
    }
    assert completion(**harmless) == completion()
    harmless = {"n": 1, "tools": [], "tool_choice": "auto", "parallel_tool_calls": False, "store": True, "modalities": ["text"]}
    assert chat(**harmless) == chat()


BAD_IN_BOTH: list[tuple[str, object]] = [
    *(("temperature", value) for value in (-0.1, 2.1, "1", True, [1], 10**400)),
    *(("top_p", value) for value in (0, 1.1, -1, "x")),
    *(("top_k", value) for value in (-2, 1.5, "x", 2**31)),
    *(("min_p", value) for value in (-0.1, 1.1)),
    *(("max_tokens", value) for value in (0, -1, 1.0, "16", True, 2**31)),
    *(("max_completion_tokens", value) for value in (0, -1)),
    *(("seed", value) for value in (1.5, 2**64, -(2**63) - 1, "x", True)),
    *(("stop", value) for value in ("", [""], 1, [1], ["x"] * 17, {"a": 1}, "x" * 1025)),
    *(("stop_token_ids", value) for value in ([100], [-1], ["1"], [True], 5, [1] * 129)),
    *(("ignore_eos", value) for value in (1, "true")),
    *(("presence_penalty", value) for value in (-2.1, 2.1)),
    *(("frequency_penalty", value) for value in (-2.1, 2.1)),
    *(("repetition_penalty", value) for value in (0, -1, 101)),
    *(
        ("logit_bias", value)
        for value in ({"100": 1}, {"-1": 1}, {"x": 1}, {"1": 101}, {"1": "x"}, {"1": None}, [1], {"²": 1}, {"9" * 5000: 1})
    ),
    *(("stream", value) for value in (1, "true")),
    *(("model", value) for value in (1, ["tiny"])),
    *(("n", value) for value in (2, 0, "1", True)),
    ("min_tokens", 5),
    ("response_format", {"type": "json_object"}),
    ("use_beam_search", True),
    ("truncate_prompt_tokens", 5),
    ("stream_options", {"include_usage": True}),
]


@pytest.mark.parametrize(("field", "value"), BAD_IN_BOTH)
@pytest.mark.parametrize("read", [completion, chat])
def test_a_bad_value_is_refused_by_name(read: Any, field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read(**{field: value})
    assert refused.value.param == field
    assert field in refused.value.message
    assert len(refused.value.message) < 300


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 2),
        ("echo", True),
        ("suffix", "tail"),
        ("logprobs", 21),
        ("logprobs", True),
        ("logprobs", -1),
        ("add_special_tokens", "no"),
        *(("prompt", value) for value in (None, "", [], [[]], ["a", ""], ["a", [1]], [1, "a"], [[1], "a"], [1.5], [True], 5, {}, [None])),
        *(("prompt", value) for value in ([100], [-1], [[1], [100]], ["a"] * 4, [2**70])),
    ],
)
def test_a_bad_completion_field_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        completion(**{field: value})
    assert refused.value.param == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("logprobs", 5),
        ("top_logprobs", 5),
        ("modalities", ["text", "audio"]),
        ("reasoning_effort", "high"),
        ("continue_final_message", True),
        ("chat_template", "{{ messages }}"),
        ("chat_template_kwargs", [1]),
        ("messages", None),
        ("messages", []),
        ("messages", "hi"),
    ],
)
def test_a_bad_chat_field_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        chat(**{field: value})
    assert refused.value.param == field


def test_what_is_no_list_is_told_of_what_and_how_long_one_may_be() -> None:
    with pytest.raises(InvalidRequest, match="messages: must be a list of at most 4096 messages"):
        chat(messages="hi")


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("hi", "messages[1]"),
        ({"content": "x"}, "messages[1].role"),
        ({"role": "tool", "content": "x"}, "messages[1].role"),
        ({"role": ["user"], "content": "x"}, "messages[1].role"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "user", "content": None}, "messages[1].content"),
        ({"role": "user", "content": []}, "messages[1].content"),
        ({"role": "user", "content": ["x"]}, "messages[1].content[0]"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[1].content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0].text"),
        ({"role": "user", "content": "x", "contents": "y"}, "messages[1].contents"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages[1].tool_calls"),
        ({"role": "user", "content": "x", "name": 5}, "messages[1].name"),
    ],
)
def test_a_bad_message_is_refused_by_its_path(message: object, param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        chat(messages=[{"role": "user", "content": "x"}, message])
    assert refused.value.param == param


@pytest.mark.parametrize(("typo", "nearest"), [("temprature", "temperature"), ("max_token", "max_tokens"), ("promt", "prompt")])
def test_an_unknown_field_is_refused_with_the_nearest_one(typo: str, nearest: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"{typo}: unknown field \({nearest}\?\)") as refused:
        completion(**{typo: 1})
    assert refused.value.param == typo


def test_an_unknown_stream_option_is_refused_by_its_path() -> None:
    with pytest.raises(InvalidRequest) as refused:
        completion(stream=True, stream_options={"include_usages": True})
    assert refused.value.param == "stream_options.include_usages"


def test_another_model_is_not_found() -> None:
    with pytest.raises(ModelNotFound, match="serves 'tiny'"):
        completion(model="huge")


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ([0], [[0]]), ([99], [[99]])],
)
def test_a_prompt_is_text_or_ids_or_a_list_of_either(prompt: object, prompts: object) -> None:
    assert completion(prompt=prompt).prompts == prompts


def test_max_completion_tokens_is_max_tokens_by_its_newer_name() -> None:
    assert chat(max_completion_tokens=5).options.max_tokens == 5
    assert chat(max_completion_tokens=5, max_tokens=5).options.max_tokens == 5
    with pytest.raises(InvalidRequest, match="max_completion_tokens is 5"):
        chat(max_completion_tokens=5, max_tokens=6)


def test_stop_is_a_string_or_a_list() -> None:
    assert completion(stop="a").options.stop == ("a",)
    assert completion(stop=["a", "b"]).options.stop == ("a", "b")


def test_top_k_of_minus_one_keeps_all() -> None:
    assert completion(top_k=-1).options.sampling.top_k == 0


def test_chat_logprobs_are_counted_by_top_logprobs() -> None:
    assert chat().options.sampling.top_logprobs is None
    assert chat(logprobs=True).options.sampling.top_logprobs == 0
    assert chat(logprobs=True, top_logprobs=3).options.sampling.top_logprobs == 3


def test_text_parts_are_joined_and_developers_speak_as_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = chat(messages=[{"role": "developer", "content": parts}, {"role": "user", "content": "x", "name": "me"}])
    assert asked.messages == [{"role": "system", "content": "a\nb"}, {"role": "user", "content": "x", "name": "me"}]


def test_template_variables_may_not_replace_the_servers_own() -> None:
    assert chat(chat_template_kwargs={"enable_thinking": False}).template_variables == {"enable_thinking": False}
    with pytest.raises(InvalidRequest) as refused:
        chat(chat_template_kwargs={"messages": []})
    assert refused.value.param == "chat_template_kwargs.messages"
