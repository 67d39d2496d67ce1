"""Notifications survive the wire; what is not one of ours is told apart."""

import pytest

from disaggd.ids import AgentId, GrantToken
from disaggd.sampling import TokenLogprob
from disaggd.transfer.notification import AnyNotification, Connect, FirstToken, Piece, WireQuiesced, decode, encode

TOKEN = GrantToken(bytes(range(16)))


@pytest.mark.parametrize(
    "notification",
    [
        Connect(AgentId("f00"), 0),
        Piece(TOKEN, 1, 2, 1 << 40),
        Piece(TOKEN, 0, 3, 0, total=4, first=FirstToken(9, TokenLogprob(-0.25, ((9, -0.25),)))),
        WireQuiesced(TOKEN, clean=False),
    ],
)
def test_round_trip(notification: AnyNotification) -> None:
    assert decode(encode(notification)) == notification


@pytest.mark.parametrize("raw", [b"", b"hello", b"\xc1", b"\x92\xa7Connect", b"\x92\xa7Unknown\xa1x", b"\x92\xa7Connect\x01"])
def test_foreign_bytes_are_none(raw: bytes) -> None:
    assert decode(raw) is None


def test_bytes_that_no_string_is_made_of_are_no_notification() -> None:
    """What an agent heard once ended the whole node: a decoder may raise more than its own errors."""
    raw = encode(Connect(AgentId("agent"), 0))
    assert decode(raw.replace(b"agent", b"\xffgent")) is None
    assert decode(b"\x93\xa5Piece" + b"\x91" * 100_000) is None
