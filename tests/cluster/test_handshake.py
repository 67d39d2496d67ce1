"""Who is believed on a new link: both parts of the handshake, over queues, with somebody between or at either end."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import pytest

from disaggd.cluster.handshake import Greeting, SecretRefused, UnexpectedFrame, meet_node, meet_router
from disaggd.cluster.hello import PROTOCOL_VERSION, Challenge, Frame, HelloRejected, NodeHello, Ping, Proof, RouterHello
from disaggd.config import Address, NodeConfig
from disaggd.errors import HelloRefused
from disaggd.ids import Incarnation, NodeName
from disaggd.transfer.layout import KVSpec
from disaggd.wire import Undecodable

SECRET = "correct horse battery"
ROUTER = RouterHello(PROTOCOL_VERSION, NodeName("r0"), Incarnation("r-1"), "model-a")
NODE = NodeHello(
    PROTOCOL_VERSION,
    NodeName("p0"),
    "prefill",
    Incarnation("p-1"),
    "model-a",
    KVSpec(dtype="float32", block_size=64, head_dim=16, groups=()),
    1,
    9,
)
P0 = NodeConfig(name=NodeName("p0"), role="prefill", listen=Address("127.0.0.1:8101"))

Tamper = Callable[[bytes], bytes]
Queue = asyncio.Queue[bytes]


@dataclass
class Wire:
    """Two queues, and what went through them."""

    to_node: Queue = field(default_factory=asyncio.Queue)
    to_router: Queue = field(default_factory=asyncio.Queue)
    seen: list[bytes] = field(default_factory=list)
    tamper: Tamper | None = None

    def end(self, out: Queue, into: Queue, secret: str | None) -> Greeting:
        async def send(message: bytes) -> None:
            message = self.tamper(message) if self.tamper is not None else message
            self.seen.append(message)
            out.put_nowait(message)

        return Greeting(send, into.get, secret)

    def router(self, secret: str | None = SECRET) -> Greeting:
        return self.end(self.to_node, self.to_router, secret)

    def node(self, secret: str | None = SECRET) -> Greeting:
        return self.end(self.to_router, self.to_node, secret)

    def frames(self) -> list[str]:
        return [msgspec.msgpack.decode(message)[0] for message in self.seen]


Outcome = tuple[NodeHello | BaseException, tuple[RouterHello, HelloRejected | None] | BaseException]


def meet(
    wire: Wire, router_secret: str | None = SECRET, node_secret: str | None = SECRET, hello: RouterHello = ROUTER, answer: NodeHello = NODE
) -> Outcome:
    """What the router ends with, and what the node does."""

    async def both() -> Outcome:
        async with asyncio.timeout(10):
            ends = await asyncio.gather(
                meet_node(wire.router(router_secret), hello, P0),
                meet_router(wire.node(node_secret), lambda _: answer),
                return_exceptions=True,
            )
            return ends[0], ends[1]

    return asyncio.run(both())


def changing(kind: type[Frame], change: Callable[[Frame], Frame]) -> Tamper:
    """Somebody between the two who changes one kind of frame."""

    def tamper(message: bytes) -> bytes:
        if msgspec.msgpack.decode(message)[0] != kind.__name__:
            return message
        return msgspec.msgpack.encode(change(msgspec.msgpack.decode(message, type=kind)))

    return tamper


@pytest.mark.parametrize("secret", [SECRET, None])
def test_two_that_share_a_secret_or_have_none_meet(secret: str | None) -> None:
    wire = Wire()
    at_router, at_node = meet(wire, secret, secret)
    assert at_router == NODE
    assert isinstance(at_node, tuple) and at_node[1] is None
    assert (at_node[0].router, at_node[0].node) == ("r0", "p0")
    assert wire.frames() == ["RouterHello", "Challenge", "Proof", "NodeHello", "Proof"]
    assert not any(SECRET.encode() in message for message in wire.seen)


@pytest.mark.parametrize(("router_secret", "node_secret"), [("wrong horse battery", SECRET), (None, SECRET), (SECRET, None)])
def test_the_node_tells_nothing_of_itself_to_one_with_another_secret(router_secret: str | None, node_secret: str | None) -> None:
    wire = Wire()
    at_router, at_node = meet(wire, router_secret, node_secret)
    assert isinstance(at_router, SecretRefused)
    assert isinstance(at_node, tuple) and at_node[1] == HelloRejected("secret", "", "")
    assert wire.frames() == ["RouterHello", "Challenge", "Proof", "HelloRejected"]


def test_no_two_handshakes_are_alike() -> None:
    first, second = Wire(), Wire()
    meet(first)
    meet(second)
    assert first.seen[3] == second.seen[3], "the node's hello: the same incarnation"
    assert all(one != other for index, (one, other) in enumerate(zip(first.seen, second.seen, strict=True)) if index != 3)


def test_what_a_node_once_said_does_not_convince_a_router_again() -> None:
    recorded = Wire()
    meet(recorded)

    async def replay() -> None:
        wire = Wire()
        for message in (recorded.seen[1], *recorded.seen[3:]):
            wire.to_router.put_nowait(message)
        with pytest.raises(SecretRefused):
            await meet_node(wire.router(), ROUTER, P0)

    asyncio.run(replay())


def test_a_proof_that_is_sent_back_proves_nothing() -> None:
    """A node that knows no secret returns the router's own proof."""

    async def reflect() -> None:
        wire = Wire()
        router = asyncio.create_task(meet_node(wire.router(), ROUTER, P0))
        await wire.to_node.get()
        wire.to_router.put_nowait(msgspec.msgpack.encode(Challenge(b"n" * 32)))
        proof = await wire.to_node.get()
        wire.to_router.put_nowait(msgspec.msgpack.encode(NODE))
        wire.to_router.put_nowait(proof)
        with pytest.raises(SecretRefused):
            await router

    asyncio.run(reflect())


def test_what_a_router_says_to_one_node_does_not_open_another() -> None:
    """Somebody at p0's address passes everything on to d0, which knows the secret."""
    at_router, at_node = meet(Wire(), answer=msgspec.structs.replace(NODE, name=NodeName("d0"), role="decode"))
    assert isinstance(at_node, tuple) and at_node[1] == HelloRejected("name", "d0", "p0")
    assert isinstance(at_router, HelloRefused) and at_router.field == "name"


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (RouterHello, lambda hello: msgspec.structs.replace(hello, router="r7")),
        (RouterHello, lambda hello: msgspec.structs.replace(hello, incarnation="r-7")),
        (RouterHello, lambda hello: msgspec.structs.replace(hello, nonce=bytes(32))),
        (Challenge, lambda challenge: Challenge(bytes(32))),
        (NodeHello, lambda hello: msgspec.structs.replace(hello, incarnation="p-7")),
        (NodeHello, lambda hello: msgspec.structs.replace(hello, num_blocks=10**6)),
        (Proof, lambda proof: Proof(proof.mac[:-1])),
        (Proof, lambda proof: Proof(b"")),
    ],
)
def test_whatever_is_changed_on_the_way_ends_the_handshake(kind: type[Frame], change: Callable[[Frame], Frame]) -> None:
    at_router, _ = meet(Wire(tamper=changing(kind, change)))
    assert isinstance(at_router, SecretRefused)


def test_a_router_of_an_older_version_is_told_so() -> None:
    async def scenario() -> None:
        wire = Wire()
        wire.to_node.put_nowait(msgspec.msgpack.encode(("RouterHello", 3, "r0", "r-1", "model-a")))
        assert (await meet_router(wire.node(), lambda _: NODE))[1] == HelloRejected("version", str(PROTOCOL_VERSION), "3")
        assert wire.frames() == ["HelloRejected"]

    asyncio.run(scenario())


def test_a_node_of_an_older_version_is_understood() -> None:
    async def scenario() -> None:
        wire = Wire()
        wire.to_router.put_nowait(msgspec.msgpack.encode(("HelloRejected", "version", "3", str(PROTOCOL_VERSION))))
        with pytest.raises(HelloRefused, match=f"version differs .ours '{PROTOCOL_VERSION}', theirs '3'"):
            await meet_node(wire.router(), ROUTER, P0)

    asyncio.run(scenario())


def test_a_strangers_refusal_is_quoted_in_brief() -> None:
    async def scenario() -> None:
        wire = Wire()
        wire.to_router.put_nowait(msgspec.msgpack.encode(HelloRejected("f" * 1000, "o" * 1000, "t" * 1000)))
        with pytest.raises(HelloRefused) as caught:
            await meet_node(wire.router(), ROUTER, P0)
        assert str(caught.value) == f"hello refused: {'f' * 80} differs (ours '{'t' * 80}', theirs '{'o' * 80}')"

    asyncio.run(scenario())


@pytest.mark.parametrize("frame", [Proof(b"x"), NODE, Challenge(b"x")])
def test_a_frame_out_of_turn_ends_the_handshake(frame: Frame) -> None:
    async def scenario() -> None:
        wire = Wire()
        wire.to_node.put_nowait(msgspec.msgpack.encode(frame))
        with pytest.raises(UnexpectedFrame, match=f"{type(frame).__name__} instead of RouterHello"):
            await meet_router(wire.node(), lambda _: NODE)

    asyncio.run(scenario())


def test_no_frame_of_a_link_is_one_of_the_handshake() -> None:
    async def scenario() -> None:
        wire = Wire()
        wire.to_node.put_nowait(msgspec.msgpack.encode(Ping()))
        with pytest.raises(Undecodable, match="Ping"):
            await meet_router(wire.node(), lambda _: NODE)

    asyncio.run(scenario())
