"""Which grants are out, and what their targets and writers say to each other about them.

Runs on the router's loop. Engine nodes have no control link to each other: renewals, cancels and quiesces pass here.
"""

from dataclasses import dataclass

from disaggd.cluster.peers import DecodePeer, Peer, PrefillPeer
from disaggd.cluster.protocol import Cancel, Grant, Progress, Quiesced
from disaggd.ids import GrantToken, NodeName, SeqId


@dataclass(slots=True)
class Forwarded:
    """A grant that its writer was given."""

    job: tuple[SeqId, int]
    target: NodeName
    writer: Peer
    """The very link it went out on: a node that was restarted under the same name knows nothing of it."""
    num_renewed: int = 0


class GrantRelay:
    """Every grant from its forwarding until it landed, was cancelled, or lost its target."""

    def __init__(self, prefills: dict[NodeName, PrefillPeer], decodes: dict[NodeName, DecodePeer]) -> None:
        self._prefills = prefills
        self._decodes = decodes
        self._forwarded: dict[GrantToken, Forwarded] = {}

    def __len__(self) -> int:
        return len(self._forwarded)

    def forwarded(self, job: tuple[SeqId, int], grant: Grant, writer: Peer) -> None:
        self._forwarded[grant.token] = Forwarded(job, grant.target, writer)

    def over(self, job: tuple[SeqId, int], target: NodeName) -> None:
        """The job's grant of `target` landed, or was fenced: nobody will cancel it."""
        self._forwarded = {token: to for token, to in self._forwarded.items() if (to.job, to.target) != (job, target)}

    def num_renewed(self, token: GrantToken) -> int | None:
        """So often its writer has renewed its lease; None for a grant that is not out."""
        to = self._forwarded.get(token)
        return None if to is None else to.num_renewed

    def concerns(self, name: NodeName) -> bool:
        """Whether a grant is out that the node gave, or was given: what it wrote may not have been taken in yet."""
        return any(name in (to.target, to.writer.name) for to in self._forwarded.values())

    def target_down(self, name: NodeName) -> None:
        self._forwarded = {token: to for token, to in self._forwarded.items() if to.target != name}

    def on_cancel(self, target: Peer, frame: Cancel) -> None:
        """To the writer, if it ever had the grant; else nobody will write, and we say so for it.

        A target cancels a grant once. When the link that had it is lost, only a notification over NIXL or a fence may
        end the quarantine: the node's next start would call the grant unknown, with its last one's bytes under way.
        """
        to = self._forwarded.pop(frame.token, None)
        if to is None:
            target.send(Quiesced(frame.token, frame.target, True))
        elif self._peer(frame.writer) is to.writer:
            to.writer.send(frame)

    def on_quiesced(self, frame: Quiesced) -> None:
        if (target := self._peer(frame.target)) is not None:
            target.send(frame)

    def on_progress(self, frame: Progress) -> None:
        """Renewals, gathered by target."""
        by_target: dict[NodeName, list[GrantToken]] = {}
        for token in frame.tokens:
            if (to := self._forwarded.get(token)) is not None:
                to.num_renewed += 1
                by_target.setdefault(to.target, []).append(token)
        for name, tokens in by_target.items():
            if (target := self._peer(name)) is not None:
                target.send(Progress(tuple(tokens)))

    def _peer(self, name: NodeName) -> Peer | None:
        return self._prefills.get(name) or self._decodes.get(name)
