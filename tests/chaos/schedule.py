"""What a seed means: which faults, in which order, for how long, and which requests meanwhile. Pure: knows no cluster and no clock.

The same seed gives the same faults and the same requests, so a run that failed can be run again. How the two fall on each other
is the machine's doing: whatever it does, the ledger must hold.
"""

import random
from collections.abc import Iterator
from typing import Literal

import msgspec

Part = Literal["prefill", "decode", "router", "link", "wire", "machine"]
Kind = Literal["kill", "restart", "terminate", "blink", "freeze", "hang", "slow", "cut", "stall", "down", "silent"]
Manner = Literal["read", "dawdle", "leave"]
Route = Literal["local", "remote"]

MANNERS: tuple[Manner, ...] = ("read", "dawdle", "leave")
WIRE = "wire"
"""The victim of a fault of the wire: it joins all prefill nodes with all decode nodes."""

NODES: dict[Part, tuple[str, ...]] = {"prefill": ("p0", "p1"), "decode": ("d0", "d1"), "router": ("router",)}
MORTAL: dict[Part, tuple[str, ...]] = {"prefill": ("p1",), "decode": ("d1",), "router": ("router",)}
"""Who is killed. The others live through the whole run, so that what they might leak at each death of a peer adds up."""

DEADLY: frozenset[Kind] = frozenset({"kill", "restart", "terminate"})
"""A new process takes the place of the old one, on its port."""


class Cell(msgspec.Struct, frozen=True):
    """One kind of fault of one part of the cluster."""

    part: Part
    kind: Kind


_PROCESS: tuple[Kind, ...] = ("kill", "restart", "terminate", "blink", "freeze", "slow")
_LINK: tuple[Kind, ...] = ("cut", "stall", "slow")
_WIRE: tuple[Kind, ...] = ("down", "silent", "slow")

DECK: tuple[Cell, ...] = (
    *(Cell(part, kind) for part in NODES for kind in _PROCESS),
    *(Cell("link", kind) for kind in _LINK),
    *(Cell("wire", kind) for kind in _WIRE),
)
"""Every cell but the long hangs. Dealt whole, in another order each time: each is as frequent as any other."""
HANGS: tuple[Cell, ...] = tuple(Cell(part, "hang") for part in NODES)
DECKS_PER_HANG = 6
"""One of the `HANGS` joins so many decks: they take a minute each."""


class Tempo(msgspec.Struct, frozen=True, kw_only=True):
    """How quickly the cluster gives a peer up, and so how long faults must last to make it do so."""

    heartbeat_s: float
    missed_heartbeats: int
    lease_s: float
    quiesce_s: float
    user_timeout_s: float
    drain_s: float
    hang_s: float
    heal_s: float
    """After a fault, and when no other is left, the cluster must be whole again within this."""
    gap_s: float
    """The mean time between the beginnings of two faults."""

    @property
    def loss_s(self) -> float:
        """A peer that is silent for so long is given up."""
        return self.heartbeat_s * self.missed_heartbeats


QUICK = Tempo(
    heartbeat_s=0.5, missed_heartbeats=4, lease_s=1.5, quiesce_s=2.0, user_timeout_s=2.0, drain_s=8.0, hang_s=8.0, heal_s=150.0, gap_s=0.5
)
STANDARD = Tempo(
    heartbeat_s=1.0,
    missed_heartbeats=3,
    lease_s=5.0,
    quiesce_s=10.0,
    user_timeout_s=5.0,
    drain_s=30.0,
    hang_s=60.0,
    heal_s=150.0,
    gap_s=2.0,
)
"""The product's own defaults."""


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that goes wrong, and for how long."""

    index: int
    part: Part
    """`machine`: a fault that nobody injected, for the host gave nobody processor time."""
    kind: Kind
    victim: str
    """A node (of a link: the one at its far end), or `WIRE`."""
    wait_s: float
    """After the beginning of the one before."""
    hold_s: float

    @property
    def title(self) -> str:
        what = {"link": f"link to {self.victim}", "wire": "the wire"}.get(self.part, self.victim)
        return f"{self.kind} {what} for {self.hold_s:.1f} s"


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One request, and how its client behaves."""

    index: int
    case: int
    """Which entry of the catalogue, modulo its length."""
    salt: str
    """`cache_salt`: requests of one salt share cached prefixes."""
    stream: bool
    logprobs: bool
    route: Route | None
    """Forced by a header, or the cluster's own decision."""
    manner: Manner
    after: int
    """Events after which the client leaves, or pauses."""
    wait_s: float
    """After the request before."""


def faults(seed: int, count: int, tempo: Tempo, *, has_wire: bool = True) -> list[Fault]:
    """The first `count` of this seed. Without a wire of our own to harm there are none of the wire."""
    dice = random.Random(f"faults {seed}")
    found: list[Fault] = []
    for index, cell in enumerate(_cells(dice, has_wire)):
        if index == count:
            return found
        found.append(_fault(index, cell, dice, tempo))
    raise AssertionError("cells never end")


def _cells(dice: random.Random, has_wire: bool) -> Iterator[Cell]:
    number = dice.randrange(DECKS_PER_HANG)
    while True:
        deck = [cell for cell in DECK if has_wire or cell.part != "wire"]
        dice.shuffle(deck)
        if number % DECKS_PER_HANG == DECKS_PER_HANG - 1:
            deck.append(HANGS[number // DECKS_PER_HANG % len(HANGS)])
        yield from deck
        number += 1


def _fault(index: int, cell: Cell, dice: random.Random, tempo: Tempo) -> Fault:
    return Fault(
        index=index,
        part=cell.part,
        kind=cell.kind,
        victim=_victim(cell, dice),
        wait_s=dice.uniform(0.2, 1.8) * tempo.gap_s,
        hold_s=_hold_s(cell.kind, dice, tempo),
    )


def _victim(cell: Cell, dice: random.Random) -> str:
    if cell.part == "wire":
        return WIRE
    if cell.part == "link":
        return dice.choice([*NODES["prefill"], *NODES["decode"]])
    return dice.choice(MORTAL[cell.part] if cell.kind in DEADLY else NODES[cell.part])


def _hold_s(kind: Kind, dice: random.Random, tempo: Tempo) -> float:
    match kind:
        case "restart" | "terminate":
            return 0.0
        case "hang":
            return tempo.hang_s
        case "blink":  # too short for anybody to give the victim up
            return dice.uniform(0.1, 0.6) * tempo.loss_s
        case "kill":
            return dice.uniform(0.2, 1.0) * tempo.loss_s
        case "freeze" | "stall" | "silent":  # longer than that
            return dice.uniform(1.3, 2.2) * tempo.loss_s
        case "cut" | "down" | "slow":  # on either side
            return dice.uniform(0.3, 1.8) * tempo.loss_s


def asks(seed: int, rate: float) -> Iterator[Ask]:
    """Endless; `rate` is requests per second, which come as a Poisson process."""
    dice = random.Random(f"asks {seed}")
    index = 0
    while True:
        yield Ask(
            index=index,
            case=dice.randrange(2**32),
            salt=dice.choice([f"own-{index}", f"own-{index}", "shared-a", "shared-b"]),
            stream=dice.random() < 0.7,
            logprobs=dice.random() < 0.4,
            route=dice.choice([None, None, None, "local", "remote"]),
            manner=dice.choices(MANNERS, [0.82, 0.06, 0.12])[0],
            after=dice.randrange(12),
            wait_s=dice.expovariate(rate),
        )
        index += 1
