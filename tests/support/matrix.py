"""The failure matrix as data: what may break, how, when, and what its clients may see of it. Pure.

A cell is a blow, which is a victim and what befalls it, and the phase that a request is in then. Its client has the oracle's tokens in the
end, or what `allowed` names; and what it has until then is the beginning of them.
"""

from itertools import product
from typing import Literal, get_args

import msgspec

Victim = Literal["prefill", "decode", "router", "link_to_prefill", "link_to_decode", "wire"]
"""A node's process; the control link between the router and a node; the network that KV takes."""

Fault = Literal["killed", "restarted", "blinks", "hangs", "slow"]
"""killed: gone, and not back before every request has ended · restarted: gone, and started again at once on the same port · blinks:
SIGSTOPped for less than the missed heartbeats · hangs: SIGSTOPped until all who wait for it have given it up · slow: a quarter of its
time, or of its bytes. A link or a wire is cut, cut for a moment, stalled, or throttled."""

Phase = Literal["queued", "granted", "prefilling", "pushing", "first_token", "decoding"]
"""queued: no prefill node has credit · granted: blocks are reserved, the job is at the prefill node and has not begun · prefilling: half
computed, and what is computed has landed · pushing: half computed, with writes in flight that nobody reads · first_token: the client has
it, and the transfer is not over · decoding: the client has several tokens."""

End = Literal["complete", "cut", "error"]
"""complete: every token, and the right finish reason · cut: the connection ended amid the answer · error: an error event, or a status."""

VICTIMS: tuple[Victim, ...] = get_args(Victim)
FAULTS: tuple[Fault, ...] = get_args(Fault)
PHASES: tuple[Phase, ...] = get_args(Phase)


class Blow(msgspec.Struct, frozen=True):
    """What befalls whom."""

    victim: Victim
    fault: Fault

    @property
    def title(self) -> str:
        return f"{self.victim}-{self.fault}"

    @property
    def is_loss(self) -> bool:
        """Whoever waits for the victim gives it up, and has to."""
        return self.fault in ("killed", "restarted", "hangs")


BLOWS: tuple[Blow, ...] = tuple(Blow(victim, fault) for victim, fault in product(VICTIMS, FAULTS))


def allowed(blow: Blow) -> frozenset[End]:
    """How a stream may end, with another decode node there to take it over: only a router that dies takes its clients with it."""
    if blow.victim == "router" and blow.fault in ("killed", "restarted"):
        return frozenset({"cut"})
    return frozenset({"complete"})


def must_move(blow: Blow, phase: Phase) -> bool:
    """Whether the request cannot have ended in its first attempt: what it waited for was lost."""
    match blow.victim:
        case _ if not blow.is_loss:
            return False
        case "decode" | "link_to_decode":
            return True
        case "prefill":
            return phase in ("granted", "prefilling", "pushing", "first_token")
        case "link_to_prefill":
            return phase in ("granted", "prefilling", "pushing")  # whose first token is out, of that all is posted, and may land
        case "wire":
            return blow.fault != "restarted" and phase in ("granted", "prefilling", "pushing")
    return False  # what nodes told a router while it hung is there when it goes on


def may_move(blow: Blow) -> bool:
    """Whether a request may be tried again: not for what is shorter than every deadline, or only slow."""
    return blow.is_loss
