"""Token ids → text, a token at a time, never half a character. One Detokenizer belongs to one sequence.

The text is what `Tokenizer.decode(prompt + output)` adds to `Tokenizer.decode(prompt)`, special tokens skipped. (Where the
bytes are no UTF-8: byte-level tokenizers agree to the last U+FFFD; after sentencepiece's byte fallback `tokenizers` would turn
the whole run of byte tokens into U+FFFD, valid characters already shown included, and we only what is invalid.)
"""

from codecs import utf_8_decode
from collections.abc import Sequence

from disaggd.gateway.pieces import Pieces


class Detokenizer:
    """Holds at most the three bytes of a character that has begun."""

    __slots__ = ("_lead", "_pending", "_table")

    def __init__(self, pieces: Pieces, prompt: Sequence[int]) -> None:
        self._table = pieces.table
        self._pending = b""
        self._lead = pieces.lead if pieces.lead != "keep" and pieces.is_silent(prompt) else None

    def feed(self, tokens: Sequence[int]) -> str:
        """The whole characters that these tokens complete; "" while one is still open."""
        return "".join([self._feed_one(token) for token in tokens])

    def flush(self) -> str:
        """Nothing more comes: U+FFFD for a character that was never completed, else ""."""
        text, self._pending = self._pending.decode("utf-8", "replace"), b""
        return text

    def _feed_one(self, token: int) -> str:
        piece = self._table[token]
        if self._lead and piece:
            return self._begin(piece)
        if type(piece) is str and not self._pending:
            return piece
        return self._join(piece.encode() if isinstance(piece, str) else piece)

    def _begin(self, piece: str | bytes) -> str:
        """The first piece of the text, without the space that sentencepiece put before it."""
        lead, self._lead = self._lead, None
        if isinstance(piece, bytes):
            return self._join(piece)
        return piece.replace(" ", "") if lead == "drop_all" else piece.removeprefix(" ")

    def _join(self, raw: bytes) -> str:
        """A stretch of bytes: what is invalid becomes U+FFFD at once, an open character stays pending."""
        raw = self._pending + raw
        text, used = utf_8_decode(raw, "replace", False)
        self._pending = raw[used:]
        return text
