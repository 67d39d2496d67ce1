"""Links over real loopback sockets, with heartbeats of milliseconds."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve

from disaggd.cluster.handshake import Greeting, meet_node
from disaggd.cluster.hello import PROTOCOL_VERSION, Challenge, Frame, HelloRejected, NodeHello, Ping, RouterHello
from disaggd.cluster.link import FAULT, Link, LinkServer, dial, serve_links
from disaggd.cluster.link_settings import LinkSettings
from disaggd.cluster.protocol import Abort, Credit, Room
from disaggd.config import Address, NodeConfig
from disaggd.errors import HelloRefused, ResourceError
from disaggd.ids import Incarnation, NodeName, SeqId
from disaggd.transfer.layout import KVSpec

AnyLink = Link[Any, Any, Any]

SETTINGS = LinkSettings(
    heartbeat_s=0.02, missed_heartbeats=50, reconnect_min_s=0.001, reconnect_max_s=0.01, refused_s=0.005, hello_timeout_s=5.0
)
KV = KVSpec(dtype="float32", block_size=64, head_dim=16, groups=())
ROUTER = RouterHello(PROTOCOL_VERSION, NodeName("r0"), Incarnation("r-1"), "model-a")
NODE = NodeHello(PROTOCOL_VERSION, NodeName("p0"), "prefill", Incarnation("p-1"), "model-a", KV, 100, 4096)


@dataclass
class End:
    """Records what one end's callbacks are told."""

    up: asyncio.Queue[AnyLink] = field(default_factory=asyncio.Queue)
    frames: asyncio.Queue[Frame] = field(default_factory=asyncio.Queue)
    down: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    ups: int = 0
    downs: int = 0

    def on_up(self, link: AnyLink) -> None:
        self.ups += 1
        self.up.put_nowait(link)

    def on_frame(self, link: AnyLink, frame: Frame) -> None:
        self.frames.put_nowait(frame)

    def on_down(self, link: AnyLink, reason: str) -> None:
        self.downs += 1
        self.down.put_nowait(reason)

    @property
    def callbacks(self) -> dict[str, Any]:
        return {"on_up": self.on_up, "on_frame": self.on_frame, "on_down": self.on_down}


def run(test: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await test

    asyncio.run(limited())


def node_at(port: int) -> NodeConfig:
    return NodeConfig(name=NodeName("p0"), role="prefill", listen=Address(f"127.0.0.1:{port}"))


@contextlib.asynccontextmanager
async def serving(
    port: int, end: End, hello: NodeHello | HelloRejected = NODE, settings: LinkSettings = SETTINGS, **options: Any
) -> AsyncIterator[LinkServer]:
    server = await serve_links(Address(f"127.0.0.1:{port}"), hello=lambda _: hello, settings=settings, **end.callbacks, **options)
    try:
        yield server
    finally:
        await server.close()


@contextlib.asynccontextmanager
async def dialling(
    port: int, end: End, hello: RouterHello = ROUTER, settings: LinkSettings = SETTINGS, **options: Any
) -> AsyncIterator[None]:
    task = asyncio.create_task(dial(node_at(port), hello, settings=settings, **end.callbacks, **options))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextlib.asynccontextmanager
async def raw_router(port: int) -> AsyncIterator[ClientConnection]:
    """A router by hand: it has said hello, and sends nothing of itself."""
    async with connect(f"ws://127.0.0.1:{port}/link", proxy=None, ping_interval=None, compression=None) as socket:
        await meet_node(Greeting(socket.send, lambda: received(socket), None), ROUTER, node_at(port))
        yield socket


async def received(socket: ClientConnection) -> bytes:
    message = await socket.recv(decode=False)
    assert isinstance(message, bytes)
    return message


async def logged(caplog: pytest.LogCaptureFixture, text: str) -> str:
    """The first log message with `text` in it, once there is one."""
    while True:
        for record in caplog.records:
            if text in record.getMessage():
                return record.getMessage()
        await asyncio.sleep(0)


def levels(caplog: pytest.LogCaptureFixture, beginning: str) -> set[str]:
    return {record.levelname for record in caplog.records if record.getMessage().startswith(beginning)}


def aborts(count: int) -> list[Abort]:
    return [Abort(SeqId(f"r-{number}"), 0) for number in range(count)]


def test_frames_arrive_in_order_both_ways(free_port: Callable[[], int]) -> None:
    async def scenario() -> None:
        port, router, node = free_port(), End(), End()
        async with serving(port, node), dialling(port, router):
            to_node, to_router = await router.up.get(), await node.up.get()
            assert to_node.peer == NODE
            assert (to_router.peer.router, to_router.peer.incarnation) == (ROUTER.router, ROUTER.incarnation)
            for abort in aborts(500):
                to_node.send(abort)
                to_router.send(Credit(int(abort.seq[2:])))
            assert [await node.frames.get() for _ in range(500)] == aborts(500)
            assert [await router.frames.get() for _ in range(500)] == [Credit(number) for number in range(500)]

    run(scenario())


def test_close_delivers_what_was_sent_before_and_says_why(free_port: Callable[[], int]) -> None:
    async def scenario() -> None:
        port, router, node = free_port(), End(), End()
        async with serving(port, node), dialling(port, router):
            link = await node.up.get()
            for number in range(100):
                link.send(Credit(number))
            link.close("draining")
            link.send(Credit(-1))
            assert await node.down.get() == "draining"
            assert "draining" in await router.down.get()
            assert [router.frames.get_nowait() for _ in range(100)] == [Credit(number) for number in range(100)]
            await router.up.get()  # and the router comes back
            assert router.frames.empty()

    run(scenario())


def test_every_up_has_one_down(free_port: Callable[[], int]) -> None:
    async def scenario() -> None:
        port, router, node = free_port(), End(), End()
        async with serving(port, node), dialling(port, router):
            for turn in range(3):
                (await router.up.get()).close(f"turn {turn}")
                await router.down.get()
            await router.up.get()
        assert (router.ups, router.downs) == (4, 4)
        assert node.ups == node.downs

    run(scenario())


def test_a_restarted_node_is_linked_again(free_port: Callable[[], int]) -> None:
    async def scenario() -> None:
        port, router = free_port(), End()
        async with dialling(port, router):
            for start in ("p-1", "p-2", "p-3"):
                async with serving(port, End(), msgspec.structs.replace(NODE, incarnation=Incarnation(start))):
                    assert (await router.up.get()).peer.incarnation == start
                await router.down.get()

    run(scenario())


def test_several_routers_are_linked_at_once(free_port: Callable[[], int]) -> None:
    async def scenario() -> None:
        port, one, two, node = free_port(), End(), End(), End()
        other = msgspec.structs.replace(ROUTER, router=NodeName("r1"))
        async with serving(port, node), dialling(port, one), dialling(port, two, other):
            links = [await node.up.get(), await node.up.get()]
            assert sorted(link.name for link in links) == ["r0", "r1"]
            next(link for link in links if link.name == "r1").send(Credit(7))
            assert await two.frames.get() == Credit(7)
            assert one.frames.empty()

    run(scenario())


@pytest.mark.parametrize(
    ("hello", "field"),
    [
        (msgspec.structs.replace(ROUTER, version=PROTOCOL_VERSION + 1), "version"),
        (msgspec.structs.replace(ROUTER, model_id="model-b"), "model_id"),
    ],
)
def test_a_differing_hello_is_refused_by_name_and_logged_once(
    free_port: Callable[[], int], caplog: pytest.LogCaptureFixture, hello: RouterHello, field: str
) -> None:
    async def scenario() -> None:
        port, router, node, answered = free_port(), End(), End(), 0

        def answer(_: RouterHello) -> NodeHello:
            nonlocal answered
            answered += 1
            return NODE

        server = await serve_links(Address(f"127.0.0.1:{port}"), hello=answer, settings=SETTINGS, **node.callbacks)
        async with dialling(port, router, hello):
            await logged(caplog, f"hello refused: {field} differs")
            async with dialling(port, good := End()):  # the node goes on serving others
                await good.up.get()
        await server.close()
        assert (router.ups, answered > 0) == (0, True)

    run(scenario())
    assert sum("hello refused" in record.getMessage() for record in caplog.records) == 1
    assert sum(f"refused router r0 at 127.0.0.1: {field} differs" in record.getMessage() for record in caplog.records) == 1


def test_a_node_of_another_name_is_refused(free_port: Callable[[], int], caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        port, router = free_port(), End()
        async with serving(port, End(), msgspec.structs.replace(NODE, name=NodeName("p1"))), dialling(port, router):
            assert "name differs (ours 'p0', theirs 'p1')" in await logged(caplog, "hello refused")
        assert router.ups == 0

    run(scenario())


def test_the_router_may_refuse_a_nodes_geometry(free_port: Callable[[], int], caplog: pytest.LogCaptureFixture) -> None:
    def accept(hello: NodeHello) -> None:
        raise HelloRefused("kv.block_size", 16, hello.kv.block_size)

    async def scenario() -> None:
        port, router, node = free_port(), End(), End()
        async with serving(port, node), dialling(port, router, accept=accept):
            await logged(caplog, "kv.block_size differs (ours 16, theirs 64)")
            assert await node.down.get() == "closed by the peer: r0: hello refused: kv.block_size differs (ours 16, theirs 64)"
        assert router.ups == 0

    run(scenario())
    assert levels(caplog, "link to r0 is down") == {"WARNING"}


SECRET = replace(SETTINGS, secret="correct horse battery")


def test_a_wrong_secret_is_refused_logged_once_and_counted(free_port: Callable[[], int], caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        port, wrong, missing, right = free_port(), End(), End(), End()
        counts: asyncio.Queue[tuple[str, int]] = asyncio.Queue()
        seen: list[str] = []
        async with (
            serving(port, End(), settings=SECRET, on_refused=lambda *count: counts.put_nowait(count)),
            dialling(port, wrong, settings=replace(SETTINGS, secret="wrong horse battery"), on_refused=seen.append),
            dialling(port, missing),
        ):
            assert [await counts.get() for _ in range(5)] == [("secret", number) for number in range(1, 6)]
            async with dialling(port, right, settings=SECRET):  # the node goes on serving others
                await right.up.get()
            await logged(caplog, "the cluster secrets differ")
        assert (wrong.ups, missing.ups, set(seen)) == (0, 0, {"secret"})

    run(scenario())
    assert "horse" not in caplog.text
    refused = [record.getMessage() for record in caplog.records if "refused router" in record.getMessage()]
    assert refused == ["refused router r0 at 127.0.0.1: wrong cluster secret"]


def test_a_node_that_does_not_know_the_secret_is_refused(free_port: Callable[[], int], caplog: pytest.LogCaptureFixture) -> None:
    """A process that has taken the node's address, and says whatever a node would."""

    async def scenario() -> None:
        port, router = free_port(), End()
        async with (
            serving(port, node := End(), settings=replace(SETTINGS, secret="wrong horse battery")),
            dialling(port, router, settings=SECRET),
        ):
            await logged(caplog, "no link to p0")
        assert (router.ups, node.ups) == (0, 0)

    run(scenario())


def test_a_handshake_that_somebody_recorded_is_refused(free_port: Callable[[], int], caplog: pytest.LogCaptureFixture) -> None:
    """The very bytes that gave a router its link, sent again, give nobody another one."""

    async def scenario() -> None:
        port, node, recorded = free_port(), End(), list[bytes]()
        address = f"ws://127.0.0.1:{port}/link"
        async with serving(port, node, settings=SECRET):
            async with connect(address, proxy=None) as socket:

                async def record(message: bytes) -> None:
                    recorded.append(message)
                    await socket.send(message)

                await meet_node(Greeting(record, lambda: received(socket), SECRET.secret), ROUTER, node_at(port))
                await node.up.get()
            await node.down.get()
            async with connect(address, proxy=None) as replayed:
                for message in recorded:
                    await replayed.send(message)
                await received(replayed)  # the challenge, which is another one
                refusal = msgspec.msgpack.decode(await received(replayed), type=HelloRejected)
            assert (len(recorded), refusal) == (2, HelloRejected("secret", "", ""))
            assert await logged(caplog, "refused router") == "refused router r0 at 127.0.0.1: wrong cluster secret"
        assert node.ups == 1

    run(scenario())


def test_a_stranger_cannot_make_a_node_hold_much_and_a_router_can(free_port: Callable[[], int], caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        port, node, router = free_port(), End(), End()
        large = Abort(SeqId("x" * 2**17), 0)
        async with serving(port, node), connect(f"ws://127.0.0.1:{port}/link", proxy=None) as stranger:
            await stranger.send(msgspec.msgpack.encode(large))
            assert "bytes" in await logged(caplog, "no hello from 127.0.0.1: "), "too large to be looked at"
            async with dialling(port, router):
                (await router.up.get()).send(large)
                assert await node.frames.get() == large

    run(scenario())


def test_either_end_may_leave_and_is_waited_for(free_port: Callable[[], int], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "disaggd")

    async def scenario() -> None:
        port, router, node = free_port(), End(), End()
        async with serving(port, node) as server:
            async with dialling(port, router):
                await router.up.get()
            assert await node.down.get() == "closed by the peer: stopping"
            assert levels(caplog, "link to r0 is down") == {"INFO"}
            caplog.clear()
            await node.up.get()
            async with dialling(port, router, settings=replace(SETTINGS, patience_s=3600.0)):
                await node.up.get()
                await server.close()
                await logged(caplog, "waiting for p0")
        assert {record.levelname for record in caplog.records} == {"INFO"}

    run(scenario())


def test_a_lost_router_is_a_warning(free_port: Callable[[], int], caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        port, node = free_port(), End()
        async with serving(port, node), raw_router(port) as socket:
            await node.up.get()
            socket.transport.abort()
            assert await node.down.get() == "connection lost"

    run(scenario())
    assert levels(caplog, "link to r0 is down") == {"WARNING"}


def test_a_node_that_stops_says_so_without_a_warning(free_port: Callable[[], int], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "disaggd")

    async def scenario() -> None:
        port, node = free_port(), End()
        async with serving(port, node) as server, raw_router(port):
            await node.up.get()
            await server.close()
            assert await node.down.get() == "stopping"

    run(scenario())
    assert levels(caplog, "link to r0 is down") == {"INFO"}


def test_a_node_not_there_yet_is_waited_for_and_missed_later(free_port: Callable[[], int], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "disaggd")

    async def scenario(patience_s: float, text: str) -> None:
        port = free_port()
        async with dialling(port, End(), settings=replace(SETTINGS, patience_s=patience_s)):
            await logged(caplog, f"{text} p0 at 127.0.0.1:{port}")

    run(scenario(3600.0, "waiting for"))
    assert {record.levelname for record in caplog.records} == {"INFO"}
    run(scenario(0.0, "no link to"))
    assert levels(caplog, "no link to p0") == {"WARNING"}


def test_a_node_that_was_there_is_missed_at_once(free_port: Callable[[], int], caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        port, router = free_port(), End()
        async with dialling(port, router, settings=replace(SETTINGS, patience_s=3600.0)):
            async with serving(port, node := End()) as server:
                (await node.up.get())._socket.transport.abort()
                await server.close()
            await logged(caplog, f"no link to p0 at 127.0.0.1:{port}, trying again: Connection refused")

    run(scenario())


def test_a_node_that_accepts_and_says_nothing_is_told_of(free_port: Callable[[], int], caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            async with dialling(port, End(), settings=replace(SETTINGS, patience_s=0.0, hello_timeout_s=0.25)):
                await logged(caplog, f"no link to p0 at 127.0.0.1:{port}, trying again: no answer within 0.25 s")

    run(scenario())


def test_an_undecodable_frame_closes_its_link_only(free_port: Callable[[], int]) -> None:
    async def scenario() -> None:
        port, node, router = free_port(), End(), End()
        async with serving(port, node), dialling(port, router):
            good = await node.up.get()
            async with raw_router(port) as socket:
                await socket.send(b"\xc1 no msgpack")
                assert "undecodable frame" in await node.down.get()
            good.send(Credit(1))
            assert await router.frames.get() == Credit(1)

    run(scenario())


def no_utf8(frame: Frame) -> bytes:
    return msgspec.msgpack.encode(frame).replace(b"model-a", b"model-\xff")


def endlessly_nested(frame: Frame) -> bytes:
    """With one more field, which nobody knows, of 60,000 lists in each other."""
    fields = msgspec.to_builtins(frame, builtin_types=(bytes,))
    return msgspec.msgpack.encode([*fields, None])[:-1] + 60_000 * b"\x91"


@pytest.mark.parametrize(
    ("garbage", "why"),
    [
        (msgspec.msgpack.encode(Ping()), "Invalid value 'Ping'"),
        (no_utf8(ROUTER), "can't decode byte 0xff"),
        (endlessly_nested(ROUTER), "maximum recursion depth"),
    ],
    ids=["another frame", "invalid UTF-8", "60,000 nested lists"],
)
def test_garbage_instead_of_a_hello_is_refused_logged_once_and_counted(
    free_port: Callable[[], int], caplog: pytest.LogCaptureFixture, garbage: bytes, why: str
) -> None:
    async def scenario() -> None:
        port, node, refused = free_port(), End(), list[tuple[str, int]]()
        async with serving(port, node, on_refused=lambda *counted: refused.append(counted)):
            for _ in range(3):
                async with connect(f"ws://127.0.0.1:{port}/link", proxy=None) as socket:
                    await socket.send(garbage)
                    await socket.wait_closed()
            assert why in await logged(caplog, "no hello from 127.0.0.1")
        assert (node.ups, refused) == (0, [("no_hello", 1), ("no_hello", 2), ("no_hello", 3)])

    run(scenario())
    assert len([record for record in caplog.records if "no hello" in record.getMessage()]) == 1
    assert not [record for record in caplog.records if record.exc_info]


CHALLENGE = msgspec.msgpack.encode(Challenge(bytes(32)))


@pytest.mark.parametrize(
    "answers",
    [
        [no_utf8(HelloRejected("model-a", "", ""))],
        [CHALLENGE, 60_000 * b"\x91"],
        [CHALLENGE, endlessly_nested(NODE)],
        [CHALLENGE, no_utf8(NODE)],
    ],
    ids=["a refusal with invalid UTF-8", "60,000 nested lists", "a hello with 60,000 nested lists", "a hello with invalid UTF-8"],
)
def test_whatever_answers_at_a_nodes_address_the_router_dials_on(
    free_port: Callable[[], int], caplog: pytest.LogCaptureFixture, answers: list[bytes]
) -> None:
    async def answer(socket: ServerConnection) -> None:
        await socket.recv()
        for one in answers:
            await socket.send(one)
        await socket.wait_closed()

    async def scenario() -> None:
        port, router = free_port(), End()
        async with dialling(port, router):
            async with serve(answer, "127.0.0.1", port):
                await logged(caplog, "trying again: ")
            async with serving(port, End()):
                await router.up.get()

    run(scenario())
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("target", ["ws://[::1", "ws://127.0.0.1:999999/", "ws://127.0.0.1:{elsewhere}/link"])
def test_a_redirect_is_not_followed(free_port: Callable[[], int], caplog: pytest.LogCaptureFixture, target: str) -> None:
    async def scenario() -> None:
        port, elsewhere, router, other = free_port(), free_port(), End(), End()

        async def redirect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(f"HTTP/1.1 302 Found\r\nLocation: {target.format(elsewhere=elsewhere)}\r\nContent-Length: 0\r\n\r\n".encode())
            writer.close()

        async with serving(elsewhere, other), dialling(port, router):
            async with await asyncio.start_server(redirect, "127.0.0.1", port):
                assert "HTTP 302" in await logged(caplog, "trying again: ")
            async with serving(port, End()):
                await router.up.get()
            assert other.ups == 0

    run(scenario())


@pytest.mark.parametrize("callback", ["accept", "on_up", "on_down"])
def test_no_fault_of_a_callback_keeps_the_router_from_dialling_on(
    free_port: Callable[[], int], caplog: pytest.LogCaptureFixture, callback: str
) -> None:
    counted: list[str] = []

    async def scenario() -> None:
        port, router, stumbles = free_port(), End(), iter([True])
        calls: dict[str, Callable[..., None]] = {"accept": lambda _: None, "on_refused": counted.append, **router.callbacks}

        def stumble(*args: Any) -> None:
            if next(stumbles, False):
                raise KeyError("out of the blue")
            calls[callback](*args)

        async with serving(port, node := End()):
            task = asyncio.create_task(dial(node_at(port), ROUTER, settings=SETTINGS, **(calls | {callback: stumble})))  # type: ignore[arg-type]
            if callback == "on_down":
                (await node.up.get()).close("off")
                await router.up.get()
            await router.up.get()
            task.cancel()
            await asyncio.wait([task])

    run(scenario())
    assert [record.levelname for record in caplog.records if record.exc_info] == ["ERROR"]
    assert counted == [FAULT]


def test_a_silent_peer_is_given_up(free_port: Callable[[], int]) -> None:
    async def scenario() -> None:
        port, node = free_port(), End()
        async with serving(port, node, settings=replace(SETTINGS, heartbeat_s=0.005, missed_heartbeats=3)), raw_router(port):
            assert await node.down.get() == "silent for 3 heartbeats"

    run(scenario())


def test_heartbeats_keep_an_idle_link_up(free_port: Callable[[], int]) -> None:
    async def scenario() -> None:
        port, node = free_port(), End()
        async with serving(port, node, settings=replace(SETTINGS, heartbeat_s=0.005, missed_heartbeats=3)), raw_router(port) as socket:
            for _ in range(12):  # four times what silence would allow
                assert msgspec.msgpack.decode(await socket.recv(decode=False), type=Ping) == Ping()
                await socket.send(msgspec.msgpack.encode(Ping()))
            assert (node.downs, node.frames.empty()) == (0, True)

    run(scenario())


def test_a_peer_that_reads_too_slowly_is_cut(free_port: Callable[[], int]) -> None:
    async def scenario() -> None:
        port, node = free_port(), End()
        async with serving(port, node, settings=replace(SETTINGS, max_buffered_bytes=1000)), raw_router(port):
            link = await node.up.get()
            for _ in range(200):  # no turn of the loop between them: nothing drains
                link.send(Credit(1))
            assert "reads too slowly" in await node.down.get()

    run(scenario())


def test_a_callbacks_fault_is_logged_and_ends_its_link_only(free_port: Callable[[], int], caplog: pytest.LogCaptureFixture) -> None:
    counted: list[tuple[str, int]] = []

    async def scenario() -> None:
        port, router, node = free_port(), End(), End()

        def stumble(link: AnyLink, frame: Frame) -> None:
            raise KeyError(frame)

        server = await serve_links(
            Address(f"127.0.0.1:{port}"),
            hello=lambda _: NODE,
            settings=SETTINGS,
            on_refused=lambda *refused: counted.append(refused),
            **(node.callbacks | {"on_frame": stumble}),
        )
        async with dialling(port, router):
            (await router.up.get()).send(Abort(SeqId("r-0"), 0))
            assert await node.down.get() == "a frame could not be handled"
            await router.up.get()
        await server.close()

    run(scenario())
    assert any(record.exc_info and record.levelno == logging.ERROR for record in caplog.records)
    assert counted == [(FAULT, 1)]


def test_a_routers_own_fault_over_a_frame_is_counted(free_port: Callable[[], int]) -> None:
    counted: list[str] = []

    async def scenario() -> None:
        port, router, node = free_port(), End(), End()

        def stumble(link: AnyLink, frame: Frame) -> None:
            raise KeyError(frame)

        async with serving(port, node):
            calls = router.callbacks | {"on_frame": stumble}
            task = asyncio.create_task(dial(node_at(port), ROUTER, settings=SETTINGS, on_refused=counted.append, **calls))
            (await node.up.get()).send(Room())
            await router.down.get()
            await router.up.get()
            await router.up.get()
            task.cancel()
            await asyncio.wait([task])

    run(scenario())
    assert counted == [FAULT]


@pytest.mark.parametrize(("path", "status"), [("/health", 200), ("/elsewhere", 404)])
def test_the_listener_answers_plain_http(free_port: Callable[[], int], path: str, status: int) -> None:
    async def scenario() -> None:
        port = free_port()
        async with serving(port, End()):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: p0\r\n\r\n".encode())
            assert (await reader.readline()).split()[1] == str(status).encode()
            writer.close()
            await writer.wait_closed()

    run(scenario())


def test_a_taken_port_is_a_resource_error(free_port: Callable[[], int]) -> None:
    async def scenario() -> None:
        port = free_port()
        async with serving(port, End()):
            with pytest.raises(ResourceError, match=f"cannot listen on 127.0.0.1:{port}: .*in use"):
                await serve_links(Address(f"127.0.0.1:{port}"), hello=lambda _: NODE, settings=SETTINGS, **End().callbacks)

    run(scenario())
