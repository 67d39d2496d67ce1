"""What the reports of prefill nodes teach the router, for its next offers. Runs on the router's loop.

Each node has its own fit of prefills, each pair its own of transfers (`peers.py`), and all of the router's waits one between them.
"""

from disaggd.cluster.costs import DelayFit
from disaggd.cluster.pairing import PairBook
from disaggd.cluster.peers import PrefillPeer
from disaggd.cluster.protocol import JobEnded, Prefilled
from disaggd.cluster.request import RoutedSequence, Timeline


class Learning:
    """Shares the dispatcher's pairs."""

    def __init__(self, pairs: PairBook) -> None:
        self.delays = DelayFit()
        """Of first tokens, from the decision on: queue, grant, hops, and what came in between."""
        self._pairs = pairs

    def prefilled(self, peer: PrefillPeer, record: RoutedSequence, frame: Prefilled) -> None:
        """A prompt has been computed, and its first token came in just now."""
        times = record.timeline
        peer.prefills.learn(frame.computed, frame.prefill_ms / 1e3)
        predicted_s = None if record.predicted is None else record.predicted.remote_plain_s
        if predicted_s is not None and times.prefilled is not None and times.queued is not None:
            self.delays.learn(predicted_s, times.prefilled - times.queued, times.prefilled)

    def pushed(self, peer: PrefillPeer, record: RoutedSequence, frame: JobEnded, times: Timeline) -> None:
        """The last handle of a job's push has ended."""
        pair = self._pairs.of(peer.name, record.decode) if record.decode is not None and record.attempt == frame.attempt else None
        reported_ms, done_ms = times.first_token_reported_ms, frame.last_done_ms
        if pair is None or not frame.clean or not frame.kv_bytes or reported_ms is None or done_ms is None:
            return
        pair.transfers.learn(frame.kv_bytes, times.prefill_ms / 1e3, max(0.0, done_ms - reported_ms) / 1e3)
