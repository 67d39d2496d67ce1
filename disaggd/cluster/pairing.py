"""How each prefill node's agent meets each decode node's. Runs on the router's loop; carries metadata, reads none of it.

decode makes an agent for the pair → prefill connects to it and sends it its own id → decode reports that it received it.
Until then nothing is granted for the pair: late metadata must never reach an agent that was rebuilt on the same port.
"""

import logging
from collections.abc import Iterator

from disaggd.cluster.peers import DecodePeer, Pair, PairState, PrefillPeer
from disaggd.cluster.protocol import ConnectPair, OpenPair, PairAgent, PairLost, PairReady
from disaggd.ids import NodeName

log = logging.getLogger(__name__)

RETRY_S = 1.0
"""Pause before a lost or silent pair is probed again."""


class PairBook:
    """Every pair of live nodes, and its state. Shares the dispatcher's peer tables, which the dispatcher fills."""

    def __init__(self, prefills: dict[NodeName, PrefillPeer], decodes: dict[NodeName, DecodePeer]) -> None:
        self._prefills = prefills
        self._decodes = decodes
        self._pairs: dict[tuple[NodeName, NodeName], Pair] = {}

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._pairs.values())

    def is_ready(self, prefill: NodeName, decode: NodeName) -> bool:
        pair = self._pairs.get((prefill, decode))
        return pair is not None and pair.state is PairState.READY

    def of(self, prefill: NodeName, decode: NodeName) -> Pair | None:
        """The pair, whatever its state; None when one of the two is down."""
        return self._pairs.get((prefill, decode))

    def reachable(self, decode: NodeName) -> list[PrefillPeer]:
        """Prefill nodes that may push to `decode` now."""
        return [peer for name, peer in self._prefills.items() if self.is_ready(name, decode)]

    def prefill_up(self, peer: PrefillPeer, now: float) -> None:
        for decode in self._decodes.values():
            self._open(peer, decode, now)

    def decode_up(self, peer: DecodePeer, now: float) -> None:
        for prefill in self._prefills.values():
            self._open(prefill, peer, now)

    def node_down(self, name: NodeName) -> None:
        """Forget its pairs: a new link opens them anew."""
        self._pairs = {key: pair for key, pair in self._pairs.items() if name not in key}

    def on_agent(self, decode: DecodePeer, frame: PairAgent, now: float) -> None:
        """Decode has an agent for `frame.peer`: its first one, or one rebuilt after a fence."""
        prefill = self._prefills.get(frame.peer)
        pair = self._pairs.get((frame.peer, decode.name))
        if prefill is None or pair is None or frame.peer_incarnation != prefill.hello.incarnation:
            return  # the prefill node left or came back meanwhile: its own link event opens the pair
        pair.agent = frame
        self._probe(pair, prefill, decode, now)

    def on_ready(self, decode: DecodePeer, frame: PairReady) -> bool:
        """That very agent received its own id. Returns whether the pair came up."""
        prefill = self._prefills.get(frame.peer)
        pair = self._pairs.get((frame.peer, decode.name))
        if prefill is None or pair is None or not pair.is_current(frame.agent_id):
            return False
        if pair.state is PairState.LOST:
            return False  # it was received before prefill lost the agent: only the next probe can tell
        pair.state = PairState.READY
        prefill.send(PairReady(decode.name, frame.agent_id))
        log.info("%s → %s: KV path is ready", pair.prefill, pair.decode)
        return True

    def on_lost(self, prefill: PrefillPeer, frame: PairLost, now: float) -> None:
        """Prefill cannot reach the agent any more: probe it again after a pause."""
        pair = self._pairs.get((prefill.name, frame.peer))
        if pair is None or not pair.is_current(frame.agent_id):
            return
        log.warning("%s → %s: KV path is lost: %s", pair.prefill, pair.decode, frame.reason)
        pair.state = PairState.LOST
        pair.retry_at = now + RETRY_S

    def tick(self, now: float) -> None:
        """Probe again what was lost, or answered nothing."""
        for pair in self._pairs.values():
            if pair.state is PairState.READY or now < pair.retry_at:
                continue
            prefill, decode = self._prefills[pair.prefill], self._decodes[pair.decode]
            if pair.agent is None:
                self._ask(pair, prefill, decode, now)
            else:
                self._probe(pair, prefill, decode, now)

    def _open(self, prefill: PrefillPeer, decode: DecodePeer, now: float) -> None:
        pair = Pair(prefill.name, decode.name)
        self._pairs[prefill.name, decode.name] = pair
        self._ask(pair, prefill, decode, now)

    def _ask(self, pair: Pair, prefill: PrefillPeer, decode: DecodePeer, now: float) -> None:
        pair.retry_at = now + 5 * RETRY_S
        decode.send(OpenPair(prefill.name, prefill.hello.incarnation))

    def _probe(self, pair: Pair, prefill: PrefillPeer, decode: DecodePeer, now: float) -> None:
        assert pair.agent is not None
        pair.state = PairState.PROBING
        pair.retry_at = now + 5 * RETRY_S
        agent = pair.agent
        prefill.send(ConnectPair(decode.name, decode.hello.incarnation, agent.agent_id, agent.metadata, agent.place))
