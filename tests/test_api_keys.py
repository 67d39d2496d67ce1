"""The file of API keys: what it may hold, how a mistake is named, and when it is read again."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from disaggd.api_keys import MIN_KEY_CHARS, KeyFile, digest_of, key_table, new_key, parse_keys, read_key
from disaggd.errors import ConfigError

HASH = "sha256:" + "0" * 64


def test_a_new_key_is_long_and_let_in_by_its_table() -> None:
    key, other = new_key(), new_key()
    assert key != other
    assert len(key) >= MIN_KEY_CHARS
    (parsed,) = parse_keys(key_table("alice", key))
    assert (parsed.name, parsed.digest) == ("alice", digest_of(key))
    assert (parsed.max_requests, parsed.tokens_per_minute, parsed.may_override, parsed.admin) == (None, None, False, False)
    assert key not in key_table("alice", key)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[key]\n", "not valid TOML"),
        (f"x = {5000 * '1'}\n", "not valid TOML"),
        (f"x = {5000 * '['}\n", "not valid TOML"),
        ("[[keys]]\n", "keys: unknown key (key?)"),
        (f'[[key]]\nname = "a"\nhash = "{HASH}"\nadmim = true\n', "key[0] (a).admim: unknown key (admin?)"),
        ('[[key]]\nname = "a"\n', "key[0]: table missing required field hash"),
        ('[[key]]\nname = "a"\nhash = "hunter2"\n', 'key[0] (a).hash: expected "sha256:" and 64 hexadecimal digits'),
        (f'[[key]]\nname = "a b"\nhash = "{HASH}"\n', "key[0] (a b).name: expected up to 63 ASCII letters"),
        (f'[[key]]\nname = "a"\nhash = "{HASH}"\nmax_requests = 0\n', "key[0] (a).max_requests: expected int >= 1"),
        (f'[[key]]\nname = "a"\nhash = "{HASH}"\n' * 2, "2 keys have the name 'a'"),
        (f'[[key]]\nname = "a"\nhash = "{HASH}"\n[[key]]\nname = "b"\nhash = "{HASH}"\n', "2 keys have the hash"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_shows_no_secret(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_keys(text)
    assert str(caught.value).startswith(message) or str(caught.value).startswith(message.replace("key[0]:", "key[0] (a):"))
    assert "hunter2" not in str(caught.value)


def test_a_file_without_keys_lets_nobody_in_and_is_no_mistake() -> None:
    assert parse_keys("") == ()


def test_the_file_is_read_again_when_it_changes_and_only_then(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    file = KeyFile(str(path))
    with pytest.raises(ConfigError, match=r"router\.api_keys: .*keys\.toml: no such file"):
        file.read()
    assert not file.has_changed()
    path.write_text(key_table("alice", new_key()))
    assert [file.has_changed() for _ in range(3)] == [False, True, True]
    assert [key.name for key in file.read()] == ["alice"]
    assert not file.has_changed()
    os.utime(path, (1, 1))
    assert not file.has_changed()
    path.write_text("[[key")
    assert [file.has_changed() for _ in range(2)] == [False, True], "once nobody writes any more"
    with pytest.raises(ConfigError, match=r"keys\.toml: not valid TOML"):
        file.read()
    assert not file.has_changed(), "a broken file is complained of once"


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["a FIFO", "a directory"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(path := tmp_path / "keys.toml")
    with pytest.raises(ConfigError, match=r"keys\.toml: "):
        KeyFile(str(path)).read()


def test_a_client_reads_its_key_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("sk-disaggd-abc\n")
    assert read_key(path) == "sk-disaggd-abc"
    path.write_text("two lines\nof text")
    with pytest.raises(ConfigError, match="holds no API key"):
        read_key(path)
