"""Deltas of text against `Tokenizer.decode` of everything at once, for both families of tokenizers."""

import json
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from disaggd.errors import ModelError
from disaggd.gateway.detokenizer import Detokenizer
from disaggd.gateway.pieces import Pieces, read_pieces

CORPUS = ["def f(x):\n    return x * 2  # naïve", "größer, schöner: 😀 grins 日本語 text", "the quick brown fox", "    indented <tag>"] * 4


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think über all>", normalized=False)])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Llama 2's shape: spaces are `▁`, unknown characters fall back to bytes, texts begin with a space."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁the", "▁", "the", "▁▁", "fox", "▁fox", "é", "a", "b", "q"]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *bytes_, *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = sentencepiece()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


BACKINGS = {"byte_level": byte_level(), "sentencepiece": sentencepiece(), "metaspace": metaspace()}


def pieces_of(backing: Tokenizer, vocab_size: int = 1000) -> Pieces:
    return read_pieces(backing, json.loads(backing.to_str())["decoder"], vocab_size)


PIECES = {name: pieces_of(backing) for name, backing in BACKINGS.items()}


def stream(pieces: Pieces, prompt: Sequence[int], output: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(pieces, prompt)
    return [*(detokenizer.feed((token,)) for token in output), detokenizer.flush()]


def continuation(backing: Tokenizer, prompt: Sequence[int], output: Sequence[int]) -> str:
    before = backing.decode(list(prompt))
    return backing.decode([*prompt, *output])[len(before) :]


@given(text=st.text(max_size=60))
@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_any_text_comes_back_in_whole_characters(name: str, text: str) -> None:
    backing = BACKINGS[name]
    output = backing.encode(text, add_special_tokens=False).ids
    deltas = stream(PIECES[name], [], output)
    assert "".join(deltas) == backing.decode(output)
    if "\ufffd" not in text and backing.decode(output) == text:
        assert "\ufffd" not in "".join(deltas)


@given(output=st.lists(st.integers(0, 500), max_size=40))
def test_random_byte_level_tokens_equal_decode_even_where_they_are_no_utf8(output: list[int]) -> None:
    deltas = stream(PIECES["byte_level"], [], output)
    assert "".join(deltas) == BACKINGS["byte_level"].decode(output)


SOME_TOKENS = st.sampled_from([0, 1, 2, *(3 + byte for byte in b"A \n"), 3 + 0xC3, 3 + 0xA9, *range(259, 269), 290])
"""Specials, bytes, two halves of `é`, words, an unknown id."""


@given(prompt=st.lists(SOME_TOKENS, max_size=3), output=st.lists(SOME_TOKENS, max_size=20))
@pytest.mark.parametrize("name", ["sentencepiece", "metaspace"])
def test_random_sentencepiece_tokens_continue_the_prompt(name: str, prompt: list[int], output: list[int]) -> None:
    expected = continuation(BACKINGS[name], prompt, output)
    whole = BACKINGS[name].decode([*prompt, *output])
    if "\ufffd" not in whole and BACKINGS[name].decode(prompt) + expected == whole:
        assert "".join(stream(PIECES[name], prompt, output)) == expected


@given(cuts=st.lists(st.integers(0, 60), max_size=8))
def test_text_does_not_depend_on_how_tokens_are_grouped(cuts: list[int]) -> None:
    output = BACKINGS["byte_level"].encode("größer 日本語 😀 f(x)" * 3).ids
    edges = sorted({0, len(output), *(cut for cut in cuts if cut < len(output))})
    detokenizer = Detokenizer(PIECES["byte_level"], [])
    text = "".join(detokenizer.feed(output[a:b]) for a, b in pairwise(edges)) + detokenizer.flush()
    assert text == BACKINGS["byte_level"].decode(output)


def test_a_character_of_four_tokens_comes_with_the_last() -> None:
    backing = BACKINGS["byte_level"]
    output = [backing.token_to_id(char) for char in ("ð", "Ł", "ĺ", "Ģ")]  # F0 9F 98 80
    assert stream(PIECES["byte_level"], [], output) == ["", "", "", "😀", ""]


def test_an_open_character_becomes_a_replacement_only_at_the_end() -> None:
    backing = BACKINGS["byte_level"]
    output = [backing.token_to_id(char) for char in ("ð", "Ł")]
    assert stream(PIECES["byte_level"], [], output) == ["", "", "\ufffd"]


def test_special_and_unknown_tokens_are_silent() -> None:
    backing, pieces = BACKINGS["byte_level"], PIECES["byte_level"]
    assert stream(pieces, [], [backing.token_to_id("<eos>"), 999]) == ["", "", ""]


def test_a_special_token_does_not_break_a_character() -> None:
    backing, pieces = BACKINGS["byte_level"], PIECES["byte_level"]
    output = [backing.token_to_id(token) for token in ("Ã", "<eos>", "©")]
    assert "".join(stream(pieces, [], output)) == "é"


def test_sentencepiece_keeps_the_space_after_a_prompt_and_drops_it_at_the_start() -> None:
    backing, pieces = BACKINGS["sentencepiece"], PIECES["sentencepiece"]
    the, fox, bos = (backing.token_to_id(token) for token in ("▁the", "▁fox", "<s>"))
    assert stream(pieces, [bos, the], [fox])[0] == " fox"
    assert stream(pieces, [bos], [the, fox])[:2] == ["the", " fox"]


def test_an_unknown_decoder_is_refused_by_name() -> None:
    backing = byte_level()
    backing.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match="WordPiece"):
        pieces_of(backing)
