"""The file of API keys: who may use a router, and how much of it. Read by the router, written by hand.

It holds hashes, not keys. A plain SHA-256 is enough for a key that `new_key` drew: 256 random bits cannot be guessed, so there
is nothing that a slow hash would slow down. It would not do for a password, which is why shorter keys are refused.
"""

import hashlib
import re
import secrets
from collections import Counter
from pathlib import Path
from typing import Annotated

import msgspec

from disaggd.errors import ConfigError
from disaggd.toml_file import convert, naming, parse_toml, read_text

PREFIX = "sk-disaggd-"
MIN_KEY_CHARS = 32
_SCHEME = "sha256:"

Positive = Annotated[int, msgspec.Meta(ge=1)]
KeyName = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.@-]{0,62}$",
        description='up to 63 ASCII letters, digits, "_", ".", "@" and "-", the first a letter or a digit',
    ),
]
KeyHash = Annotated[str, msgspec.Meta(pattern=r"^sha256:[0-9a-f]{64}$", description='"sha256:" and 64 hexadecimal digits')]


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """`[[key]]`: one client, and what it may do."""

    name: KeyName
    """In metrics, receipts and logs."""
    hash: KeyHash
    max_requests: Positive | None = None
    """Sequences in flight at once; one more is refused with 429."""
    tokens_per_minute: Positive | None = None
    """Prompt and output tokens; a minute's worth may be used at once."""
    own_cache: bool = False
    """Its cached prefixes are nobody else's: no other key learns from response times what it asked."""
    may_override: bool = False
    """It may say where its prompts are prefilled (`x-disaggd-policy`)."""
    admin: bool = False
    """It may see the cluster, the metrics and everybody's receipts."""

    @property
    def digest(self) -> bytes:
        return bytes.fromhex(self.hash.removeprefix(_SCHEME))


class _KeyTables(msgspec.Struct, frozen=True):
    keys: tuple[ApiKey, ...] = msgspec.field(name="key", default=())


def new_key() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def key_table(name: str, key: str) -> str:
    """What is to be added to the file for `key`. Raises ConfigError for a bad name."""
    hashed = f"{_SCHEME}{digest_of(key).hex()}"
    convert({"key": [{"name": name, "hash": hashed}]}, _KeyTables)  # of a quotation mark TOML would say something else
    text = f'[[key]]\nname = "{name}"\nhash = "{hashed}"\n'
    parse_keys(text)
    return text


def parse_keys(text: str) -> tuple[ApiKey, ...]:
    """Raises ConfigError."""
    keys = convert(parse_toml(text), _KeyTables).keys
    for field in ("name", "hash"):
        value, times = Counter(getattr(key, field) for key in keys).most_common(1)[0] if keys else ("", 0)
        if times > 1:
            raise ConfigError(f"{times} keys have the {field} {value!r}")
    return keys


def read_key(path: Path) -> str:
    """The key that a client keeps in a file of its own. Raises ConfigError."""
    with naming(path):
        key = read_text(path).strip()
        if not re.fullmatch(r"[!-~]+", key):
            raise ConfigError("holds no API key, which is one line of ASCII")
        return key


class KeyFile:
    """The file at one path, which may change while the router runs."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._read: tuple[int, ...] | None = None
        """What it was when it was read last, well or not."""
        self._looked_at: tuple[int, ...] | None = None

    def read(self) -> tuple[ApiKey, ...]:
        """Raises ConfigError, which names the file."""
        with naming(f"router.api_keys: {self._path}"):
            self._read = self._stamp()
            return parse_keys(read_text(self._path, only_regular=True))  # on the event loop

    def has_changed(self) -> bool:
        """Since it was read, but not since it was looked at last: nobody is about to write the rest of it."""
        looked_at, self._looked_at = self._looked_at, self._stamp()
        return self._looked_at == looked_at != self._read

    def _stamp(self) -> tuple[int, ...] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino
