"""What a router remembers and tells of its cluster: receipts, metrics, the flight recorder. Runs on the router's loop.

`RouterBackend` tells it what happened; nothing here is done per token.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator

from disaggd.cluster.dispatcher import Dispatcher
from disaggd.cluster.hello import NodeHello
from disaggd.cluster.link import FAULT
from disaggd.cluster.peers import Duty, PairState, Peer
from disaggd.cluster.protocol import Gauges
from disaggd.cluster.request import RoutedSequence
from disaggd.config import RouterConfig
from disaggd.ids import NodeName, SeqId
from disaggd.observe.chrome_trace import ROUTER, trace_pieces
from disaggd.observe.metrics import BlockState, Metrics, SequenceState
from disaggd.observe.receipts import Receipt, ReceiptBook
from disaggd.observe.recorder import FlightRecorder, FlownRequest
from disaggd.roles.receipts import make_receipt

_LINK_CAUSES = frozenset(
    (FAULT, "secret", "tls", "version", "name", "role", "model_id", "kv.dtype", "kv.block_size", "kv.head_dim", "kv.groups"),
)


class Observer:
    """`clock` is the dispatcher's; `wall` is seconds since 1970."""

    def __init__(
        self,
        model: str,
        router: NodeName,
        config: RouterConfig,
        metrics: Metrics,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._model = model
        self._router = router
        self._refused = Counter[str]()
        """Links that came to nothing because this router or the node refused the other, by cause."""
        self._metrics = metrics
        self._clock = clock
        self._since_epoch_s = wall() - clock()
        self._book = ReceiptBook(config.receipts)
        self._request_ids: OrderedDict[SeqId, str] = OrderedDict()
        """Of the last sequences that ended, as many as receipts."""
        self._max_ended = config.receipts
        self._recorder = FlightRecorder(config.trace_minutes, clock)
        self._pairs: dict[tuple[NodeName, NodeName], PairState] = {}

    # ── what happens ─────────────────────────────────────────────────────────────────────────────────────────────────

    def ended(self, record: RoutedSequence, *, awaits_report: bool) -> None:
        """A request is over; told once more when its prefill node has reported, if that was awaited."""
        receipt = self.receipt(record)
        self._book.write(receipt)
        self._request_ids[record.seq] = record.request.id
        while len(self._request_ids) > self._max_ended:
            self._request_ids.popitem(last=False)
        self._recorder.request(record.seq, record.timeline.arrived, receipt)
        if not awaits_report:
            self._metrics.observe_finish(receipt)

    def node_up(self, node: NodeName, hello: NodeHello) -> None:
        self._metrics.set_node(node, hello.role, True)
        self._recorder.event(node, "link up")

    def node_down(self, node: NodeName, hello: NodeHello, reason: str) -> None:
        self._metrics.set_node(node, hello.role, False)
        self._recorder.event(node, "link down", reason=reason)

    def refused_by(self, node: NodeName, cause: str, total: int) -> None:
        """So many links, since the node's start."""
        self._metrics.count_refused_links(node, cause, total)

    def refused_here(self, field: str) -> None:
        """`field` may come from a stranger: only those that we know become a time series."""
        cause = field if field in _LINK_CAUSES else "other"
        self._refused[cause] += 1
        self._metrics.count_refused_links(self._router, cause, self._refused[cause])

    def slow_thread(self, node: NodeName, thread: str, seconds: float) -> None:
        self._metrics.set_slow_thread(node, thread, seconds)
        self._recorder.sample(node, f"{thread} thread", [("stuck for s", seconds)])

    def gauges(self, node: NodeName, hello: NodeHello, gauges: Gauges) -> None:
        blocks, sequences = block_counts(gauges), _sequence_counts(gauges)
        self._metrics.set_blocks(node, blocks, hello.num_blocks)
        self._metrics.set_sequences(node, sequences)
        self._metrics.set_backlog(node, gauges.prefill_backlog_tokens)
        self._metrics.count_preemptions(node, gauges.preemptions)
        self._metrics.count_verified(node, blocks=gauges.blocks_verified, failures=gauges.checksum_failures)
        self._metrics.count_prefixes(
            node,
            queried_tokens=gauges.prefix_queried_tokens,
            hit_tokens=gauges.prefix_hit_tokens,
            evicted_blocks=gauges.prefix_evicted_blocks,
        )
        self._recorder.sample(node, "blocks", blocks.items())
        self._recorder.sample(node, "sequences", sequences.items())

    def tick(self, dispatcher: Dispatcher) -> None:
        """A few times a second: what nobody tells when it changes."""
        queue = dispatcher.queue
        self._metrics.set_queue(len(queue), queue.num_tokens, queue.oldest_age_s(self._clock()))
        self._recorder.sample(ROUTER, "prefill queue", [("jobs", len(queue)), ("tokens", queue.num_tokens)])
        self._metrics.set_stalls(dispatcher.stalls.num_stalled, dispatcher.stalls.totals)
        for reason, total in queue.drops.items():
            self._metrics.count_queue_drops(reason, total)
        peers: dict[NodeName, Peer] = {**dispatcher.prefills, **dispatcher.decodes}
        for name, peer in peers.items():
            self._metrics.set_draining(name, peer.duty is not Duty.SERVING)
            self._metrics.set_indexed(name, dispatcher.caches.index.num_held(name))
        for name, decode in dispatcher.decodes.items():
            if decode.breakeven_tokens is not None:
                self._metrics.set_breakeven(name, decode.breakeven_tokens)
        for frame, count in dispatcher.dropped_frames.items():
            self._metrics.count_dropped_frames(frame, count)
        dispatcher.dropped_frames.clear()
        for (writer, target, outcome), total in dispatcher.prefixes.outcomes.items():
            self._metrics.count_prefix_pushes(writer, target, outcome, total)
        for way, tokens in dispatcher.prefixes.num_tokens.items():
            self._metrics.count_pushed_prefixes(*way, tokens, dispatcher.prefixes.kv_bytes[way])
        self._show_pairs({(pair.writer, pair.target): pair.state for pair in dispatcher.pairs})

    def _show_pairs(self, pairs: dict[tuple[NodeName, NodeName], PairState]) -> None:
        for pair in self._pairs.keys() - pairs.keys():
            self._metrics.forget_pair(*pair)
        for (writer, target), state in pairs.items():
            if self._pairs.get((writer, target)) is not state:
                self._metrics.set_pair(writer, target, state is PairState.READY)
                self._recorder.event(writer, f"KV path {state.value}", to=target)
        self._pairs = pairs

    # ── what is asked ────────────────────────────────────────────────────────────────────────────────────────────────

    def receipt(self, record: RoutedSequence) -> Receipt:
        """What happened to it so far."""
        return make_receipt(record, self._model, self._clock(), self._since_epoch_s)

    def find(self, request_id: str, key: str | None) -> Receipt | None:
        """Of a request of `key`, or of whoever's if that is None, that is over; if it is still remembered."""
        return self._book.get(request_id, key)

    def request_id(self, seq: SeqId) -> str | None:
        """Of a sequence that is over, if it is still remembered."""
        return self._request_ids.get(seq)

    def latest(self, limit: int, running: Iterable[RoutedSequence], key: str | None) -> list[Receipt]:
        """Those that came last, the last one first; only those of `key`, unless it is None."""
        receipts = [*self._book, *(self.receipt(record) for record in running)]
        receipts = [receipt for receipt in receipts if key in (None, receipt.key)]
        return sorted(receipts, key=lambda receipt: receipt.arrived_at, reverse=True)[:limit]

    def trace(self, seconds: float | None, running: Iterable[RoutedSequence]) -> Iterator[bytes]:
        """Of the last `seconds`, or of all that is remembered."""
        flown = (FlownRequest(record.timeline.arrived, self.receipt(record)) for record in running)
        return trace_pieces(self._recorder.recording(seconds, flown))


def block_counts(gauges: Gauges) -> dict[BlockState, int]:
    return {
        "free": gauges.blocks_free,
        "cached": gauges.blocks_cached,
        "used": gauges.blocks_used,
        "granted": gauges.blocks_granted,
        "held": gauges.blocks_held,
        "quarantined": gauges.blocks_quarantined,
    }


def _sequence_counts(gauges: Gauges) -> dict[SequenceState, int]:
    return {"waiting": gauges.waiting, "running": gauges.running, "queued": gauges.queued}
