"""Which grants prefill nodes have, and what decode and prefill say to each other about them.

Runs on the router's loop. Engine nodes have no control link to each other: renewals, cancels and quiesces pass here.
"""

from disaggd.cluster.peers import DecodePeer, PrefillPeer
from disaggd.cluster.protocol import Cancel, Grant, Progress, Quiesced
from disaggd.ids import GrantToken, NodeName


class GrantRelay:
    """Every grant from its forwarding until it landed, was quiesced, or lost its decode node."""

    def __init__(self, prefills: dict[NodeName, PrefillPeer], decodes: dict[NodeName, DecodePeer]) -> None:
        self._prefills = prefills
        self._decodes = decodes
        self._forwarded: dict[GrantToken, Grant] = {}

    def __len__(self) -> int:
        return len(self._forwarded)

    def forwarded(self, grant: Grant) -> None:
        self._forwarded[grant.token] = grant

    def landed(self, grant: Grant) -> None:
        self._forwarded.pop(grant.token, None)

    def decode_down(self, name: NodeName) -> None:
        self._forwarded = {token: grant for token, grant in self._forwarded.items() if grant.decode != name}

    def on_cancel(self, decode: DecodePeer, frame: Cancel) -> None:
        """To the prefill node, if it ever had the grant; else nobody will write, and we say so for it."""
        if frame.token not in self._forwarded:
            decode.send(Quiesced(frame.token, frame.decode, True))
        elif (prefill := self._prefills.get(frame.prefill)) is not None:
            prefill.send(frame)
        else:  # the prefill node is lost: only its notification over NIXL, or a fence, can end the quarantine
            del self._forwarded[frame.token]

    def on_quiesced(self, frame: Quiesced) -> None:
        self._forwarded.pop(frame.token, None)
        if (decode := self._decodes.get(frame.decode)) is not None:
            decode.send(frame)

    def on_progress(self, frame: Progress) -> None:
        """Renewals, gathered by decode node."""
        by_decode: dict[NodeName, list[GrantToken]] = {}
        for token in frame.tokens:
            if (grant := self._forwarded.get(token)) is not None:
                by_decode.setdefault(grant.decode, []).append(token)
        for name, tokens in by_decode.items():
            if (decode := self._decodes.get(name)) is not None:
                decode.send(Progress(tuple(tokens)))
