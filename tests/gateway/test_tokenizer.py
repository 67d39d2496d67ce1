"""Reading a model directory; Hugging Face's own tokenizer is the reference for ids and chat prompts."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import disaggd.model
from disaggd.errors import ModelError
from disaggd.gateway.tokenizer import read_tokenizer

TEMPLATE = """{{ bos_token }}
{%- for m in messages %}
    <|{{ m.role }}|>{{ m.content }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
CHAT = [{"role": "system", "content": "Sei kurz."}, {"role": "user", "content": "größer? 😀"}]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    backing = Tokenizer(models.BPE())
    backing.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backing.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backing.train_from_iterator(["some text to learn from"] * 4, trainer)
    backing.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backing.enable_truncation(4)
    backing.enable_padding(length=8)
    backing.save(str(tmp_path / "tokenizer.json"))
    configure(tmp_path, chat_template=TEMPLATE)
    return tmp_path


def configure(directory: Path, **config: Any) -> None:
    eos = {"__type": "AddedToken", "content": "</s>", "normalized": False, "special": True}
    full = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": eos, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(full))


@pytest.mark.parametrize(
    "config",
    [{}, {"add_bos_token": False, "add_eos_token": True}],
)
def test_tokens_around_a_text_are_those_of_hugging_face(directory: Path, config: dict[str, bool]) -> None:
    from transformers import AutoTokenizer  # imports torch: 2 s, once

    configure(directory, chat_template=TEMPLATE, **config)
    theirs = AutoTokenizer.from_pretrained(directory)
    ours = read_tokenizer(directory, 300)
    text = "some text, größer 😀 </s> and more"
    for special in (True, False):
        assert ours.encode(text, add_special_tokens=special) == theirs.encode(
            text, add_special_tokens=special, truncation=False, padding=False
        )
    template = ours.chat_template
    assert template is not None
    assert template.render(CHAT, {}) == theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)


def test_the_built_in_model_has_a_tokenizer_and_a_template() -> None:
    tokenizer = read_tokenizer(Path(disaggd.model.__file__).parent / "builtin" / "tiny", 4096)
    tokens = tokenizer.encode("def f(x):\n    return x\n", add_special_tokens=True)
    assert tokenizer.detokenizer([]).feed(tokens) == "def f(x):\n    return x\n"
    assert tokenizer.chat_template is not None


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json"])
def test_a_template_in_a_file_of_its_own_comes_first(directory: Path, file: str) -> None:
    text = "from a file" if file.endswith("jinja") else json.dumps({"chat_template": "from a file"})
    (directory / file).write_text(text)
    template = read_tokenizer(directory, 300).chat_template
    assert template is not None
    assert template.render(CHAT, {}) == "from a file"


def test_the_default_of_several_templates_is_taken(directory: Path) -> None:
    configure(directory, chat_template=[{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}])
    template = read_tokenizer(directory, 300).chat_template
    assert template is not None
    assert template.render(CHAT, {}) == "yes"


def test_without_a_template_there_is_none(directory: Path) -> None:
    (directory / "tokenizer_config.json").unlink()
    assert read_tokenizer(directory, 300).chat_template is None


def test_a_named_token_is_special_even_where_the_file_forgets(directory: Path) -> None:
    configure(directory, pad_token="some")
    tokenizer = read_tokenizer(directory, 300)
    tokens = tokenizer.encode("some", add_special_tokens=False)
    assert len(tokens) == 1
    assert tokenizer.detokenizer([]).feed(tokens) == ""
    assert tokenizer.token_bytes(tokens[0]) == b"some"


def test_ids_beyond_the_tokenizer_say_nothing(directory: Path) -> None:
    tokenizer = read_tokenizer(directory, 400)
    assert tokenizer.detokenizer([]).feed([399]) == ""
    assert tokenizer.token_bytes(399) == b""


@pytest.mark.parametrize("content", [None, "{", '{"model": 5}', "[]"])
def test_a_broken_or_missing_tokenizer_is_named(directory: Path, content: str | None) -> None:
    path = directory / "tokenizer.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        read_tokenizer(directory, 300)
