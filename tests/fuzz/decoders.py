"""Bytes from whoever found the port: into the handshake of either end, and into every decoder there is."""

import asyncio
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from hypothesis import strategies as st

from disaggd.cluster.handshake import Greeting, Greetings, UnexpectedFrame, meet_node, meet_router
from disaggd.cluster.hello import PROTOCOL_VERSION, NodeHello, RouterHello
from disaggd.cluster.link import decode_from_node, decode_from_router
from disaggd.cluster.protocol import Frame, ToNode, ToRouter
from disaggd.config import NodeConfig
from disaggd.errors import HelloRefused
from disaggd.ids import Incarnation, NodeName
from disaggd.transfer.layout import KVSpec
from disaggd.transfer.notification import AnyNotification, Notification, decode
from disaggd.units import Address
from disaggd.wire import Undecodable
from tests.fuzz import wild
from tests.fuzz.surface import Surface

KV = KVSpec(dtype="float32", block_size=64, head_dim=16, groups=())
ROUTER = RouterHello(PROTOCOL_VERSION, NodeName("r0"), Incarnation("r-1"), "model")
NODE = NodeHello(PROTOCOL_VERSION, NodeName("p0"), "prefill", Incarnation("p-1"), "model", KV, 100, 4096)
CONFIG = NodeConfig(name=NodeName("p0"), role="prefill", listen=Address("127.0.0.1:1"))


class Gone(Exception):
    """The peer says no more."""


def check_handshake(case: tuple[Literal["router", "node"], Sequence[bytes]]) -> None:
    """Whatever the peer says, it is believed or refused, by the exceptions that links expect."""
    end, messages = case
    said = list(messages)

    async def receive() -> bytes:
        if not said:
            raise Gone
        return said.pop(0)

    async def send(message: bytes) -> None:
        assert message

    greeting = Greeting(send, receive, None)
    meeting: Any = meet_router(greeting, lambda _: NODE) if end == "node" else meet_node(greeting, ROUTER, CONFIG)
    try:
        asyncio.run(meeting)
    except (Gone, Undecodable, UnexpectedFrame, HelloRefused):
        return


def check_decoders(raw: bytes) -> None:
    """A frame, a notification, or none."""
    for decoder in (decode_from_node, decode_from_router):
        try:
            assert isinstance(decoder(raw), Frame)
        except Undecodable:
            continue
    assert isinstance(decode(raw), Notification | None)


HANDSHAKE_LIVE: wild.Live = {
    "version": st.just(PROTOCOL_VERSION),
    "model_id": st.just("model"),
    "role": st.just("prefill"),
    "kv": st.just(KV),
}
frames = wild.frames(ToNode, {}) | wild.frames(ToRouter, {}) | wild.frames(AnyNotification, {}) | wild.frames(Greetings, HANDSHAKE_LIVE)
encoded = frames.map(msgspec.msgpack.encode)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A frame with bytes changed, or cut off."""
    raw = draw(encoded)
    at = draw(st.integers(0, len(raw)))
    return raw[:at] + draw(st.binary(max_size=3)) + raw[at + draw(st.integers(0, 3)) :]


_MONSTERS = st.sampled_from(
    (b"\x91" * 50_000, b"\x92\xa4Ping" + b"\x91" * 50_000, b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x81" * 50_000)
)
messages = st.one_of(encoded, damaged(), damaged(), _MONSTERS, st.binary(max_size=40))
greetings = st.one_of(wild.frames(Greetings, HANDSHAKE_LIVE).map(msgspec.msgpack.encode), messages)

HANDSHAKE = Surface(
    "handshakes, both ends",
    st.tuples(st.sampled_from(("router", "node")), st.lists(greetings, max_size=4)),
    check_handshake,
    quick=100,
    share=0.06,
)
DECODERS = Surface("bytes to the decoders", messages, check_decoders, quick=200, share=0.12)
