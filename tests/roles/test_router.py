"""The router's view of the cluster for the gateway: geometry checks, request ids that come twice, draining."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from disaggd.api_keys import ApiKey, KeyFile, key_table, new_key, parse_keys
from disaggd.cluster.hello import NodeHello
from disaggd.cluster.holdings import Holding
from disaggd.cluster.peers import DecodePeer, PrefillPeer
from disaggd.cluster.protocol import (
    Abort,
    BlockList,
    Decided,
    Draining,
    Gauges,
    Generate,
    ListBlocks,
    RefusedLinks,
    SlowThread,
    TokenRun,
    Tokens,
    ToNode,
)
from disaggd.config import Config, NodeConfig, parse_config
from disaggd.errors import ConfigError, HelloRefused, Overloaded, TooSlow, Unavailable
from disaggd.gateway.access import Access
from disaggd.gateway.backend import Deltas, GenerationRequest
from disaggd.ids import Incarnation, NodeName, SeqId
from disaggd.model.directory import open_directory
from disaggd.observe.metrics import Metrics
from disaggd.roles import router
from disaggd.roles.router import STARTING_S, RouterBackend
from disaggd.sampling import SamplingParams
from disaggd.transfer.layout import KVSpec, kv_spec
from disaggd.units import Address

CONFIG = parse_config(
    """
    [model]
    dtype = "float32"
    [router]
    max_requests = 2
    max_unread_tokens = 100
    [cluster]
    drain_s = 7
    [[node]]
    name = "front"
    role = "router"
    listen = "127.0.0.1:8000"
    [[node]]
    name = "d0"
    role = "decode"
    listen = "127.0.0.1:8102"
    """
)
CONFIG_1P1D = msgspec.structs.replace(
    CONFIG, nodes=(*CONFIG.nodes, NodeConfig(name=NodeName("p0"), role="prefill", listen=Address("127.0.0.1:8101")))
)
UNREAD = CONFIG.router.max_unread_tokens
SPEC = open_directory("builtin:tiny").spec("float32")
KV = kv_spec(SPEC, 64)


def hello(kv: KVSpec = KV) -> NodeHello:
    return NodeHello(1, NodeName("d0"), "decode", Incarnation("one"), "model", kv, 100, 4096)


LINK: Any = SimpleNamespace(name=NodeName("d0"), peer=hello())
"""As much of a link as the backend looks at."""
GAUGES = Gauges(
    waiting=0,
    running=2,
    queued=0,
    blocks_free=7,
    blocks_cached=0,
    blocks_used=3,
    blocks_granted=0,
    blocks_held=0,
    blocks_quarantined=0,
    preemptions=0,
)


class Front:
    """A backend with one decode node that answers what the test says."""

    def __init__(self, config: Config = CONFIG) -> None:
        self.registry = CollectorRegistry()
        self.backend = RouterBackend(config, CONFIG.node("front"), SPEC, Metrics(self.registry))
        self.sent: list[ToNode] = []
        self.backend.dispatcher.decode_up(DecodePeer(NodeName("d0"), hello(), self.sent.append))

    def request(self, request_id: str, max_tokens: int = 4) -> GenerationRequest:
        return GenerationRequest(id=request_id, tokens=[5, 6, 7], sampling=SamplingParams(max_tokens=max_tokens), policy="auto")

    async def begin(self, request: GenerationRequest) -> AsyncGenerator[Deltas, None]:
        """Generate until the first delta, token 9."""
        deltas = self.backend.generate(request)
        first = asyncio.create_task(anext(deltas))
        await asyncio.sleep(0)
        frame = self.sent[-1]
        assert isinstance(frame, Generate)
        self.backend.dispatcher.on_frame(NodeName("d0"), Decided(frame.seq, 0, "short: it is", 0))
        self.tokens(frame, 0, 9)
        assert [delta.tokens for delta in await first] == [(9,)]
        return deltas

    def tokens(self, frame: Generate, start: int, *tokens: int, finish: bool = False) -> None:
        run = TokenRun(frame.seq, 0, start, tokens, None, "length" if finish else None)
        self.backend.dispatcher.on_frame(NodeName("d0"), Tokens((run,)))

    def generates(self) -> list[Generate]:
        return [frame for frame in self.sent if isinstance(frame, Generate)]


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("dtype", msgspec.structs.replace(KV, dtype="bfloat16")),
        ("block_size", msgspec.structs.replace(KV, block_size=16)),
        ("head_dim", msgspec.structs.replace(KV, head_dim=128)),
        ("groups", msgspec.structs.replace(KV, groups=())),
    ],
)
def test_a_node_of_another_geometry_is_refused_by_the_field_that_differs(field: str, other: KVSpec) -> None:
    backend = Front().backend
    node = CONFIG.node("d0")
    backend.accept(node, hello())
    with pytest.raises(HelloRefused, match=rf"kv\.{field} differs"):
        backend.accept(node, hello(other))


def test_a_pair_that_cannot_be_is_shown_with_the_field_that_differs() -> None:
    backend = Front().backend
    odd = msgspec.structs.replace(hello(), name=NodeName("p0"), role="prefill", kv=msgspec.structs.replace(KV, head_dim=128))
    backend.dispatcher.prefill_up(PrefillPeer(NodeName("p0"), odd, [].append))
    reason = f"head_dim differs: 128 and {KV.head_dim}"
    assert backend.cluster()["pairs"] == [{"prefill": "p0", "decode": "d0", "state": "refused", "reason": reason}]


def test_a_router_is_called_alike_wherever_it_says_who_it_is() -> None:
    front = Front()

    async def scenario() -> None:
        shown = front.backend.cluster()
        assert (shown["router"], shown["incarnation"]) == ("front", front.backend.incarnation)
        assert (await front.backend.check())["router"] == "front"

    asyncio.run(scenario())


def test_a_node_is_shown_with_its_ranks_and_the_size_of_its_blocks() -> None:
    backend = Front().backend
    backend.dispatcher.decode_up(DecodePeer(NodeName("d0"), msgspec.structs.replace(hello(), num_ranks=2), [].append))
    [d0] = backend.cluster()["nodes"]
    assert (d0["name"], d0["tp"], d0["block_size"]) == ("d0", 2, KV.block_size)


def test_a_stop_string_of_one_request_leaves_another_with_the_same_id_alone() -> None:
    async def scenario() -> None:
        front = Front()
        one, two = front.request("same"), front.request("same")
        first, second = await front.begin(one), await front.begin(two)
        front.backend.stopped(one)
        await first.aclose()
        front.tokens(front.generates()[1], 1, 10, 11, 12, finish=True)
        assert [delta.tokens async for deltas in second for delta in deltas] == [(10, 11, 12)]

    asyncio.run(scenario())


def test_a_stream_that_fell_behind_finds_all_that_came_and_then_the_error() -> None:
    async def scenario() -> None:
        front = Front()
        stream = await front.begin(front.request("a"))
        frame = front.generates()[0]
        front.tokens(frame, 1, 10)
        front.tokens(frame, 2, 11)
        front.backend.dispatcher.fail(frame.seq, Unavailable("gone"))
        assert [delta.tokens for delta in await anext(stream)] == [(10,), (11,)]
        with pytest.raises(Unavailable, match="gone"):
            await anext(stream)

    asyncio.run(scenario())


def test_a_stream_that_leaves_too_much_unread_is_aborted_on_its_node() -> None:
    async def scenario() -> None:
        front = Front()
        stream = await front.begin(front.request("a", max_tokens=2 * UNREAD))
        frame = front.generates()[0]
        front.tokens(frame, 1, *range(UNREAD + 1))
        await asyncio.sleep(0)
        assert front.sent[-1] == Abort(frame.seq, 0)
        with pytest.raises(TooSlow):
            await anext(stream)
        receipt = front.backend.receipt("a", None)
        assert receipt is not None and receipt.finish_reason == "abort"
        assert receipt.error == "101 tokens wait for its client, which reads too slowly"
        assert front.registry.get_sample_value("disaggd_slow_clients_total", {"why": "unread"}) == 1

    asyncio.run(scenario())


def test_the_receipt_of_a_request_whose_client_was_cut_says_so_and_of_one_whose_client_left_nothing() -> None:
    async def scenario() -> None:
        front = Front()
        cut, left = front.request("cut"), front.request("left")
        streams = [await front.begin(cut), await front.begin(left)]
        front.backend.cut(cut, "it reads nothing")
        assert isinstance(front.sent[-1], Abort)
        for stream in streams:
            await stream.aclose()
        front.backend.cut(cut, "too late for that")
        receipts = [front.backend.receipt(name, None) for name in ("cut", "left")]
        assert [(one.finish_reason, one.error) for one in receipts if one is not None] == [("abort", "it reads nothing"), ("abort", None)]

    asyncio.run(scenario())


def test_more_requests_than_the_limit_are_refused_at_once() -> None:
    async def scenario() -> None:
        front = Front()
        streams = [await front.begin(front.request(name)) for name in "ab"]
        with pytest.raises(Overloaded, match=r"2 sequences are in flight already \(\[router\] max_requests\)"):
            await anext(front.backend.generate(front.request("c")))
        for stream in streams:
            await stream.aclose()
        await (await front.begin(front.request("d"))).aclose()

    asyncio.run(scenario())


def test_a_draining_router_admits_nothing_and_lets_streams_go_on_for_a_while() -> None:
    async def scenario() -> None:
        front = Front()
        stream = await front.begin(front.request("a"))
        front.backend.drain()
        with pytest.raises(Unavailable, match="stopping"):
            await anext(front.backend.generate(front.request("b")))
        assert not front.backend.is_drained and front.backend.why_not_ready() == "the router is stopping"
        assert front.backend.cluster()["state"] == "draining"
        front.tokens(front.generates()[0], 1, 10, 11, 12, finish=True)
        assert [delta.finish_reason async for deltas in stream for delta in deltas] == ["length"]
        assert front.backend.is_drained

    asyncio.run(scenario())


@pytest.mark.parametrize(("seconds", "is_over"), [(6.9, False), (7.1, True)])
def test_what_is_not_through_within_drain_s_ends_with_an_error(
    seconds: float, is_over: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        front = Front()
        stream = await front.begin(front.request("a"))
        front.backend.drain()
        now = time.monotonic() + seconds
        monkeypatch.setattr(time, "monotonic", lambda: now)
        front.backend.tick()
        front.backend.tick()
        assert front.backend.is_drained == is_over
        assert caplog.messages == ["1 under way are cut: drain_s is over"] * is_over
        if is_over:
            with pytest.raises(Unavailable, match="the router is stopping"):
                await anext(stream)
        await stream.aclose()

    asyncio.run(scenario())


def test_the_last_decode_node_is_missed_aloud(caplog: pytest.LogCaptureFixture) -> None:
    front = Front()
    front.backend.dispatcher.decode_up(DecodePeer(NodeName("d1"), hello(), front.sent.append))
    for name in ("d0", "d1"):
        assert caplog.messages == []
        front.backend.on_down(SimpleNamespace(name=NodeName(name), peer=hello()), "connection lost")  # type: ignore[arg-type]
    assert caplog.messages == ["no decode node is left: requests wait for one for 10 s, then fail"]


def test_a_key_file_that_is_emptied_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "KEY_FILE_POLL_S", 0.001)
    (tmp_path / "keys.toml").write_text(key_table("alice", new_key()))
    file = KeyFile(str(tmp_path / "keys.toml"))
    access = Access(Metrics(CollectorRegistry()), file.read())
    told: asyncio.Queue[str] = asyncio.Queue()
    monkeypatch.setattr(router.log, "warning", told.put_nowait)

    async def scenario() -> None:
        following = asyncio.create_task(router._follow_keys(file, access, Metrics(CollectorRegistry())))
        (tmp_path / "keys.toml").write_text("")
        async with asyncio.timeout(20):
            assert await told.get() == "0 API keys: nobody may use this router"
        following.cancel()

    asyncio.run(scenario())


def test_a_draining_node_is_shown_as_such_and_with_no_other_the_router_is_not_ready() -> None:
    front = Front()
    states = []
    for frames in ([], [Draining()]):
        for frame in frames:
            front.backend.dispatcher.on_frame(NodeName("d0"), frame)
        (node,) = front.backend.cluster()["nodes"]  # type: ignore[misc]
        states.append((node["state"], front.backend.why_not_ready()))  # type: ignore[index]
    assert states == [("serving", None), ("draining", "every decode node is draining")]


def test_a_router_says_what_it_waits_for_while_the_cluster_starts_and_what_it_lacks_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    front = Front(CONFIG_1P1D)
    now = time.monotonic()
    dispatcher, reasons = front.backend.dispatcher, [front.backend.why_not_ready()]
    dispatcher.prefill_up(PrefillPeer(NodeName("p0"), msgspec.structs.replace(hello(), name=NodeName("p0"), role="prefill"), print))
    reasons.append(front.backend.why_not_ready())
    monkeypatch.setattr(time, "monotonic", lambda: now + STARTING_S)
    reasons.append(front.backend.why_not_ready())
    dispatcher.node_down(NodeName("d0"))
    reasons.append(front.backend.why_not_ready())
    assert reasons == [
        "the cluster is starting: no link to p0 yet",
        "the cluster is starting: no way for KV from p0 to d0 yet",
        None,
        "no decode node is up",
    ]


def test_how_long_blocks_have_been_held_is_told_to_the_millisecond() -> None:
    async def scenario() -> dict[str, Any]:
        front = Front()
        asking = asyncio.create_task(front.backend.blocks())
        await asyncio.sleep(0)
        (asked,) = (frame for frame in front.sent if isinstance(frame, ListBlocks))
        held = Holding(state="held", memory="pool", blocks=(), seq=SeqId("s"), attempt=0, peer=NodeName("p0"), age_s=1.23456789, reason="")
        front.backend.on_frame(LINK, BlockList(asked.request, (held,)))
        return await asking

    (shown,) = asyncio.run(scenario())["blocks"]
    assert (shown["state"], shown["age_s"]) == ("held", 1.235)


def test_the_receipt_of_a_running_request_shows_what_is_known() -> None:
    async def scenario() -> None:
        front = Front()
        stream = await front.begin(front.request("a"))
        receipt = front.backend.receipt("a", None)
        assert receipt is not None
        assert (receipt.decision, receipt.reason, receipt.output_tokens, receipt.finish_reason) == ("local", "short: it is", 1, None)
        await stream.aclose()
        receipt = front.backend.receipt("a", None)
        assert receipt is not None and receipt.finish_reason == "abort"
        assert front.backend.receipt("b", None) is None

    asyncio.run(scenario())


def test_two_keys_with_one_request_id_see_their_own_receipts_while_it_runs_and_after() -> None:
    async def scenario() -> None:
        front = Front()
        ours, theirs = (msgspec.structs.replace(front.request("same"), key=key) for key in ("alice", "bob"))
        first, second = await front.begin(ours), await front.begin(theirs)

        def seen() -> list[str | None]:
            found = [front.backend.receipt("same", key) for key in ("alice", "bob", "carol", None)]
            return [None if receipt is None else receipt.key for receipt in found]

        assert seen() == ["alice", "bob", None, "bob"]
        await second.aclose()
        assert seen() == ["alice", "bob", None, "alice"], "to an admin the one that runs"
        await first.aclose()
        assert seen() == ["alice", "bob", None, "alice"], "and then the one that ended last"
        assert [receipt.key for receipt in front.backend.receipts(5, "bob")] == ["bob"]
        assert len(front.backend.receipts(5, None)) == 2

    asyncio.run(scenario())


def test_receipts_come_newest_first_and_those_of_running_requests_among_them() -> None:
    async def scenario() -> None:
        front = Front()
        over, running = await front.begin(front.request("over")), await front.begin(front.request("running"))
        await over.aclose()
        assert [(receipt.id, receipt.phase) for receipt in front.backend.receipts(5, None)] == [("running", "decoding"), ("over", "done")]
        assert [receipt.id for receipt in front.backend.receipts(1, None)] == ["running"]
        await running.aclose()

    asyncio.run(scenario())


def test_the_trace_has_requests_that_are_over_requests_that_run_and_what_nodes_say() -> None:
    async def scenario() -> None:
        front = Front()
        over, running = await front.begin(front.request("over")), await front.begin(front.request("running"))
        await over.aclose()
        front.backend.on_frame(LINK, GAUGES)
        front.backend.on_down(LINK, "it vanished")
        trace = msgspec.json.decode(b"".join(front.backend.trace(None)))
        named = {(event["name"], event["ph"]) for event in trace["traceEvents"]}
        assert named >= {("over", "X"), ("running", "X"), ("blocks", "C"), ("sequences", "C"), ("link down", "i"), ("local", "i")}
        await running.aclose()

    asyncio.run(scenario())


def test_refused_links_are_counted_wherever_they_were_refused_and_a_stranger_names_no_series() -> None:
    front = Front()
    for total in (1, 2):
        front.backend.on_frame(LINK, RefusedLinks("secret", total))
    for field in ("secret", "kv.block_size", "whatever a stranger says", "and says next"):
        front.backend.on_refused(field)

    def count(by: str, cause: str) -> float | None:
        return front.registry.get_sample_value("disaggd_refused_links_total", {"by": by, "cause": cause})

    assert [count(*labels) for labels in (("d0", "secret"), ("front", "secret"), ("front", "kv.block_size"), ("front", "other"))] == [
        2,
        1,
        1,
        2,
    ]
    assert count("front", "whatever a stranger says") is None


def test_a_nodes_thread_that_does_not_get_on_is_shown_until_it_does_or_the_node_is_down() -> None:
    registry = CollectorRegistry()
    backend = RouterBackend(CONFIG, CONFIG.node("front"), SPEC, Metrics(registry))
    labels = {"node": "d0", "thread": "compute"}
    shown = []
    for seconds in (12.0, 0.0, 15.0):
        backend.on_frame(LINK, SlowThread("compute", seconds))
        shown.append(registry.get_sample_value("disaggd_node_thread_silent_seconds", labels))
    backend.on_down(LINK, "it ended itself")
    shown.append(registry.get_sample_value("disaggd_node_thread_silent_seconds", labels))
    assert shown == [12.0, 0.0, 15.0, None]


def test_whatever_befalls_the_file_of_keys_the_router_keeps_those_it_has_and_looks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(router, "KEY_FILE_POLL_S", 0.001)
    contents: Iterator[Exception | str] = iter([ConfigError("keys.toml: no such file"), MemoryError(), key_table("alice", new_key())])
    followed = asyncio.Event()

    class File(KeyFile):
        def has_changed(self) -> bool:
            return not followed.is_set()

        def read(self) -> tuple[ApiKey, ...]:
            if isinstance(content := next(contents), Exception):
                raise content
            followed.set()
            return parse_keys(content)

    registry = CollectorRegistry()

    async def scenario() -> None:
        metrics = Metrics(registry)
        task = asyncio.create_task(router._follow_keys(File(str(tmp_path)), Access(metrics, ()), metrics))
        async with asyncio.timeout(10):
            await asyncio.wait([task, asyncio.create_task(followed.wait())], return_when=asyncio.FIRST_COMPLETED)
        assert not task.done()
        task.cancel()

    asyncio.run(scenario())
    assert [record.getMessage().endswith("stay as they were") for record in caplog.records if record.levelname == "ERROR"] == [True, True]
    assert registry.get_sample_value("disaggd_unreadable_api_keys_total") == 2
