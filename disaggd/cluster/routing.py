"""Which decode node gets a request, and which prefill node a job. Pure: knows no link and no clock, only what it is told.

A request costs a decode node what it has to prefill and what its steps then take: the KV of each running sequence is read again
in every step, so a crowded node is slower for all, and one whose steps are long by themselves is as if it were crowded. Both are counted
in tokens, not in blocks, since one node's blocks may be larger than another's. A job costs a prefill node the time until it is through
with what it has and with the job.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping

import msgspec

from disaggd.ids import NodeName

TIE_BLOCKS = 1
TIE_SHARE = 0.05
"""A conversation stays on its node while that costs at most a block and 5 % more than the best: events of caches are on
their way for some milliseconds, and a load changes with every request."""

STEP_TOKENS = 4096
"""Reading the weights for a step takes as long as the KV of so many tokens: of eight sequences on a core with an 88 M model. More on a
GPU, where a slow node therefore gets more than its share, but no more than if speeds were not known."""

LEAST_STEP_S = 5e-3
"""Shorter steps, of tiny models, count as this: beside others that start on the machine they measure themselves anything up to it."""

ALIKE = 2.0
"""Nodes whose steps differ by no larger factor count as equally fast: equal ones that start side by side on a busy machine measure
themselves so far apart, and rarely further."""


class RoutingWeights(msgspec.Struct, frozen=True, kw_only=True):
    """What a token counts: one to prefill, and one that is there already."""

    prefill: float
    load: float


class DecodeCandidate(msgspec.Struct, frozen=True, kw_only=True):
    """A decode node that could take a request."""

    name: NodeName
    is_full: bool
    """It had no room for its last grant."""
    uncached_tokens: int
    """Of the request's prompt, the tokens that the node does not hold."""
    backlog_tokens: int = 0
    """Of prompts that the node itself has yet to prefill, when it last told: they are before this one."""
    load_tokens: int
    """Context tokens of all sequences placed there, whether they run, wait, or are prefilled elsewhere."""
    block_size: int
    slowness: float = 1.0
    """So many times longer than the fastest node's its steps take (`slowness`)."""

    def cost(self, weights: RoutingWeights) -> float:
        """In weighted tokens. The load is what the fastest node would have to carry for its steps to be as long as here."""
        load_tokens = self.slowness * (STEP_TOKENS + self.load_tokens) - STEP_TOKENS
        return weights.prefill * (self.uncached_tokens + self.backlog_tokens) + weights.load * load_tokens


def slowness(step_s: Mapping[NodeName, float | None]) -> dict[NodeName, float]:
    """Against the fastest node, from what each measured a step of one sequence to take.

    Who has not (None) is taken for the slowest of those who have: a node that is very slow does not get to the end of its measurement.
    """
    known = {name: max(seconds, LEAST_STEP_S) for name, seconds in step_s.items() if seconds is not None}
    fastest_s, slowest_s = min(known.values(), default=1.0), max(known.values(), default=1.0)
    ratios = {name: known.get(name, slowest_s) / fastest_s for name in step_s}
    return {name: ratio if ratio > ALIKE else 1.0 for name, ratio in ratios.items()}


def choose_decode(candidates: Iterable[DecodeCandidate], weights: RoutingWeights, session_node: NodeName | None = None) -> NodeName:
    """The cheapest that is not full; among equals the least loaded, then the first by name. At least one candidate.

    `session_node`, which had the conversation's last turn, is taken if it costs about as little.
    """
    by_cost = sorted(candidates, key=lambda node: (node.is_full, node.cost(weights), node.load_tokens, node.name))
    best = by_cost[0]
    known = next((node for node in by_cost if node.name == session_node and node.is_full == best.is_full), best)
    tie_blocks = TIE_BLOCKS * max(known.block_size, best.block_size) * max(weights.prefill, weights.load)
    return known.name if known.cost(weights) <= best.cost(weights) * (1 + TIE_SHARE) + tie_blocks else best.name


class RoundRobin:
    """Each node in its turn, by name, those that are full left out if not all are: what cost is compared with."""

    def __init__(self) -> None:
        self._last: NodeName | None = None

    def choose(self, candidates: Iterable[DecodeCandidate]) -> NodeName:
        """At least one candidate."""
        nodes = list(candidates)
        names = sorted(node.name for node in nodes if not node.is_full) or sorted(node.name for node in nodes)
        self._last = next((name for name in names if self._last is None or name > self._last), names[0])
        return self._last


class PrefillCandidate(msgspec.Struct, frozen=True, kw_only=True):
    """A prefill node that has credit for a job."""

    name: NodeName
    backlog_s: float
    """Until it is through with what it has."""
    prefill_s: float
    """For the job, less what the node holds of it."""


def choose_prefill(candidates: Iterable[PrefillCandidate]) -> NodeName | None:
    """Whoever is predicted to finish first; among equals the least busy, then the first by name. None without candidates."""
    best = min(candidates, key=lambda node: (node.backlog_s + node.prefill_s, node.backlog_s, node.name), default=None)
    return None if best is None else best.name


class SessionTable:
    """Where each conversation's last turn went. Holds the `limit` most recently used; one that is forgotten is placed by cost alone."""

    def __init__(self, limit: int) -> None:
        assert limit > 0
        self._limit = limit
        self._nodes: OrderedDict[str, NodeName] = OrderedDict()

    def __len__(self) -> int:
        return len(self._nodes)

    def node_of(self, session: str | None) -> NodeName | None:
        return self._nodes.get(session) if session is not None else None

    def remember(self, session: str | None, node: NodeName) -> None:
        """`node` gets the conversation's present turn. Nothing for a request without a session."""
        if session is None:
            return
        self._nodes[session] = node
        self._nodes.move_to_end(session)
        if len(self._nodes) > self._limit:
            self._nodes.popitem(last=False)
