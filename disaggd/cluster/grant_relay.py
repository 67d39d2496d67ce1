"""Which grants prefill nodes have, and what decode and prefill say to each other about them.

Runs on the router's loop. Engine nodes have no control link to each other: renewals, cancels and quiesces pass here.
"""

from dataclasses import dataclass

from disaggd.cluster.peers import DecodePeer, PrefillPeer
from disaggd.cluster.protocol import Cancel, Grant, Progress, Quiesced
from disaggd.ids import GrantToken, NodeName, SeqId


@dataclass(frozen=True, slots=True)
class Forwarded:
    """A grant that a prefill node was given."""

    job: tuple[SeqId, int]
    decode: NodeName
    prefill: PrefillPeer
    """The very link it went out on: a node that was restarted under the same name knows nothing of it."""


class GrantRelay:
    """Every grant from its forwarding until it landed, was cancelled, or lost its decode node."""

    def __init__(self, prefills: dict[NodeName, PrefillPeer], decodes: dict[NodeName, DecodePeer]) -> None:
        self._prefills = prefills
        self._decodes = decodes
        self._forwarded: dict[GrantToken, Forwarded] = {}

    def __len__(self) -> int:
        return len(self._forwarded)

    def forwarded(self, job: tuple[SeqId, int], grant: Grant, prefill: PrefillPeer) -> None:
        self._forwarded[grant.token] = Forwarded(job, grant.decode, prefill)

    def over(self, job: tuple[SeqId, int]) -> None:
        """It landed, or was fenced: nobody will cancel it."""
        self._forwarded = {token: to for token, to in self._forwarded.items() if to.job != job}

    def decode_down(self, name: NodeName) -> None:
        self._forwarded = {token: to for token, to in self._forwarded.items() if to.decode != name}

    def on_cancel(self, decode: DecodePeer, frame: Cancel) -> None:
        """To the prefill node, if it ever had the grant; else nobody will write, and we say so for it.

        Decode cancels a grant once. When the link that had it is lost, only a notification over NIXL or a fence may
        end the quarantine: the node's next start would call the grant unknown, with its last one's bytes under way.
        """
        to = self._forwarded.pop(frame.token, None)
        if to is None:
            decode.send(Quiesced(frame.token, frame.decode, True))
        elif self._prefills.get(frame.prefill) is to.prefill:
            to.prefill.send(frame)

    def on_quiesced(self, frame: Quiesced) -> None:
        if (decode := self._decodes.get(frame.decode)) is not None:
            decode.send(frame)

    def on_progress(self, frame: Progress) -> None:
        """Renewals, gathered by decode node."""
        by_decode: dict[NodeName, list[GrantToken]] = {}
        for token in frame.tokens:
            if (to := self._forwarded.get(token)) is not None:
                by_decode.setdefault(to.decode, []).append(token)
        for name, tokens in by_decode.items():
            if (decode := self._decodes.get(name)) is not None:
                decode.send(Progress(tuple(tokens)))
