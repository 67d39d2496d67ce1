"""The model's tokenizer, read from its directory: text → ids, ids → pieces, and the chat template.

Built while the router starts, then used on the asyncio thread; `encode` may run in a worker thread (it releases the GIL).
Uses `tokenizers`, not transformers, which would import torch.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backing

from disaggd.errors import ModelError
from disaggd.gateway.chat import ChatTemplate
from disaggd.gateway.detokenizer import Detokenizer
from disaggd.gateway.pieces import Pieces, read_pieces

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Made by `read_tokenizer`."""

    def __init__(self, backing: Backing, pieces: Pieces, chat_template: ChatTemplate | None) -> None:
        self._backing = backing
        self._pieces = pieces
        self.chat_template = chat_template
        self._longest_piece_bytes = max(len(piece.encode()) for piece in backing.get_vocab(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`; with `add_special_tokens`, between those that tokenizer.json puts around a text.

        Through the batch call, which alone releases the GIL: `encode` in a thread stalled the loop for 14.6 s over 4 MB.
        As in transformers 5, `add_bos_token` in tokenizer_config.json has no say where there is a tokenizer.json.
        """
        return self._backing.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def least_tokens(self, text: str) -> int:
        """No tokenization of `text` is shorter: its bytes over those of the longest piece. Takes microseconds.

        Says 0 where a normalizer may shorten the text first.
        """
        return 0 if self._backing.normalizer is not None else len(text.encode()) // self._longest_piece_bytes

    def detokenizer(self, prompt: Sequence[int]) -> Detokenizer:
        """For the output that follows `prompt`."""
        return Detokenizer(self._pieces, prompt)

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for by itself: a special one for its name, an unknown one for nothing."""
        piece = self._pieces.table[token] or self._backing.id_to_token(token) or ""
        return piece.encode() if isinstance(piece, str) else piece


def read_tokenizer(directory: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a Hugging Face model directory. `vocab_size` is the model's, which may exceed the tokenizer's.

    ModelError names the file that is missing or broken, or what in it is not supported.
    """
    config = _read_json(directory / "tokenizer_config.json", missing={})
    special_tokens = _special_tokens(_read_json(directory / "special_tokens_map.json", missing={}) | config)
    backing = _read_backing(directory / "tokenizer.json")
    decoder = _read_json(directory / "tokenizer.json").get("decoder")
    _mark_special(backing, special_tokens.values())
    source = _chat_template(directory, config)
    template = None if source is None else ChatTemplate(source, special_tokens)
    return Tokenizer(backing, read_pieces(backing, decoder, vocab_size), template)


def _read_json(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    if missing is not None and not path.exists():
        return missing
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: {error}") from error


def _read_backing(path: Path) -> Backing:
    if not path.exists():
        raise ModelError(f"{path}: missing; the router needs a Hugging Face fast tokenizer")
    try:
        backing = Backing.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ModelError(f"{path}: {error}") from error
    backing.no_truncation()
    backing.no_padding()
    return backing


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Named special tokens; each is a string, or an object that holds it as `content`."""
    found = {name: config[name] for name in _SPECIAL_TOKENS if config.get(name)}
    return {name: token["content"] if isinstance(token, dict) else token for name, token in found.items()}


def _mark_special(backing: Backing, names: Iterable[str]) -> None:
    """Hugging Face treats named tokens as special, whatever tokenizer.json says of them."""
    marked = {added.content for added in backing.get_added_tokens_decoder().values() if added.special}
    new = [name for name in dict.fromkeys(names) if name not in marked and backing.token_to_id(name) is not None]
    backing.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in new])


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    """From chat_template.jinja, chat_template.json or tokenizer_config.json; the one called `default` of several."""
    jinja = directory / "chat_template.jinja"
    if jinja.exists():
        return jinja.read_text(encoding="utf-8")
    template = _read_json(directory / "chat_template.json", missing={}).get("chat_template", config.get("chat_template"))
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template
