"""A router under frames that make no sense, from nodes of either role: `RouterBackend` whole, receipts and metrics included.

A case is a list of happenings in any order: requests, clients that leave, frames, time, links that end and come back. Every frame crosses
the wire's own encoding first: what the decoder refuses closes a real link, and so it does here.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from prometheus_client import CollectorRegistry

from disaggd.cluster.check_frames import CheckPair, PatternRead
from disaggd.cluster.hello import NodeHello, PairAgent, PairReady
from disaggd.cluster.link import decode_from_node
from disaggd.cluster.protocol import Credit, Decided, Frame, Generate, Grant, NeedPrefill, Prefilled, TokenRun, Tokens, ToNode, ToRouter
from disaggd.config import parse_config
from disaggd.errors import RequestError
from disaggd.gateway.backend import Delta, GenerationRequest
from disaggd.ids import AgentId, BlockId, GrantToken, Incarnation, NodeName, SeqId
from disaggd.model.directory import open_directory
from disaggd.observe.metrics import Metrics
from disaggd.roles.router import RouterBackend
from disaggd.sampling import SamplingParams, TokenLogprob
from disaggd.transfer.layout import PoolPlace, kv_spec
from disaggd.wire import Undecodable
from tests.fuzz import wild
from tests.fuzz.surface import Surface
from tests.support.endpoints import endpoint

NAMES = tuple(NodeName(name) for name in ("p0", "p1", "d0", "d1"))
CONFIG = parse_config(
    """
    [model]
    dtype = "float32"
    [[node]]
    name = "front"
    role = "router"
    listen = "127.0.0.1:8000"
    """
    + "".join(
        f'[[node]]\nname = "{name}"\nrole = "{"prefill" if name.startswith("p") else "decode"}"\nlisten = "127.0.0.1:{8101 + i}"\n'
        for i, name in enumerate(NAMES)
    )
)
SPEC = open_directory("builtin:tiny").spec("float32")
KV = kv_spec(SPEC, 64)


class FuzzLink:
    """As much of a link as the backend uses."""

    def __init__(self, name: NodeName) -> None:
        self.name = name
        self.peer = NodeHello(5, name, "prefill" if name.startswith("p") else "decode", Incarnation("i"), "m", KV, 64, 4096, True)
        self.sent: list[ToNode] = []
        self.is_closed = False

    def send(self, frame: ToNode) -> None:
        msgspec.msgpack.encode(frame)
        self.sent.append(frame)

    def close(self, reason: str) -> None:
        self.is_closed = True


class Front:
    """A router's backend in a running loop, four nodes, and the clients that wait."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.backend = RouterBackend(CONFIG, CONFIG.node("front"), SPEC, Metrics(self.registry, "0", "tiny"))
        self.backend.incarnation = self.backend.dispatcher._incarnation = Incarnation("r")
        self.links: dict[NodeName, FuzzLink] = {}
        self.clients: list[asyncio.Task[list[int]]] = []
        for name in NAMES:
            self.link_up(name)

    def link_up(self, name: NodeName) -> None:
        link = self.links[name] = FuzzLink(name)
        self.backend.on_up(link)  # type: ignore[arg-type]
        if name.startswith("p"):
            self.say(name, Credit(100_000))
        for other in NAMES:
            if other[0] != name[0]:
                for writer, target in ((name, other), (other, name)):
                    self.say(target, PairAgent(writer, Incarnation("i"), endpoint(AgentId(f"{target}-{writer}"), b"", PoolPlace(0, 64))))
                    self.say(target, PairReady(writer, AgentId(f"{target}-{writer}")))
                    for check in [frame.check for frame in self.sent_to(target) if isinstance(frame, CheckPair)]:
                        self.say(target, PatternRead(check, "no_room", "", ()))

    def sent_to(self, name: NodeName) -> list[ToNode]:
        return list(self.links[name].sent) if name in self.links else []

    # ── what happens ──

    def say(self, name: NodeName, frame: Frame) -> None:
        if (link := self.links.get(name)) is None:
            return
        try:
            decoded = decode_from_node(msgspec.msgpack.encode(frame))
        except Undecodable:
            link.is_closed = True
        else:
            self.backend.on_frame(link, decoded)  # type: ignore[arg-type]
        if link.is_closed:
            self.relink(name)

    def relink(self, name: NodeName) -> None:
        self.backend.on_down(self.links.pop(name), "closed")  # type: ignore[arg-type]
        self.link_up(name)

    async def ask(self, num_tokens: int, max_tokens: int, top_logprobs: int | None) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, top_logprobs=top_logprobs, seed=1)
        request = GenerationRequest(id=f"q{len(self.clients)}", tokens=list(range(num_tokens)), sampling=sampling, policy="auto")

        async def listen() -> list[int]:
            said: list[int] = []
            async for deltas in self.backend.generate(request):
                for delta in deltas:
                    check_delta(delta)
                    said += delta.tokens
            assert len(said) <= max_tokens
            return said

        self.clients.append(asyncio.ensure_future(listen()))
        await asyncio.sleep(0)

    def leave(self, number: int) -> None:
        if self.clients:
            self.clients[number % len(self.clients)].cancel()

    def tick(self) -> None:
        self.backend.tick()

    async def end(self) -> None:
        """Every client hears the end, whatever the nodes said."""
        self.look()
        self.backend.end_all()
        for heard in await asyncio.gather(*self.clients, return_exceptions=True):
            assert isinstance(heard, list | RequestError | asyncio.CancelledError), heard
        assert not self.backend.dispatcher.sequences
        assert not self.backend._running and not self.backend._sequence_of

    def look(self) -> None:
        """Everything that HTTP shows can be shown."""
        self.backend.tick()
        for shown in (self.backend.cluster(), self.backend.receipts(100, None)):
            msgspec.json.encode(shown)
        msgspec.json.decode(b"".join(self.backend.trace(None)))
        self.backend._observer._metrics.render()


def check_delta(delta: Delta) -> None:
    """A reply can be made of it."""
    assert all(0 <= token < SPEC.vocab_size for token in delta.tokens)
    if delta.logprobs is not None:
        assert len(delta.logprobs) == len(delta.tokens)
        assert all(0 <= token < SPEC.vocab_size for one in delta.logprobs for token, _ in one.top)


async def afterwards(front: Front) -> None:
    """Nodes come back, and a request that decode prefills by itself is served."""
    for name in NAMES:
        front.relink(name)
    await front.ask(5, 2, None)
    [(name, frame)] = [(name, f) for name in NAMES for f in front.links[name].sent if isinstance(f, Generate)]
    front.say(name, Decided(frame.seq, frame.attempt, "short: it is", 0))
    front.say(name, Tokens((TokenRun(frame.seq, frame.attempt, 0, (7,), None, None),)))
    front.say(name, Tokens((TokenRun(frame.seq, frame.attempt, 1, (8,), None, "length"),)))
    assert await front.clients[-1] == [7, 8]


def check(happenings: Sequence[tuple[str, tuple[Any, ...]]]) -> None:
    async def scenario() -> None:
        front = Front()
        for name, arguments in happenings:
            outcome = getattr(front, name)(*arguments)
            if outcome is not None:
                await outcome
        await front.end()
        await afterwards(front)
        front.look()

    asyncio.run(scenario())


# ── what may come ────────────────────────────────────────────────────────────────────────────────────────────────────

seqs = st.sampled_from([SeqId(f"r-{number}") for number in (1, 2, 3)])
names = st.sampled_from(NAMES)
attempts = st.integers(0, 3)
tokens = st.sampled_from([GrantToken(token) for token in (b"t0", b"t1", b"t2")])
grants = st.builds(
    Grant,
    tokens,
    st.sampled_from(NAMES[2:]),
    st.sampled_from(NAMES[:2]),
    st.just(AgentId("d0-p0")),
    st.sampled_from((0, 64)),
    st.just((BlockId(1), BlockId(2))),
    st.just(5.0),
)
output = st.sampled_from((0, 7, SPEC.vocab_size - 1, SPEC.vocab_size, 2**31 - 1))
logprobs = st.builds(TokenLogprob, wild.floats, st.lists(st.tuples(output, wild.floats), max_size=2).map(tuple))
LIVE: dict[str, SearchStrategy[Any]] = {
    "seq": seqs,
    "attempt": attempts,
    "token": tokens,
    "peer": names,
    "target": names,
    "writer": names,
    "agent_id": st.sampled_from([AgentId(f"{a}-{b}") for a in NAMES for b in NAMES if a[0] != b[0]]),
    "peer_incarnation": st.just(Incarnation("i")),
    "grant": grants,
    "start": st.integers(0, 4),
    "tokens": st.lists(output, max_size=3).map(tuple),
    "logprobs": st.none() | st.lists(logprobs, max_size=3).map(tuple),
    "logprob": st.none() | logprobs,
    "reason": st.sampled_from(("long: it is", "why")),
}
LIVE_PREFILLED = LIVE | {"token": output}
sane_frames = (
    st.builds(Decided, seqs, attempts, st.just("short: it is"), st.just(0))
    | st.builds(NeedPrefill, seqs, attempts, st.just("long: it is"), st.just(0), st.none() | grants)
    | st.builds(TokenRun, seqs, attempts, st.integers(0, 3), st.just((7,)), st.none(), st.sampled_from((None, "length"))).map(
        lambda run: Tokens((run,))
    )
)
any_frames = wild.frames(ToRouter, LIVE) | wild.struct(Prefilled, LIVE_PREFILLED)


def happening(name: str, *arguments: SearchStrategy[Any]) -> SearchStrategy[tuple[str, tuple[Any, ...]]]:
    return st.tuples(st.just(name), st.tuples(*arguments))


happenings = st.lists(
    st.one_of(
        happening("ask", st.sampled_from((3, 300, 1000)), st.sampled_from((1, 2, 8)), st.none() | st.just(2)),
        happening("say", names, sane_frames),
        happening("say", names, any_frames),
        happening("say", names, any_frames),
        happening("say", st.sampled_from(NAMES[2:]), sane_frames | any_frames),
        happening("leave", st.integers(0, 3)),
        happening("relink", names),
        happening("tick"),
    ),
    max_size=16,
)

ROUTER = Surface("frames to a router", happenings, check, quick=80, share=0.08)
