"""`PatternPushes`: patterns that are written into blocks here, and pushed to whoever granted some for them. Runs on the compute thread.

A pattern takes the way of all KV: the same layer groups, the same source, the same pair. Its blocks are nobody else's until the last
write has read them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from disaggd.cluster.check_frames import CheckStep, PatternPushed, PushPattern, RankPush
from disaggd.cluster.protocol import Quiesced
from disaggd.engine.engine import Engine
from disaggd.ids import GrantToken, NodeName, SeqId
from disaggd.roles.compute import LinkId, Outbox
from disaggd.roles.pattern_intake import NO_ROOM, Patterns
from disaggd.roles.pushing import Pushing
from disaggd.transfer import messages as transfer


@dataclass(frozen=True, slots=True, kw_only=True)
class WayOut:
    """How KV leaves a node."""

    transport: str
    """What carries it, in words."""
    layer_groups: tuple[range, ...]
    """What one write takes, of a model's layers."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """A pattern that is being written."""

    link: LinkId
    check: int


class PatternPushes:
    """One node's. `mark()` tells of what the device was asked to compute so far whether it is done."""

    def __init__(
        self,
        name: NodeName,
        engine: Engine,
        *,
        patterns: Patterns | None,
        pushing: Pushing,
        way: WayOut,
        outbox: Outbox,
        mark: Callable[[], transfer.IsReady],
    ) -> None:
        self._name = name
        self._engine = engine
        self._patterns = patterns
        self._pushing = pushing
        self._way = way
        self._outbox = outbox
        self._mark = mark
        self._pushed: dict[GrantToken, Pushed] = {}

    def push(self, link: LinkId, frame: PushPattern) -> None:
        """Fill blocks with the pattern and push them, if some are free."""
        grant, pool = frame.grant, self._engine.pool
        num_blocks = pool.blocks_for(frame.num_tokens)
        if self._patterns is None or not pool.room_for_grant(num_blocks, self._engine.num_running):
            return self._refuse(link, frame, "no_room", f"{self._name}: {NO_ROOM}")
        if self._pushing.is_known(grant.token):
            return self._refuse(link, frame, "failed", "the grant was revoked")
        if grant.first_token_index or self._pushing.blocks_of(grant.target, frame.num_tokens) != len(grant.block_ids):
            return self._refuse(link, frame, "failed", f"no KV path to {grant.target}, or the grant is of another size")
        blocks = pool.allocate(num_blocks)
        assert blocks is not None, "room was checked"
        self._patterns.fill(blocks, frame.salt)
        is_ready = self._mark()
        self._pushed[grant.token] = Pushed(link, frame.check)
        self._pushing.begin(grant, SeqId(f"check-{frame.check}"), 0, link)
        for layers in self._way.layer_groups:
            self._pushing.write(grant, layers, blocks, range(frame.num_tokens), is_ready)
        self._pushing.finish(grant.token, None)
        return pool.release(blocks)  # the writes hold on to them

    def _refuse(self, link: LinkId, frame: PushPattern, step: CheckStep, reason: str) -> None:
        self._pushing.refuse(frame.grant, link)
        self._report(link, frame.check, step, reason)

    def knows(self, token: GrantToken) -> bool:
        """Whether a pattern is being pushed into that grant."""
        return token in self._pushed

    def ended(self, event: transfer.PushEnded) -> None:
        """Nothing of it is in flight any more."""
        pushed = self._pushed.pop(event.token)
        push = self._pushing.ended(event)
        if not (event.clean and event.finished):
            self._outbox.send(pushed.link, Quiesced(event.token, push.grant.target, event.clean))
            return self._report(pushed.link, pushed.check, "failed", "the push was stopped" if event.clean else "the push failed")
        return self._report(pushed.link, pushed.check, "done", "", tuple(map(_by_rank, event.sent)))

    def link_down(self, link: LinkId) -> None:
        """Its router is gone: nobody reads the pattern."""
        for token in [token for token, pushed in self._pushed.items() if pushed.link == link]:
            self._pushing.stop(token)

    def _report(self, link: LinkId, check: int, step: CheckStep, reason: str, pushes: tuple[RankPush, ...] = ()) -> None:
        self._outbox.send(link, PatternPushed(check, step, reason, self._way.transport, pushes))


def _by_rank(sent: transfer.Sent) -> RankPush:
    leg = sent.leg
    return RankPush(
        writer_rank=leg.rank,
        target_rank=leg.target_rank,
        first_head=leg.heads.start,
        num_heads=len(leg.heads),
        path=leg.path,
        kv_bytes=sent.kv_bytes,
        seconds=sent.last_done_at - sent.first_post_at,
    )
