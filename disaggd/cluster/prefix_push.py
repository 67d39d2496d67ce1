"""Whether decode pushes to a prefill node what that lacks of a prompt's beginning, or that is computed anew: whichever is sooner done.

    a push      base + per byte · bytes, less what the prefill node has to do before it comes to the job
    computing   the whole prompt behind what is cached, less the rest of it behind what decode holds

`is_worth_pushing` is pure. `PrefixPushes` learns what pushes take, and counts what became of them; it runs on the router's loop.
"""

import logging
from collections import Counter
from typing import Literal

import msgspec

from disaggd.cluster.offer import PrefillCost, TransferCost
from disaggd.cluster.pairing import PairBook
from disaggd.cluster.peers import DecodePeer, PrefillPeer
from disaggd.cluster.protocol import PrefixEnded, PrefixSource
from disaggd.cluster.request import PrefixPush, RoutedSequence
from disaggd.ids import NodeName, SeqId
from disaggd.least_squares import LeastSquares
from disaggd.transfer.share import block_bytes

log = logging.getLogger(__name__)

PrefixPolicy = Literal["auto", "always", "never"]

FORGOTTEN = 64
"""A pair that could have pushed so often and was too slow is tried once more: its link may have been mended."""

LEAST_S = 2e-3
"""Pushes that take less need not be told apart: two hops over the router take as long."""

_PRIOR = (5e-3, 1e-9)
"""Four hops, and a gigabyte per second."""
_DEVIATIONS = (2e-2, 1e-8)


class Missing(msgspec.Struct, frozen=True, kw_only=True):
    """What a prefill node lacks of one prompt's beginning, and what bringing it there would take."""

    num_tokens: int
    """Of the prompt."""
    num_held: int
    """At its beginning, those that decode holds for it."""
    num_cached: int
    """Those that the prefill node has."""
    bytes_per_token: float
    wait_s: float
    """Until the prefill node comes to the job, whatever is decided."""
    prefill_cost: PrefillCost | None
    push_cost: TransferCost

    @property
    def num_missing(self) -> int:
        return max(0, self.num_held - self.num_cached)

    @property
    def push_s(self) -> float:
        """By which the job would begin later."""
        push_s = self.push_cost.base_s + self.push_cost.per_byte_s * self.bytes_per_token * self.num_missing
        return max(0.0, push_s - self.wait_s)

    def saved_s(self, cost: PrefillCost) -> float:
        """By which it would be computed sooner."""
        whole = cost.seconds(self.num_tokens - self.num_cached, self.num_cached)
        return whole - cost.seconds(self.num_tokens - self.num_held, self.num_held)


def is_worth_pushing(policy: PrefixPolicy, missing: Missing) -> bool:
    """Whether to push. Where nobody knows what computing takes, nothing is pushed."""
    if policy == "never" or not missing.num_missing:
        return False
    if policy == "always":
        return True
    return missing.prefill_cost is not None and missing.push_s < missing.saved_s(missing.prefill_cost)


class _Way:
    """From one decode node to one prefill node."""

    def __init__(self) -> None:
        self.fit = LeastSquares(_PRIOR, _DEVIATIONS, least=LEAST_S)
        self.num_passed_over = 0
        """Pushes that were not worth it since the last one."""

    @property
    def cost(self) -> TransferCost:
        return TransferCost(*self.fit.coefficients)


class PrefixPushes:
    """What pushes of prefixes take and come to, by pair of nodes."""

    def __init__(self, policy: PrefixPolicy, pairs: PairBook) -> None:
        self.outcomes: Counter[tuple[NodeName, NodeName, str]] = Counter()
        """By decode node, prefill node and outcome."""
        self.num_tokens: Counter[tuple[NodeName, NodeName]] = Counter()
        """That were pushed."""
        self.kv_bytes: Counter[tuple[NodeName, NodeName]] = Counter()
        self._policy = policy
        self._pairs = pairs
        self._ways: dict[tuple[NodeName, NodeName], _Way] = {}
        self._asked: dict[NodeName, dict[tuple[SeqId, int], PrefixPush]] = {}
        """Of prefill nodes that have not said what became of it; by sequence and attempt."""

    def source_for(
        self, record: RoutedSequence, decode: DecodePeer, prefill: PrefillPeer, num_cached: int, now: float
    ) -> PrefixSource | None:
        """For a job that goes to `prefill`, which has `num_cached` tokens of it: the beginning that `decode` shall push, if any.

        What decode holds is what its grant leaves out, as far as it fills blocks of the prefill node's.
        """
        if record.grant is None or not self._pairs.is_ready(decode.name, prefill.name):
            return None
        num_held, block_size = record.grant.first_token_index, prefill.hello.kv.block_size
        way = self._ways.setdefault((decode.name, prefill.name), _Way())
        missing = Missing(
            num_tokens=record.num_tokens,
            num_held=num_held - num_held % block_size,
            num_cached=num_cached,
            bytes_per_token=_bytes_per_token(prefill),
            wait_s=prefill.wait_s(record.job, now),
            prefill_cost=prefill.prefill_cost,
            push_cost=way.cost,
        )
        if not is_worth_pushing(self._policy, missing) and not self._is_due(way, missing):
            return None
        way.num_passed_over = 0
        record.prefix_push = PrefixPush(source=decode.name, attempt=record.attempt, num_asked=missing.num_missing)
        self._asked.setdefault(prefill.name, {})[record.job] = record.prefix_push
        return PrefixSource(decode.name, missing.num_held)

    def _is_due(self, way: _Way, missing: Missing) -> bool:
        """Whether the way is to be tried once more, though it should not be worth it."""
        if self._policy != "auto" or not missing.num_missing:
            return False
        way.num_passed_over += 1
        return way.num_passed_over >= FORGOTTEN

    def ended(self, prefill: PrefillPeer, frame: PrefixEnded) -> PrefixPush | None:
        """What became of it, whoever still waits for the sequence. None if nothing was asked."""
        asked = self._asked.get(prefill.name, {}).pop((frame.seq, frame.attempt), None)
        if asked is None:
            return None
        way = asked.source, prefill.name
        self.outcomes[*way, frame.outcome] += 1
        self.num_tokens[way] += frame.num_tokens
        self.kv_bytes[way] += frame.kv_bytes
        if frame.outcome in ("no_room", "unreachable", "failed"):
            log.warning("%s: its prefix was not pushed from %s to %s: %s", frame.seq, *way, frame.reason)
        self._learn(self._ways.setdefault(way, _Way()), asked.num_asked * _bytes_per_token(prefill), frame)
        return msgspec.structs.replace(
            asked, outcome=frame.outcome, num_tokens=frame.num_tokens, kv_bytes=frame.kv_bytes, took_ms=frame.took_ms
        )

    def node_down(self, name: NodeName) -> None:
        """It will not say what became of what it was asked for."""
        self._asked.pop(name, None)

    def _learn(self, way: _Way, num_bytes: float, frame: PrefixEnded) -> None:
        """One that failed took at least as long as was thought: else quick failures would make a way look fast."""
        if frame.outcome == "landed":
            way.fit.learn((1.0, frame.kv_bytes), frame.took_ms / 1e3)
        elif frame.outcome == "failed":
            way.fit.learn((1.0, num_bytes), max(frame.took_ms / 1e3, way.fit.predict((1.0, num_bytes))))


def _bytes_per_token(peer: PrefillPeer) -> float:
    return block_bytes(peer.hello.landing_kv, peer.hello.num_ranks) / peer.hello.kv.block_size
