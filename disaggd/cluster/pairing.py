"""How the agent of each node that writes meets that of its target. Runs on the router's loop; carries metadata, reads none of it.

target makes an agent for the pair → writer connects to it and sends it its own id → target reports that it received it
→ a pattern goes over the pair, and is what arrives (`pair_checks.py`).

Before the third nothing is granted for the pair: late metadata must never reach an agent that was rebuilt on the same port. Before the
fourth nothing of a request's. A node that has no blocks free for a pattern is not kept from its work: the pair is ready, says that it
was not checked, and is checked later. One over which something else arrives than was written is not used, and the cluster serves with
the rest. Two nodes of which one's KV can never be the other's are not brought together at all.

Prefill nodes write to decode nodes; and decode nodes to prefill nodes, what these lack of a prefix, where both share prefixes.
"""

import logging
from collections.abc import Callable, Iterator

from disaggd.cluster.hello import ConnectPair, OpenPair, PairAgent, PairLost, PairReady
from disaggd.cluster.pair_checks import CheckResult, Effort, PairChecks
from disaggd.cluster.peers import DecodePeer, Duty, Pair, PairState, Peer, PrefillPeer
from disaggd.errors import ConfigError
from disaggd.ids import AgentId, NodeName
from disaggd.transfer.layout import check_pair

log = logging.getLogger(__name__)

_PROBED = (PairState.CHECKING, PairState.READY, PairState.FAILED)

RETRY_S = 1.0
"""Pause before a lost or silent pair is probed again."""
RECHECK_S = 15.0
"""Pause before a pair is checked again over which something wrong arrived, or that nobody had room to check."""
AT_FIRST = Effort(num_rounds=4, budget_s=0.05)
"""For a new pair: one round tells whether bytes arrive, but is over a connection that has carried nothing, and tells little of speed."""


class PairBook:
    """Every pair of live nodes, and its state. Shares the dispatcher's peer tables, which the dispatcher fills.

    Without `checks` a pair that was probed is ready.
    """

    def __init__(
        self, prefills: dict[NodeName, PrefillPeer], decodes: dict[NodeName, DecodePeer], checks: PairChecks | None = None
    ) -> None:
        self._prefills = prefills
        self._decodes = decodes
        self._checks = checks
        self._pairs: dict[tuple[NodeName, NodeName], Pair] = {}
        """By writer and target."""

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._pairs.values())

    def is_ready(self, writer: NodeName, target: NodeName) -> bool:
        pair = self._pairs.get((writer, target))
        return pair is not None and pair.state is PairState.READY

    def of(self, prefill: NodeName, decode: NodeName) -> Pair | None:
        """The pair, whatever its state; None when one of the two is down."""
        return self._pairs.get((prefill, decode))

    def reachable(self, decode: NodeName) -> list[PrefillPeer]:
        """Prefill nodes that take jobs, and may push to `decode` now."""
        return [peer for name, peer in self._prefills.items() if peer.duty is Duty.SERVING and self.is_ready(name, decode)]

    def prefill_up(self, peer: PrefillPeer, now: float) -> None:
        for decode in self._decodes.values():
            self._meet(peer, decode, now)

    def decode_up(self, peer: DecodePeer, now: float) -> None:
        for prefill in self._prefills.values():
            self._meet(prefill, peer, now)

    def node_down(self, name: NodeName) -> None:
        """Forget its pairs: a new link opens them anew."""
        self._pairs = {key: pair for key, pair in self._pairs.items() if name not in key}

    def on_agent(self, target: Peer, frame: PairAgent, now: float) -> None:
        """`target` has an agent for `frame.peer`: its first one, or one rebuilt after a fence."""
        writer = self._peer(frame.peer)
        pair = self._pairs.get((frame.peer, target.name))
        if writer is None or pair is None or frame.peer_incarnation != writer.hello.incarnation:
            return  # the writer left or came back meanwhile: its own link event opens the pair
        if pair.state is PairState.REFUSED:
            return  # another router has asked for it, and may know better
        if pair.agent is not None and not pair.is_current(frame.agent_id):
            pair.replaced = pair.agent.agent_id
        pair.agent = frame
        self._probe(pair, writer, target, now)

    def on_ready(self, target: Peer, frame: PairReady) -> bool:
        """That very agent received its own id. Returns whether the pair came up."""
        pair = self._pairs.get((frame.peer, target.name))
        if pair is None or not pair.is_current(frame.agent_id):
            return False
        if pair.state in (PairState.LOST, PairState.CHECKING):
            return False  # it was received before the writer lost the agent: only the next probe can tell; or that is known
        if self._checks is None or pair.checked == frame.agent_id:
            pair.reason = ""
            self._come_up(pair, "KV path is ready")
        else:
            self._check(pair, self._checks)
        return pair.state is PairState.READY

    def _come_up(self, pair: Pair, message: str) -> None:
        assert pair.agent is not None
        pair.state = PairState.READY
        if (writer := self._peer(pair.writer)) is not None:
            writer.send(PairReady(pair.target, pair.agent.agent_id))
        log.info("%s → %s: %s", pair.writer, pair.target, message)

    def on_lost(self, writer: Peer, frame: PairLost, now: float) -> None:
        """The writer cannot reach the agent any more: probe it again after a pause, unless that is of no use."""
        pair = self._pairs.get((writer.name, frame.peer))
        if pair is None:
            return None
        if not pair.is_current(frame.agent_id):
            return self._find_out(pair, frame.agent_id, writer, now)
        if frame.for_good:
            return self._refuse(pair, frame.reason)
        if frame.reason != pair.reason:  # once, not with every probe that fails
            log.warning("%s → %s: KV path is lost, trying again: %s", pair.writer, pair.target, frame.reason)
        pair.state, pair.reason = PairState.LOST, frame.reason
        pair.retry_at = now + RETRY_S
        return None

    def _find_out(self, pair: Pair, agent_id: AgentId, writer: Peer, now: float) -> None:
        """A grant named an agent that neither we nor the writer know: another router had the target make it, for a writer that is not
        there. Of one that was replaced here its loss is no news."""
        target = self._peer(pair.target)
        if pair.state is PairState.READY and target is not None and agent_id != pair.replaced:
            log.warning("%s → %s: the KV path is to an agent that is not there any more: asking for another", pair.writer, pair.target)
            pair.state, pair.agent = PairState.OPENING, None
            self._ask(pair, writer, target, now)

    # ── checks ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def check(self, pair: Pair, effort: Effort, done: Callable[[CheckResult], None]) -> bool:
        """Check a pair once more: `done` is told what comes of it, and the pair is used or not by that. False: it is not probed."""
        if self._checks is None or pair.agent is None or pair.state not in _PROBED:
            return False
        agent_id = pair.agent.agent_id

        def checked(result: CheckResult) -> None:
            self._checked(pair, agent_id, result)
            done(result)

        self._checks.start(pair, effort, checked)
        return True

    def _check(self, pair: Pair, checks: PairChecks) -> None:
        assert pair.agent is not None
        agent_id = pair.agent.agent_id
        if pair.state is not PairState.READY:
            pair.state = PairState.CHECKING
        pair.retry_at = checks.clock() + RECHECK_S
        checks.start(pair, AT_FIRST, lambda result: self._checked(pair, agent_id, result))

    def _checked(self, pair: Pair, agent_id: AgentId, result: CheckResult) -> None:
        """What a check has come to, if the pair is still the one that was checked.

        One that was in use, and of which nothing wrong was seen, stays so: of what fails under way its writer tells by itself.
        """
        if self._pairs.get((pair.writer, pair.target)) is not pair or not pair.is_current(agent_id) or pair.state not in _PROBED:
            return
        pair.reason = result.reason
        pair.checked = agent_id if result.outcome == "ok" else None
        if result.outcome == "wrong" or (result.outcome == "failed" and pair.state is not PairState.READY):
            assert self._checks is not None
            pair.state = PairState.FAILED
            pair.retry_at = self._checks.clock() + (RECHECK_S if result.outcome == "wrong" else 5 * RETRY_S)
            log.error("%s → %s: the KV path is not used: %s", pair.writer, pair.target, result.reason)
        elif pair.state is not PairState.READY:
            self._come_up(pair, f"KV path is ready: {result}")

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def tick(self, now: float) -> None:
        """Probe again what was lost, or answered nothing; check again what failed, or was not checked."""
        for pair in self._pairs.values():
            if now < pair.retry_at or pair.state in (PairState.CHECKING, PairState.REFUSED):
                continue
            if pair.state in _PROBED:
                if self._checks is not None and not (pair.checked is not None and pair.is_current(pair.checked)):
                    self._check(pair, self._checks)
                continue
            writer, target = self._peer(pair.writer), self._peer(pair.target)
            assert writer is not None and target is not None, "a pair of a node that left is forgotten"
            if pair.agent is None:
                self._ask(pair, writer, target, now)
            else:
                self._probe(pair, writer, target, now)

    def _meet(self, prefill: PrefillPeer, decode: DecodePeer, now: float) -> None:
        self._open(prefill, decode, now)
        if prefill.hello.shares_prefixes and decode.hello.shares_prefixes:
            self._open(decode, prefill, now)

    def _open(self, writer: Peer, target: Peer, now: float) -> None:
        pair = Pair(writer.name, target.name)
        self._pairs[writer.name, target.name] = pair
        try:
            check_pair(writer.hello.kv, target.hello.kv)
        except ConfigError as error:
            self._refuse(pair, str(error))
        else:
            self._ask(pair, writer, target, now)

    def _refuse(self, pair: Pair, reason: str) -> None:
        pair.state, pair.reason = PairState.REFUSED, reason
        log.error("%s → %s: there can be no KV path: %s", pair.writer, pair.target, reason)

    def _ask(self, pair: Pair, writer: Peer, target: Peer, now: float) -> None:
        pair.retry_at = now + 5 * RETRY_S
        target.send(OpenPair(writer.name, writer.hello.incarnation, writer.hello.num_ranks))

    def _probe(self, pair: Pair, writer: Peer, target: Peer, now: float) -> None:
        assert pair.agent is not None
        pair.state = PairState.PROBING
        pair.retry_at = now + 5 * RETRY_S
        writer.send(ConnectPair(target.name, target.hello.incarnation, pair.agent.endpoints, target.hello.landing_kv))

    def _peer(self, name: NodeName) -> Peer | None:
        return self._prefills.get(name) or self._decodes.get(name)
