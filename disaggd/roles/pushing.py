"""`Pushing`: the blocks that a node writes into other nodes' grants, from the first to the proof that nothing more is under way.

Runs on the compute thread. A push holds a reference on each block it reads until that write has ended. What became of a grant is
remembered, so that a late `Cancel` is answered and a late job refused. Knows nothing of what computed the blocks: the role says when
they are there, and what follows when a push has ended.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from disaggd.cluster.hello import ConnectPair, PairLost, PairReady
from disaggd.cluster.holdings import Holding
from disaggd.cluster.protocol import Cancel, Grant, Progress, Quiesced, ToNode
from disaggd.engine.blocks import BlockPool
from disaggd.errors import InvalidRequest
from disaggd.ids import AgentId, BlockId, GrantToken, NodeName, SeqId
from disaggd.roles.compute import LinkId, Outbox
from disaggd.roles.portions import portions, span
from disaggd.roles.source_reads import SourceReads
from disaggd.transfer import messages as transfer
from disaggd.transfer.notification import FirstToken

log = logging.getLogger(__name__)

TOMBSTONES = 4096
"""Grants that are remembered after they ended: long past any message that may still speak of them."""

RENEWALS_PER_LEASE = 5
"""A lease survives four lost or late renewals."""


@dataclass(slots=True)
class Push:
    """A grant that is being written."""

    grant: Grant
    block_size: int
    """Tokens in a block of the target's."""
    seq: SeqId
    attempt: int
    link: LinkId
    began_at: float
    stopped_at: float | None = None
    """When it was told to post nothing more."""
    cancels: list[LinkId] = field(default_factory=list)
    """Routers that passed on a `Cancel` and wait for `Quiesced`."""


@dataclass(frozen=True, slots=True)
class Tombstone:
    """What became of a grant."""

    link: LinkId
    target: NodeName
    clean: bool
    finished: bool
    """All of it was pushed: the target learns that by itself."""


def layer_groups(num_layers: int, size: int) -> tuple[range, ...]:
    """What writes of `size` layers each take, one after the other."""
    return tuple(range(start, min(start + size, num_layers)) for start in range(0, num_layers, size))


class Pushing:
    """One node's pushes. `submit` takes commands to the transfer thread; `clock` is monotonic seconds.

    `max_write_tokens`: a write takes no more blocks than hold so many, for staging memory has room for those.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_write_tokens: int,
        lease_s: float,
        quiesce_s: float,
        outbox: Outbox,
        submit: Callable[[transfer.TransferCommand], None],
        clock: Callable[[], float],
    ) -> None:
        self._pool = pool
        self._max_write_tokens = max_write_tokens
        self._renew_every_s = lease_s / RENEWALS_PER_LEASE
        self._quiesce_s = quiesce_s
        self._outbox = outbox
        self._submit = submit
        self._clock = clock
        self._pushes: dict[GrantToken, Push] = {}
        self._tombstones: OrderedDict[GrantToken, Tombstone] = OrderedDict()
        self._ready: dict[NodeName, AgentId] = {}
        """Nodes whose agent has confirmed the probe."""
        self._block_sizes: dict[NodeName, int] = {}
        """Of the nodes that we were told to connect to."""
        self._renew_at = 0.0
        self._reads = SourceReads[Push](pool)

    # ── pairs ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def on_frame(self, frame: ToNode) -> bool:
        """Whether it is a frame about the pairs that this node writes over: then it is dealt with, whatever the node's role."""
        match frame:
            case ConnectPair():
                self._connect(frame)
            case PairReady(peer, agent_id):
                if peer in self._block_sizes:  # else no router of ours says so
                    self._ready[peer] = agent_id
            case _:
                return False
        return True

    def on_event(self, event: transfer.TransferEvent) -> bool:
        """Whether it is an event of those pairs, or of a handle: then it is dealt with. The end of a push is its role's matter too."""
        match event:
            case transfer.PairConnected(peer):
                log.info("probing the KV path to %s", peer)
            case transfer.PairFailed():
                self._pair_failed(event)
            case transfer.HandleDone(token, source):
                self._reads.end(token, source)
            case _:
                return False
        return True

    def _connect(self, frame: ConnectPair) -> None:
        if self._ready.get(frame.peer) != frame.agent_id:  # else another router asks for what is there: probe once more for it
            self._ready.pop(frame.peer, None)
        self._block_sizes[frame.peer] = frame.kv.block_size
        self._submit(transfer.ConnectPair(frame.peer, frame.peer_incarnation, frame.endpoints, frame.kv))

    def _pair_failed(self, event: transfer.PairFailed) -> None:
        if self._ready.get(event.peer) == event.agent_id:
            del self._ready[event.peer]
        self._outbox.broadcast(PairLost(event.peer, event.agent_id, event.reason, event.for_good))

    # ── a push ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def check(self, grant: Grant, num_tokens: int) -> None:
        """Raises InvalidRequest for a grant that may not be written, or does not hold the first `num_tokens` of its sequence."""
        start, end = grant.first_token_index, self.end_of(grant)
        if start < 0 or start % self._block_sizes[grant.target] or num_tokens > end:
            raise InvalidRequest(f"a grant of {len(grant.block_ids)} blocks from token {start} does not hold {num_tokens} tokens")

    def end_of(self, grant: Grant) -> int:
        """Where the grant ends, in tokens of its sequence. Raises InvalidRequest if it may not be written."""
        if self.is_known(grant.token):
            raise InvalidRequest("the grant was revoked before its job came")
        if self._ready.get(grant.target) != grant.agent_id:
            # The router believes in a pair that is gone, perhaps since another router told us to connect elsewhere.
            self._outbox.broadcast(PairLost(grant.target, grant.agent_id, "not connected"))
            raise InvalidRequest(f"no KV path to that agent of {grant.target}")
        return grant.first_token_index + len(grant.block_ids) * self._block_sizes[grant.target]

    def blocks_of(self, target: NodeName, num_tokens: int) -> int | None:
        """Blocks of the target's that so many tokens take; None if we were not told to connect to it."""
        size = self._block_sizes.get(target)
        return None if size is None else -(-num_tokens // size)

    def is_known(self, token: GrantToken) -> bool:
        """Whether the grant is being written, or was, or was revoked before."""
        return token in self._tombstones or token in self._pushes

    def begin(self, grant: Grant, seq: SeqId, attempt: int, link: LinkId) -> None:
        """The grant was checked just now."""
        self._pushes[grant.token] = Push(grant, self._block_sizes[grant.target], seq, attempt, link, self._clock())
        self._submit(transfer.BeginPush(grant.token, grant.target, grant.agent_id, grant.lease_s, grant.verify))

    def whole(self, grant: Grant, num_tokens: int) -> int:
        """How many of a sequence's first `num_tokens` fill blocks of the target's."""
        return num_tokens - num_tokens % self._pushes[grant.token].block_size

    def write(self, grant: Grant, layers: range, table: Sequence[BlockId], tokens: range, is_ready: transfer.IsReady) -> None:
        """Push these layers of `tokens` of the sequence whose blocks are `table`: one handle, or more if they are many.

        `tokens` begin and end with `whole` blocks of the target's, but for the end of what is to be pushed. Those that the grant leaves
        out, which the target has cached, are left out here.
        """
        push, first = self._pushes[grant.token], grant.first_token_index
        size = push.block_size
        for part in portions(range(max(tokens.start, first), tokens.stop), size, self._max_write_tokens):
            source = span(table, self._pool.block_size, part)
            target = grant.block_ids[(part.start - first) // size : -(-(part.stop - first) // size)]
            self._reads.begin(grant.token, push, source.blocks)
            self._submit(transfer.PushBlocks(grant.token, layers, source, target, is_ready))

    def finish(self, token: GrantToken, first: FirstToken | None) -> None:
        """All blocks are submitted. `first` None: the target expects no token with them."""
        self._submit(transfer.FinishPush(token, first))

    def stop(self, token: GrantToken) -> None:
        """Post nothing more. Harmless for a push that has ended."""
        if (push := self._pushes.get(token)) is not None:
            push.stopped_at = push.stopped_at or self._clock()
            self._submit(transfer.CancelPush(token))

    def stop_all(self, link: LinkId) -> None:
        """Stop every push into a grant that this router forwarded."""
        for token in [token for token, push in self._pushes.items() if push.link == link]:
            self.stop(token)

    def cancel(self, frame: Cancel, link: LinkId) -> bool:
        """Whether the grant is being pushed: then it is to be stopped, and `Quiesced` said when nothing is in flight.

        A grant that we do not know (yet) is never written.
        """
        if (push := self._pushes.get(frame.token)) is not None:
            push.cancels.append(link)
            return True
        stone = self._tombstones.get(frame.token)
        if stone is None:
            stone = self._bury(frame.token, Tombstone(link, frame.target, clean=True, finished=False))
        self._outbox.send(link, Quiesced(frame.token, frame.target, stone.clean))
        return False

    def refuse(self, grant: Grant, link: LinkId) -> None:
        """A grant came that is not to be written: its target hears so, once nothing is in flight."""
        if self.cancel(Cancel(grant.token, grant.writer, grant.target), link):
            self.stop(grant.token)

    def ended(self, event: transfer.PushEnded) -> Push:
        """Nothing is in flight for this grant any more, and nothing will be: whoever asked is told."""
        push = self._pushes.pop(event.token)
        self._bury(event.token, Tombstone(push.link, push.grant.target, event.clean, event.finished))
        for link in push.cancels:
            self._outbox.send(link, Quiesced(event.token, push.grant.target, event.clean))
        if not event.finished:  # the target may have no router that could ask for it
            self._submit(transfer.QuiesceByWire(event.token, push.grant.target, event.clean))
        elif event.clean:  # its last piece may lie in the kernel's buffers for a while, and nobody renews the lease from now on
            self._outbox.send(push.link, Progress((event.token,)))
        return push

    def link_down(self, link: LinkId) -> None:
        """Grants of this router that ended are quiesced without it: its `Quiesced` may have been lost with it."""
        for token, stone in self._tombstones.items():
            if stone.link == link and not stone.finished:
                self._submit(transfer.QuiesceByWire(token, stone.target, stone.clean))

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def tick(self) -> None:
        """Leases to renew, and nodes that take what is in flight for so long that their pair is given up."""
        self.renew_leases()
        overdue = self._clock() - self._quiesce_s
        stopped = [push for push in self._pushes.values() if push.stopped_at is not None and push.stopped_at <= overdue]
        for peer in {push.grant.target for push in stopped}:
            self._close_pair(peer)

    def next_deadline(self) -> float | None:
        return self._renew_at if self._pushes else None

    def renew_leases(self) -> None:
        """Both sides count the lease on their own clock; this renews it on both. May be called in the middle of a step."""
        now = self._clock()
        if not self._pushes or now < self._renew_at:
            return
        self._renew_at = now + self._renew_every_s
        by_link: dict[LinkId, list[GrantToken]] = {}
        for token, push in self._pushes.items():
            self._submit(transfer.RenewLease(token))
            by_link.setdefault(push.link, []).append(token)
        for link, tokens in by_link.items():
            self._outbox.send(link, Progress(tuple(tokens)))
        self._outbox.flush()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._pushes

    @property
    def num_blocks_held(self) -> int:
        """Blocks that only pushes hold on to."""
        return self._reads.num_held

    def holdings(self) -> Iterator[Holding]:
        """Those blocks, by push."""
        now = self._clock()
        for push, blocks in self._reads.held():
            yield Holding(
                state="held",
                memory="pool",
                blocks=blocks,
                seq=push.seq,
                attempt=push.attempt,
                peer=push.grant.target,
                age_s=now - push.began_at,
                reason="" if push.stopped_at is None else f"told to stop {now - push.stopped_at:.1f} s ago; its writes have not ended",
            )

    def _close_pair(self, peer: NodeName) -> None:
        """No error comes from a peer that hangs: destroying our agent is what ends its handles, and frees their blocks."""
        if (agent_id := self._ready.pop(peer, None)) is not None:
            log.warning("%s takes nothing any more: closing the KV path to it", peer)
            self._submit(transfer.ClosePair(peer))
            self._outbox.broadcast(PairLost(peer, agent_id, "writes to it do not end"))

    def _bury(self, token: GrantToken, stone: Tombstone) -> Tombstone:
        self._tombstones[token] = stone
        while len(self._tombstones) > TOMBSTONES:
            self._tombstones.popitem(last=False)
        return stone
