"""What `builtin:tiny` reads: the sources of Python's standard library, chats made of them, and the tokenizer trained on them.

Knows nothing of models. The files are those of the running Python, so another version of Python gives another corpus.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

Tokens = npt.NDArray[np.int64]

STDLIB = Path(sysconfig.get_paths()["stdlib"])

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, IM_START, IM_END]  # the trainer numbers them from 0 in this order
END_OF_TEXT_ID, IM_END_ID = SPECIAL_TOKENS.index(END_OF_TEXT), SPECIAL_TOKENS.index(IM_END)
VOCAB_SIZE = 4096

# Tests, data tables, text that is not code, and files that the build writes with paths of the machine in them.
SKIPPED_DIRS = {"test", "tests", "idlelib", "turtledemo", "lib2to3", "pydoc_data", "encodings", "site-packages", "__pycache__"}
SKIPPED_BUILD_DIR = re.compile(r"config-.*")
SKIPPED_NAMES = re.compile(r"_sysconfigdata.*|__phello__.*|turtle\.py|_pyrepl.*")

# A file with any such line is left out unless that same line names the PSF: rather lose a file than ship a foreign notice.
NOTICE = re.compile(
    r"copyright|licen[sc]e|permission (is|to use|notice)|(with|by) permission|permission from|redistribut|public domain|spdx"
    r"|\(c\)\s*(19|20)\d\d|©|\bGPL|without warranty|no warranty",
    re.IGNORECASE,
)
PSF = re.compile(r"Python Software Foundation|\bPSFL?\b")
HELD_OUT_ONE_IN = 25  # files, chosen by a hash of their path
MAX_ANSWER_CHARS = 1500  # longer functions make no chat


@dataclass(frozen=True, slots=True)
class SourceFile:
    path: str  # relative to the standard library, with forward slashes
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def held_out(self) -> bool:
        """Whether the file is kept for validation: neither model nor tokenizer trains on it."""
        return int(hashlib.sha256(self.path.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def is_skipped(path: Path) -> bool:
    """Of a path relative to the library."""
    return bool(SKIPPED_DIRS & set(path.parts[:-1]) or SKIPPED_BUILD_DIR.match(path.parts[0]) or SKIPPED_NAMES.fullmatch(path.name))


def carries_foreign_notice(text: str) -> bool:
    return any(NOTICE.search(line) and not PSF.search(line) for line in text.splitlines())


def collect_sources(root: Path) -> list[SourceFile]:
    """The library's own modules, sorted by path, without those that carry another licence than the PSF's."""
    sources = []
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if is_skipped(path):
            continue
        text = file.read_text(encoding="utf-8")
        if text.strip() and not carries_foreign_notice(text):
            sources.append(SourceFile(path.as_posix(), text))
    return sources


def split(sources: list[SourceFile]) -> tuple[list[SourceFile], list[SourceFile]]:
    """The files to train on, and those held out."""
    return [s for s in sources if not s.held_out], [s for s in sources if s.held_out]


# `chat_prompt` in the language of `tokenizer_config.json`, for any roles and any number of turns.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_prompt(question: str) -> str:
    """One user turn, up to where the assistant's text begins."""
    return f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n"


def chat_documents(source: SourceFile) -> Iterator[str]:
    """A question and an answer for each short documented function, so that the chat markers mean something to the model."""
    for node in ast.walk(ast.parse(source.text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring, code = ast.get_docstring(node), ast.get_source_segment(source.text, node)
        if not docstring or not code or len(code) > MAX_ANSWER_CHARS:
            continue
        indent = " " * node.col_offset
        code = "\n".join(line.removeprefix(indent) for line in code.splitlines())
        summary = " ".join(docstring.split("\n\n")[0].split())
        by_name = len(summary) % 4 == 0  # about one question in four, and the same ones in every run
        question = f"Write a Python function `{node.name}`." if by_name else summary
        yield f"{chat_prompt(question)}{code}{IM_END}\n"


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE: any bytes round-trip, and a newline with its indentation is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, document: str) -> Tokens:
    """The document's tokens and the separator. [num_tokens + 1]"""
    return np.array([*tokenizer.encode(document).ids, END_OF_TEXT_ID], dtype=np.int64)
