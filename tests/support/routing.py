"""A dispatcher among nodes that only record what they are sent: every test scripts the answers, in any order."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from disaggd.cluster.dispatcher import Dispatcher
from disaggd.cluster.hello import NodeHello, PairAgent, PairReady
from disaggd.cluster.moves import DispatchRules
from disaggd.cluster.offer import PrefillWork, RemoteOffer
from disaggd.cluster.peers import DecodePeer, PrefillPeer
from disaggd.cluster.protocol import (
    Credit,
    Decided,
    Gauges,
    Generate,
    Grant,
    Granted,
    JobEnded,
    NeedPrefill,
    Prefilled,
    TokenRun,
    Tokens,
    ToNode,
    ToRouter,
)
from disaggd.cluster.request import Request, RoutedSequence
from disaggd.cluster.routing import RoutingWeights
from disaggd.errors import RequestError
from disaggd.ids import AgentId, BlockId, GrantToken, Incarnation, NodeName, SeqId
from disaggd.sampling import FinishReason, SamplingParams, TokenLogprob
from disaggd.transfer.layout import KVGroup, KVSpec, PoolPlace
from tests.support.endpoints import endpoint

KV = KVSpec(dtype="float32", block_size=4, head_dim=8, groups=(KVGroup(layers=2, kv_heads=1, head_bytes=256),))
P0, P1, D0, D1 = (NodeName(name) for name in ("p0", "p1", "d0", "d1"))

F = TypeVar("F", bound=ToNode)


GRANT_PATIENCE_S = 3.0
EVEN = RoutingWeights(prefill=1.0, load=1.0)


@dataclass
class Client:
    """Whoever waits for a sequence."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None
    error: RequestError | None = None
    seq: SeqId = field(init=False)
    attempt: int = 0
    """The scripts' idea of the attempt under way."""

    def deliver(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob] | None, finish: FinishReason | None) -> None:
        assert self.finish is None and self.error is None, "nothing comes after the end"
        self.tokens += tokens
        self.logprobs += logprobs or ()
        self.finish = finish

    def fail(self, error: RequestError) -> None:
        assert self.finish is None and self.error is None
        self.error = error


class Routing:
    """`sent[name]` is what the router sent to a node since `clear`; `say` is what a node answers."""

    def __init__(
        self,
        prefills: Sequence[NodeName] = (P0,),
        decodes: Sequence[NodeName] = (D0,),
        *,
        credit: int = 1000,
        shares_prefixes: bool = False,
        **rules: Any,
    ) -> None:
        self.now = 100.0
        self.shares_prefixes = shares_prefixes
        self.sent: dict[NodeName, list[ToNode]] = {}
        self.updates: list[tuple[SeqId, int]] = []
        """(sequence, its `kv_bytes`) at each `on_update`."""
        self.dispatcher = Dispatcher(
            Incarnation("r"),
            DispatchRules(**{"max_retries": 2, "grant_patience_s": GRANT_PATIENCE_S, "request_timeout_s": 60.0, "weights": EVEN, **rules}),
            lambda: self.now,
            lambda record: self.updates.append((record.seq, record.kv_bytes)),
        )
        for name in decodes:
            self.decode_up(name)
        for name in prefills:
            self.prefill_up(name, credit)
        self.pair_all()
        self.clear()

    # ── nodes ──

    def prefill_up(self, name: NodeName, credit: int = 1000, incarnation: str = "first") -> None:
        self.dispatcher.prefill_up(PrefillPeer(name, self._hello(name, incarnation), self.sent.setdefault(name, []).append))
        self.say(name, Credit(credit))

    def decode_up(self, name: NodeName, incarnation: str = "first") -> None:
        self.dispatcher.decode_up(DecodePeer(name, self._hello(name, incarnation), self.sent.setdefault(name, []).append))

    def _hello(self, name: NodeName, incarnation: str) -> NodeHello:
        return msgspec.structs.replace(hello(name, incarnation), shares_prefixes=self.shares_prefixes)

    def pair_all(self) -> None:
        for pair in list(self.dispatcher.pairs):
            self.pair(pair.writer, pair.target)

    def pair(self, writer: NodeName, target: NodeName) -> None:
        nodes = {**self.dispatcher.prefills, **self.dispatcher.decodes}
        incarnation = nodes[writer].hello.incarnation
        self.say(target, PairAgent(writer, incarnation, endpoint(agent(writer, target), b"", PoolPlace(0, 64))))
        self.say(target, PairReady(writer, agent(writer, target)))

    def down(self, name: NodeName) -> None:
        self.dispatcher.node_down(name)

    def say(self, name: NodeName, *frames: ToRouter) -> None:
        for frame in frames:
            self.dispatcher.on_frame(name, frame)

    def clear(self) -> None:
        for frames in self.sent.values():
            frames.clear()

    def frames(self, name: NodeName, kind: type[F]) -> list[F]:
        return [frame for frame in self.sent[name] if isinstance(frame, kind)]

    def last(self, name: NodeName, kind: type[F]) -> F:
        return self.frames(name, kind)[-1]

    # ── the usual way of a request ──

    def submit(self, num_tokens: int = 40, max_tokens: int = 8, seed: int = 7, **asked: Any) -> Client:
        """`asked` is of `Request`."""
        client = Client()
        self.now += 0.001
        sampling = SamplingParams(max_tokens=max_tokens, seed=seed)
        request = Request(id="request", sampling=sampling, **{"prompt": tuple(range(num_tokens)), **asked})
        client.seq = self.dispatcher.submit(request, client)
        return client

    def queued(self, num_tokens: int = 40, max_tokens: int = 8, **asked: Any) -> Client:
        """A request whose decode node wants it prefilled elsewhere, and has given no grant."""
        client = self.submit(num_tokens, max_tokens, **asked)
        self.need_prefill(client)
        return client

    def prefilling(self, num_tokens: int = 40, max_tokens: int = 8) -> Client:
        """A request whose job is with a prefill node, with a grant if it needs one."""
        client = self.queued(num_tokens, max_tokens)
        if max_tokens > 1:
            self.granted(client)
        return client

    def decoding(self, num_tokens: int = 40, max_tokens: int = 8) -> Client:
        """A request that its decode node prefills by itself."""
        client = self.submit(num_tokens, max_tokens)
        self.say(self.decode_of(client), Decided(client.seq, client.attempt, "short: by itself", 0))
        return client

    def need_prefill(self, client: Client, grant: Grant | None = None) -> None:
        self.say(self.decode_of(client), NeedPrefill(client.seq, client.attempt, "long: enough", 0, grant))

    def granted(self, client: Client, *, first_token_index: int = 0) -> Grant:
        record = self.record(client)
        assert record.prefill is not None
        grant = make_grant(client, record.prefill, self.decode_of(client), first_token_index)
        self.say(self.decode_of(client), Granted(client.seq, client.attempt, grant))
        return grant

    def first_token(self, client: Client, token: int, finish: FinishReason | None = None, *, start: int = 0) -> None:
        record = self.record(client)
        assert record.prefill is not None
        computed = PrefillWork(record.num_tokens, record.num_tokens**2 / 2)
        self.say(record.prefill, Prefilled(client.seq, client.attempt, start, token, None, finish, 0, 5.0, 5.0, computed))

    def job_ended(self, client: Client, name: NodeName = P0, *, clean: bool = True, kv_bytes: int = 0, attempt: int | None = None) -> None:
        attempt = client.attempt if attempt is None else attempt
        self.say(name, JobEnded(client.seq, attempt, clean, "" if clean else "the push failed", kv_bytes, 1.0, 2.0))

    def tokens(self, client: Client, start: int, *tokens: int, finish: FinishReason | None = None, attempt: int | None = None) -> None:
        attempt = client.attempt if attempt is None else attempt
        self.say(self.decode_of(client), Tokens((TokenRun(client.seq, attempt, start, tokens, None, finish),)))

    # ── what the router knows ──

    def record(self, client: Client) -> RoutedSequence:
        return self.dispatcher.sequences[client.seq]

    def decode_of(self, client: Client) -> NodeName:
        decode = self.record(client).decode
        assert decode is not None
        return decode

    def offer(self, client: Client) -> RemoteOffer:
        """What its decode node was offered last."""
        offer = self.generated(client).offer
        assert offer is not None
        return offer

    def generated(self, client: Client) -> Generate:
        return [frame for frame in self.frames(self.decode_of(client), Generate) if frame.seq == client.seq][-1]

    def credit_used(self, name: NodeName = P0) -> int:
        return self.dispatcher.prefills[name].tokens_in_hand

    def waiting(self) -> list[SeqId]:
        """The prefill queue, in order."""
        return [job.seq for job in self.dispatcher.queue.in_order(self.now)]

    def is_retried(self, client: Client) -> Generate:
        """Asserts that a next attempt was placed, follows it, and returns its `Generate`."""
        client.attempt += 1
        assert self.record(client).attempt == client.attempt
        generate = self.last(self.decode_of(client), Generate)
        assert (generate.seq, generate.attempt) == (client.seq, client.attempt)
        return generate


def agent(writer: NodeName, target: NodeName) -> AgentId:
    return AgentId(f"{target}-for-{writer}")


def make_grant(client: Client, prefill: NodeName = P0, decode: NodeName = D0, first_token_index: int = 0) -> Grant:
    return grant_of(GrantToken(f"{client.seq}/{client.attempt}".encode()), decode, prefill, first_token_index)


def grant_of(token: GrantToken, target: NodeName, writer: NodeName, first_token_index: int = 0) -> Grant:
    return Grant(token, target, writer, agent(writer, target), first_token_index, (BlockId(1), BlockId(2)), 5.0)


def gauges(*, blocks_free: int, blocks_cached: int = 0) -> Gauges:
    return Gauges(0, 0, 0, blocks_free, blocks_cached, 0, 0, 0, 0, 0)


def hello(name: NodeName, incarnation: str) -> NodeHello:
    return NodeHello(1, name, "prefill" if name.startswith("p") else "decode", Incarnation(f"{name}-{incarnation}"), "model", KV, 64, 4096)


def grant_for(frame: Generate) -> NodeName | None:
    """The prefill node for which a grant may ride on the answer."""
    return frame.offer.prefill if frame.offer is not None and frame.offer.may_grant else None
