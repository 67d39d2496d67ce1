"""A TOML file as frozen structs. A mistake in it is a ConfigError that says where it is, what, and what would be valid.

Knows no file of ours: the struct that it is given says what may be in it. A table of an array is named by its index and its `name`.
"""

import difflib
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import msgspec

from disaggd.errors import ConfigError
from disaggd.units import Address, PortRange, Size

Root = TypeVar("Root", bound=msgspec.Struct)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """A ConfigError in the body says which file it is about."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_text(path: Path, *, if_absent: str = "", only_regular: bool = False) -> str:
    """Raises ConfigError, which does not name the file; that of an absent one ends with `if_absent`.

    `only_regular` refuses what is no regular file. A FIFO, for one, would keep the caller waiting for who writes to it.
    """
    try:
        with open(path, encoding="utf-8", opener=_open_regular if only_regular else None) as file:
            return file.read()
    except FileNotFoundError:
        raise ConfigError(f"no such file{if_absent}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}") from error


def _open_regular(path: str, flags: int) -> int:
    opened = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise ConfigError("not a regular file")
    return opened


def parse_toml(text: str) -> dict[str, Any]:
    """Raises ConfigError."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError; a number of 5,000 digits is another
        raise ConfigError(f"not valid TOML: {error}") from error


def convert(raw: dict[str, Any], root: type[Root]) -> Root:
    """`raw` as a `root`. Raises ConfigError."""
    _refuse_unknown_keys(raw, root, "")
    try:
        return msgspec.convert(raw, root, dec_hook=_parse_value)
    except msgspec.ValidationError as error:
        raise ConfigError(_located(str(error), raw, root)) from error


def place(array: str, index: int, table: object) -> str:
    """`node[1] (p0)`: tables are counted by us and named by the user."""
    name = table.get("name") if isinstance(table, dict) else None
    return f"{array}[{index}] ({name})" if isinstance(name, str) else f"{array}[{index}]"


def _parse_value(kind: type, raw: object) -> object:
    if kind in (Size, Address, PortRange):
        return kind.parse(raw)
    raise NotImplementedError(kind)  # msgspec's contract: a type that is not ours to parse


def _located(message: str, raw: dict[str, Any], root: type[msgspec.Struct]) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.node[1].threads`" as "node[1] (p0).threads: expected int, got str"."""
    what, _, where = message.partition(" - at ")
    path = where.strip("`").removeprefix("$").removeprefix(".")
    if not path:
        return _in_words(what)
    if "matching regex" in what:
        what = f"expected {_description(_kind_at(path, root))}"
    elif invalid := re.fullmatch("Invalid enum value '(.*)'", what, re.DOTALL):
        what = f"{invalid[1]!r} is not one of {_choices(invalid[1], get_args(_kind_at(path, root)))}"
    return f"{_with_names(path, raw)}: {_in_words(what)}"


def _in_words(what: str) -> str:
    return (what[:1].lower() + what[1:]).replace("`", "").replace("object", "table")


def _kind_at(path: str, root: type[msgspec.Struct]) -> Any:
    """The annotation of the key at `path`, such as `node[1].role`."""
    kind: Any = root
    for part in path.split("."):
        key, bracket, _ = part.partition("[")
        kind = next(field.type for field in msgspec.structs.fields(kind) if field.encode_name == key)
        kind = get_args(kind)[0] if bracket else kind
    return kind


def _description(kind: Any) -> str:
    """What `Annotated[str, Meta(description=…)]`, or None, wants."""
    annotated = next(one for one in (kind, *get_args(kind)) if hasattr(one, "__metadata__"))
    return str(annotated.__metadata__[0].description)


def _choices(value: str, valid: Iterable[str]) -> str:
    """The valid values, the nearest of them marked."""
    valid = list(valid)
    nearest = difflib.get_close_matches(value, valid, n=1)
    return ", ".join(valid) + (f" ({nearest[0]}?)" if nearest else "")


def _with_names(path: str, raw: dict[str, Any]) -> str:
    return re.sub(r"^(\w+)\[(\d+)\]", lambda match: place(match[1], int(match[2]), raw[match[1]][int(match[2])]), path)


def _refuse_unknown_keys(raw: object, table: type[msgspec.Struct], path: str) -> None:
    """Walks the tables that `raw` has against those that it may have; wrong types are left to the conversion."""
    if not isinstance(raw, dict):
        return
    known = {field.encode_name: field.type for field in msgspec.structs.fields(table)}
    for key, value in raw.items():
        where = f"{path}.{key}" if path else key
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(f"{where}: unknown key ({nearest[0]}?)" if nearest else f"{where}: unknown key (known: {', '.join(known)})")
        _descend(value, known[key], where)


def _descend(value: object, kind: Any, where: str) -> None:
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        _refuse_unknown_keys(value, kind, where)
    elif get_origin(kind) is tuple and isinstance(value, list):
        for index, item in enumerate(value):
            _descend(item, get_args(kind)[0], place(where, index, item))
