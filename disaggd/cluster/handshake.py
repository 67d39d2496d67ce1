"""How the two ends of a new link come to know, and to believe, each other. Knows no socket and no clock.

```
router                                            engine node
  │ ── RouterHello, with a nonce ───────────────►  │   HelloRejected: another version
  │ ◄────────────────────── Challenge, a nonce ──  │
  │ ── Proof ───────────────────────────────────►  │   HelloRejected: another secret, node or model
  │ ◄──────────────────────── NodeHello, Proof ──  │   the router refuses: another secret, node, role or model
```

A proof is an HMAC, keyed by the cluster's secret, over everything that both ends have said on this link so far, earlier proofs
included. So the secret never crosses the wire, a recorded handshake answers no other nonce, a proof that is sent back proves
nothing, and one that was meant for p0 convinces only p0. Whoever does not know the secret learns no more than our version.
Frames after the handshake carry no proof: that is TLS's part.
"""

import hmac
import secrets
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

from disaggd.cluster.hello import PROTOCOL_VERSION, Challenge, Frame, HelloRejected, NodeHello, Proof, RouterHello
from disaggd.config import NodeConfig
from disaggd.errors import HelloRefused
from disaggd.wire import WireDecoder

SECRET_FIELD = "secret"
"""Of a `HelloRejected` for a wrong proof; it tells no value."""
_NONCE_BYTES = 32
_MAX_QUOTED = 80
"""Characters of a refusal that go into a log."""

_encode = msgspec.msgpack.Encoder().encode
Greetings = RouterHello | Challenge | Proof | NodeHello | HelloRejected

_decode = WireDecoder[Greetings](Greetings)

Expected = TypeVar("Expected", RouterHello, Challenge, Proof, NodeHello)


class SecretRefused(HelloRefused):
    """One end does not know the other's secret. Says no more: the values are secrets."""

    def __init__(self) -> None:
        super().__init__(SECRET_FIELD, None, None)

    def __str__(self) -> str:
        return "the cluster secrets differ"


class UnexpectedFrame(Exception):
    """The peer does not follow the handshake."""


class Greeting:
    """The frames of one handshake, and what they prove. Sends and receives whole messages."""

    def __init__(self, send: Callable[[bytes], Awaitable[None]], receive: Callable[[], Awaitable[bytes]], secret: str | None) -> None:
        self._send = send
        self._receive = receive
        self._said = hmac.new((secret or "").encode(), digestmod="sha256")
        """Keyed, and fed with every message of both ends in their order."""

    async def say(self, frame: Frame) -> None:
        message = _encode(frame)
        self._note(message)
        await self._send(message)

    async def hear(self, kind: type[Expected]) -> Expected:
        """The next frame. Raises HelloRefused for the peer's refusal, UnexpectedFrame for anything but `kind`."""
        message = await self._receive()
        frame = _decode(message)
        if isinstance(frame, HelloRejected):
            field, theirs, ours = (text[:_MAX_QUOTED] for text in (frame.field, frame.ours, frame.theirs))  # from anybody
            raise SecretRefused if field == SECRET_FIELD else HelloRefused(field, ours, theirs)
        if not isinstance(frame, kind):
            raise UnexpectedFrame(f"{type(frame).__name__} instead of {kind.__name__}")
        self._note(message)
        return frame

    async def prove(self) -> None:
        """That we know the secret, and heard what the peer said."""
        await self.say(Proof(self._said.digest()))

    async def is_proven(self) -> bool:
        """Whether the peer's next frame proves the same."""
        expected = self._said.digest()
        return hmac.compare_digest(expected, (await self.hear(Proof)).mac)

    def _note(self, message: bytes) -> None:
        """With its length: two messages never read as one."""
        self._said.update(len(message).to_bytes(4, "big") + message)


async def meet_router(
    greeting: Greeting, answer: Callable[[RouterHello], NodeHello | HelloRejected]
) -> tuple[RouterHello, HelloRejected | None]:
    """The engine node's part: the router's hello, and why it was refused, if it was.

    `answer` is asked once the router has proved that it knows the secret. Raises UnexpectedFrame and Undecodable.
    """
    theirs = await greeting.hear(RouterHello)
    refusal = HelloRejected("version", str(PROTOCOL_VERSION), str(theirs.version)) if theirs.version != PROTOCOL_VERSION else None
    if refusal is None:
        await greeting.say(Challenge(secrets.token_bytes(_NONCE_BYTES)))
        reply = _answer(theirs, answer) if await greeting.is_proven() else HelloRejected(SECRET_FIELD, "", "")
        if isinstance(reply, NodeHello):
            await greeting.say(reply)
            await greeting.prove()
            return theirs, None
        refusal = reply
    await greeting.say(refusal)
    return theirs, refusal


def _answer(theirs: RouterHello, answer: Callable[[RouterHello], NodeHello | HelloRejected]) -> NodeHello | HelloRejected:
    reply = answer(theirs)
    if isinstance(reply, NodeHello):
        for field, ours, asked in (("name", reply.name, theirs.node), ("model_id", reply.model_id, theirs.model_id)):
            if ours != asked:
                return HelloRejected(field, ours, asked)
    return reply


async def meet_node(greeting: Greeting, hello: RouterHello, node: NodeConfig) -> NodeHello:
    """The router's part: the hello of `node`, which knows the secret and is what the file says.

    Raises HelloRefused naming the field in which the two ends differ, UnexpectedFrame and Undecodable.
    """
    ours = msgspec.structs.replace(hello, node=node.name, nonce=secrets.token_bytes(_NONCE_BYTES))
    await greeting.say(ours)
    await greeting.hear(Challenge)
    await greeting.prove()
    theirs = await greeting.hear(NodeHello)
    if not await greeting.is_proven():
        raise SecretRefused
    expected = {"version": ours.version, "model_id": ours.model_id, "name": node.name, "role": node.role}
    for field, value in expected.items():
        if getattr(theirs, field) != value:
            raise HelloRefused(field, value, getattr(theirs, field))
    return theirs
