"""What one agent tells another over NIXL: msgpack, tagged, never a pickle. Knows no NIXL.

A write carries a `Piece` that arrives after its bytes; the others travel alone. The sender's name in a notification is
self-declared, so nothing here trusts it: what counts is the agent at which a notification came in, and the token.
"""

import msgspec

from disaggd.ids import AgentId, BlockId, GrantToken
from disaggd.sampling import TokenLogprob
from disaggd.wire import SmallCount, Undecodable, WireDecoder


class Notification(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The base of every notification."""


class FirstToken(msgspec.Struct, frozen=True, array_like=True):
    """The token that the prefill sampled, with its logprob if the request asked for logprobs."""

    token: SmallCount
    logprob: TokenLogprob | None = None


class Connect(Notification, frozen=True):
    """The probe: an agent that receives its own id is the one that the sender's metadata speaks of."""

    agent_id: AgentId
    rank: int
    """The sender's."""


class Checksums(msgspec.Struct, frozen=True, array_like=True):
    """Of the blocks that a write has put into a grant: one each, over those layers in order (`checksum.py`)."""

    first_layer: int
    num_layers: int
    blocks: tuple[BlockId, ...]
    """The target's."""
    crcs: tuple[int, ...]


class Piece(Notification, frozen=True):
    """One of the notifications {0 … total−1} by which a rank of one node tells a rank of another what it has written into a grant."""

    token: GrantToken
    rank: int
    seq: int
    kv_bytes: int
    """Bytes that the write it rides on has put into the granted blocks; 0 if it travels alone."""
    total: int | None = None
    """On the rank's last piece: how many there are."""
    first: FirstToken | None = None
    sums: Checksums | None = None
    """Where the target asked for them, on each piece that rides on a write."""


class WireQuiesced(Notification, frozen=True):
    """Nothing more will be written for this grant; sent when there is no router to carry the `Quiesced` frame."""

    token: GrantToken
    clean: bool


AnyNotification = Connect | Piece | WireQuiesced

_decode = WireDecoder[AnyNotification](AnyNotification)


def encode(notification: AnyNotification) -> bytes:
    """The bytes that NIXL carries."""
    return msgspec.msgpack.encode(notification)


def decode(raw: bytes) -> AnyNotification | None:
    """The inverse; None for bytes that are no notification of ours."""
    try:
        return _decode(raw)
    except Undecodable:
        return None
