"""How the agent of each node that writes meets that of its target. Runs on the router's loop; carries metadata, reads none of it.

target makes an agent for the pair → writer connects to it and sends it its own id → target reports that it received it.
Until then nothing is granted for the pair: late metadata must never reach an agent that was rebuilt on the same port.
Two nodes of which one's KV can never be the other's are not brought together at all.

Prefill nodes write to decode nodes; and decode nodes to prefill nodes, what these lack of a prefix, where both share prefixes.
"""

import logging
from collections.abc import Iterator

from disaggd.cluster.hello import ConnectPair, OpenPair, PairAgent, PairLost, PairReady
from disaggd.cluster.peers import DecodePeer, Duty, Pair, PairState, Peer, PrefillPeer
from disaggd.errors import ConfigError
from disaggd.ids import NodeName
from disaggd.transfer.layout import check_pair

log = logging.getLogger(__name__)

RETRY_S = 1.0
"""Pause before a lost or silent pair is probed again."""


class PairBook:
    """Every pair of live nodes, and its state. Shares the dispatcher's peer tables, which the dispatcher fills."""

    def __init__(self, prefills: dict[NodeName, PrefillPeer], decodes: dict[NodeName, DecodePeer]) -> None:
        self._prefills = prefills
        self._decodes = decodes
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
        pair.agent = frame
        self._probe(pair, writer, target, now)

    def on_ready(self, target: Peer, frame: PairReady) -> bool:
        """That very agent received its own id. Returns whether the pair came up."""
        writer = self._peer(frame.peer)
        pair = self._pairs.get((frame.peer, target.name))
        if writer is None or pair is None or not pair.is_current(frame.agent_id):
            return False
        if pair.state is PairState.LOST:
            return False  # it was received before the writer lost the agent: only the next probe can tell
        pair.state, pair.reason = PairState.READY, ""
        writer.send(PairReady(target.name, frame.agent_id))
        log.info("%s → %s: KV path is ready", pair.writer, pair.target)
        return True

    def on_lost(self, writer: Peer, frame: PairLost, now: float) -> None:
        """The writer cannot reach the agent any more: probe it again after a pause."""
        pair = self._pairs.get((writer.name, frame.peer))
        if pair is None or not pair.is_current(frame.agent_id):
            return
        log.warning("%s → %s: KV path is lost: %s", pair.writer, pair.target, frame.reason)
        pair.state, pair.reason = PairState.LOST, frame.reason
        pair.retry_at = now + RETRY_S

    def tick(self, now: float) -> None:
        """Probe again what was lost, or answered nothing."""
        for pair in self._pairs.values():
            if pair.state in (PairState.READY, PairState.REFUSED) or now < pair.retry_at:
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
            pair.state, pair.reason = PairState.REFUSED, str(error)
            log.error("%s → %s: there can be no KV path: %s", writer.name, target.name, error)
        else:
            self._ask(pair, writer, target, now)

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
