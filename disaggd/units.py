"""Values that the TOML file writes as one word: sizes, addresses, ranges of ports.

Each is parsed by its `parse`, which raises ValueError saying what was expected. Knows nothing of what the file says with them.
"""

import ipaddress
import re
from typing import Self

_UNITS = {
    "": 1,
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}

MAX_BLOCK_SIZE = 1024
"""Tokens of a block of KV, on every node: the kernels are tested up to here, and the last block of a write is made whole."""


class Size(int):
    """Bytes: an integer, or a string such as "256MiB"."""

    @classmethod
    def parse(cls, raw: object) -> Self:
        if isinstance(raw, bool) or not isinstance(raw, int | str):
            raise ValueError('expected a size: bytes, or a string such as "256MiB"')
        match = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Za-z]*)", str(raw))
        if match is None or match[2] not in _UNITS:
            raise ValueError(f'{raw!r} is not a size: bytes, or a string such as "256MiB"')
        size = cls(float(match[1]) * _UNITS[match[2]]) if "." in match[1] else cls(int(match[1]) * _UNITS[match[2]])
        if size < 1:
            raise ValueError("a size must be at least 1 byte")
        return size


class Address(str):
    """`host:port`, or `[host]:port` for IPv6."""

    __slots__ = ()

    @classmethod
    def parse(cls, raw: object) -> Self:
        host, _, port = raw.rpartition(":") if isinstance(raw, str) else ("", "", "")
        if not host or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
            raise ValueError(f'{raw!r} is not an address: expected "host:port"')
        return cls(raw)

    @property
    def host(self) -> str:
        return self.rpartition(":")[0].removeprefix("[").removesuffix("]")

    @property
    def port(self) -> int:
        return int(self.rpartition(":")[2])

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False  # a name may resolve to anything

    @property
    def is_wildcard(self) -> bool:
        return self.host in ("0.0.0.0", "::")

    def clashes_with(self, other: "Address") -> bool:
        """Whether one host could not listen on both."""
        if self.port != other.port:
            return False
        if self.is_wildcard or other.is_wildcard:
            return all(address.is_wildcard or address.is_loopback for address in (self, other))
        return self.host == other.host or {self.host, other.host} == {"localhost", "127.0.0.1"}


class PortRange(tuple[int, int]):
    """First and last port, from "18500-18999"; both are in the range."""

    __slots__ = ()

    @classmethod
    def parse(cls, raw: object) -> Self:
        match = re.fullmatch(r"([0-9]{1,5})-([0-9]{1,5})", raw) if isinstance(raw, str) else None
        if match is None or not 1 <= int(match[1]) <= int(match[2]) <= 65535:
            raise ValueError(f'{raw!r} is not a port range: expected "first-last", such as "18500-18999"')
        return cls((int(match[1]), int(match[2])))

    def __str__(self) -> str:
        return f"{self[0]}-{self[1]}"
