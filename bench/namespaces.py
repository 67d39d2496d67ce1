"""Two network namespaces joined by one link of a given rate, for as long as a `with` lasts. Wants root, ip and tc."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterable, Iterator

import msgspec

DEVICE = "kv0"
"""The link's name at either end."""

_BURST = "256kb"  # some segments of 64 KiB, which is what leaves a TCP socket at once


class Namespace(msgspec.Struct, frozen=True):
    """One end."""

    name: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """Runs a command in it; also mounts /sys anew, where UCX looks for its device."""
        return ("ip", "netns", "exec", self.name)


@contextlib.contextmanager
def linked(rate: str) -> Iterator[tuple[Namespace, Namespace]]:
    """`rate` as tc writes it, such as 1gbit. Both are gone again afterwards, and with them what runs there."""
    ends = tuple(Namespace(f"disaggd-bench-{side}-{os.getpid()}", f"10.78.0.{number}") for number, side in enumerate("ab", start=1))
    with contextlib.ExitStack() as stack:
        for end in ends:
            _sh("ip", "netns", "add", end.name)
            stack.callback(_sh, "ip", "netns", "del", end.name)
        _sh("ip", "link", "add", DEVICE, "netns", ends[0].name, "type", "veth", "peer", "name", DEVICE, "netns", ends[1].name)
        for end in ends:
            _sh(*end.prefix, "ip", "address", "add", f"{end.address}/24", "dev", DEVICE)
            _sh(*end.prefix, "ip", "link", "set", DEVICE, "up")
            _sh(*end.prefix, "ip", "link", "set", "lo", "up")
            _shape(end, "add", rate)
        for end in ends:
            _wait_for_carrier(end)
        yield ends[0], ends[1]


def limit(ends: Iterable[Namespace], rate: str) -> None:
    """Set another rate, from now on."""
    for end in ends:
        _shape(end, "change", rate)


class End(msgspec.Struct, frozen=True):
    """A namespace that can be reached from here."""

    namespace: Namespace
    control: str
    """Its address towards us, on a link of its own without a limit."""


@contextlib.contextmanager
def reachable(ends: Iterable[Namespace]) -> Iterator[tuple[End, ...]]:
    found = []
    with contextlib.ExitStack() as stack:
        for number, end in enumerate(ends, start=1):
            ours, theirs = f"10.79.{number}.1", f"10.79.{number}.2"
            device = f"ctl{number}-{os.getpid()}"
            _sh("ip", "link", "add", device, "type", "veth", "peer", "name", "ctl0", "netns", end.name)
            stack.callback(_sh, "ip", "link", "del", device)
            _sh("ip", "address", "add", f"{ours}/30", "dev", device)
            _sh("ip", "link", "set", device, "up")
            _sh(*end.prefix, "ip", "address", "add", f"{theirs}/30", "dev", "ctl0")
            _sh(*end.prefix, "ip", "link", "set", "ctl0", "up")
            found.append(End(end, theirs))
        yield tuple(found)


def _shape(end: Namespace, verb: str, rate: str) -> None:
    _sh(*end.prefix, "tc", "qdisc", verb, "dev", DEVICE, "root", "tbf", "rate", rate, "burst", _BURST, "latency", "50ms")


def _wait_for_carrier(end: Namespace) -> None:
    """The kernel may report a new link up to a second late, and UCX takes no device that is not up."""
    for _ in range(100):
        state = subprocess.run([*end.prefix, "cat", f"/sys/class/net/{DEVICE}/operstate"], check=True, capture_output=True, text=True)
        if state.stdout.strip() == "up":
            return
        time.sleep(0.05)
    raise TimeoutError(f"{DEVICE} in {end.name} does not come up")


def bits_per_s(rate: str) -> float:
    """Of tc's notation: `1gbit`, `200mbit`."""
    for unit, factor in (("gbit", 1e9), ("mbit", 1e6), ("kbit", 1e3)):
        if rate.endswith(unit):
            return float(rate.removesuffix(unit)) * factor
    raise ValueError(f"{rate!r} is not a rate such as 1gbit or 200mbit")


def _sh(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
