"""Scenes of the failure matrix: requests brought into given phases on a 1P2D cluster, a blow, and the repair after it.

A phase is reached by stopping nodes where they are, never by luck: p0 and d0 stand still while it is looked at whether every request
is where it should be. If one is not, because this host was slow, the scene is set up once more. d1 is there to take over from d0, which
has the first block of every prompt cached, and is therefore preferred.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import msgspec

from disaggd.sampling import SamplingParams
from tests.support.answers import Ask, Stream
from tests.support.clusters import Cluster, wait_until
from tests.support.matrix import Blow, Phase
from tests.support.oracle import Oracle, prompt_of
from tests.support.proxied import ProxiedCluster
from tests.support.proxy import Condition
from tests.support.territory import Wire

BLOCK = 64
KV_BLOCKS = 70
"""At p0. Its credit is that many blocks of tokens, which the jobs that are not to wait fill."""
_SIZES: dict[Phase, int] = {"queued": 1500, "granted": 200, "prefilling": 3000, "pushing": 3000, "first_token": 400, "decoding": 70}
_NUM_TOKENS = 16
_NUM_DECODED = 300
_DECODING_FROM = 5
"""Tokens that the client of the decoding request has seen."""
_SETUP_TRIES = 5


class Tempo(msgspec.Struct, frozen=True, kw_only=True):
    """The deadlines of the cluster, and what is longer and shorter than they are, in seconds."""

    heartbeat_s: float
    missed_heartbeats: int
    lease_s: float
    quiesce_s: float
    user_timeout_s: float
    blink_s: float
    hang_s: float
    """At least; until every stream is over in any case."""

    @property
    def lost_s(self) -> float:
        """After so much silence a link is given up at the latest."""
        return self.heartbeat_s * (self.missed_heartbeats + 1)

    @property
    def may_lose_who_blinks(self) -> bool:
        """Heartbeats are counted from the last one, which may be one old when the blink begins."""
        return self.blink_s + self.heartbeat_s > self.heartbeat_s * self.missed_heartbeats

    @property
    def recovery_s(self) -> float:
        """Everything is well again within this after the last repair: links, pairs, quarantines; on a host that has much else to do."""
        return self.lost_s + self.lease_s + self.quiesce_s + self.user_timeout_s + 40.0


QUICK = Tempo(heartbeat_s=0.5, missed_heartbeats=7, lease_s=4.0, quiesce_s=2.0, user_timeout_s=2.0, blink_s=0.6, hang_s=0.0)
DEFAULT = Tempo(heartbeat_s=1.0, missed_heartbeats=3, lease_s=5.0, quiesce_s=10.0, user_timeout_s=5.0, blink_s=3.0, hang_s=60.0)
"""What a cluster has whose file says nothing."""


class SceneCluster(ProxiedCluster):
    """1P2D with the tempo's deadlines. Without a `wire` all of it is on loopback."""

    def __init__(self, directory: Path, oracle: Oracle, tempo: Tempo, wire: Wire | None = None) -> None:
        super().__init__(
            directory,
            wire=wire,
            decode=2,
            nodes={"max_step_tokens": 80, "max_sequences": 16},
            routing={"prefill_weight": 1.0, "load_weight": 0.0},
            disaggregation={"prefix_push": "never"},
            cluster={"heartbeat_s": tempo.heartbeat_s, "missed_heartbeats": tempo.missed_heartbeats},
            transfer={
                "lease_s": tempo.lease_s,
                "quiesce_s": tempo.quiesce_s,
                "user_timeout_s": tempo.user_timeout_s,
            },
        )
        self.nodes["p0"].options["kv_cache"] = KV_BLOCKS * oracle.kv_spec.bytes_per_block


def ask_in(phase: Phase, oracle: Oracle) -> Ask:
    """Each phase has its question, the same in every scene, so that the oracle answers it once."""
    salt = 100 + list(_SIZES).index(phase)
    num_tokens = _NUM_DECODED if phase == "decoding" else _NUM_TOKENS
    if phase in ("granted", "pushing"):
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    else:
        sampling = SamplingParams(
            temperature=0.8,
            seed=salt,
            max_tokens=num_tokens,
            ignore_eos=True,
            frequency_penalty=0.4,
            presence_penalty=0.3,
            repetition_penalty=1.1,
        )
    tail = prompt_of(_SIZES[phase] - BLOCK, oracle, salt=salt)
    return Ask(head(oracle) + tail, sampling)


def head(oracle: Oracle) -> list[int]:
    """A block that all prompts begin with."""
    return prompt_of(BLOCK, oracle, salt=99)


class Scene:
    """Requests of one cluster, each in its phase; p0 stands still, and d0 as well where its part is not to go on."""

    def __init__(self, cluster: SceneCluster, streams: dict[Phase, Stream]) -> None:
        self.cluster = cluster
        self.streams = streams
        self.router_losses = router_losses(cluster)
        self.struck_at = 0.0
        """Monotonic seconds."""


class Stage:
    """Sets scenes up on one cluster, strikes, and repairs."""

    _numbers = count()

    def __init__(self, cluster: SceneCluster, oracle: Oracle, tempo: Tempo, http: httpx.Client) -> None:
        """`http` takes any number of requests at a time."""
        self._cluster = cluster
        self._oracle = oracle
        self._tempo = tempo
        self._http = http
        self._salt = ""

    # ── phases ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def early(self) -> Scene:
        """`prefilling`: p0 stands still in the middle of a prompt, and d0, which goes on, has what is computed of it."""
        return self._set_up(self._try_early)

    def late(self) -> Scene:
        """All other phases at once: d0 stands still, and p0, which computes a prompt, has got stuck in writing to it."""
        return self._set_up(self._try_late)

    def _set_up(self, attempt: Callable[[dict[Phase, Stream]], None]) -> Scene:
        missed: list[str] = []
        for _ in range(_SETUP_TRIES):
            streams: dict[Phase, Stream] = {}
            try:
                self._warm_up()
                attempt(streams)
            except Missed as why:
                missed.append(str(why))
                self._resume("p0", "d0")
                for stream in streams.values():
                    stream.join(60)
                self.repair()
            else:
                return Scene(self._cluster, streams)
        raise AssertionError(f"the phases were not reached: {missed}")

    def _warm_up(self) -> None:
        """The first block of all prompts of this scene, and of no other, is cached at d0."""
        self._salt = f"scene-{next(self._numbers)}"
        self._complete([*head(self._oracle), 1], "local")

    def _try_early(self, streams: dict[Phase, Stream]) -> None:
        self._stop("p0")
        self._ask(streams, "prefilling", "remote", "prefilling")
        self._resume("p0")
        self._wait("p0 has begun", lambda: self._node("p0").get("running", 0) > 0)
        self._stop("p0")
        self._expect("prefilling", streams["prefilling"], num_tokens=range(1))

    def _try_late(self, streams: dict[Phase, Stream]) -> None:
        self._stop("p0")
        for phase in ("first_token", "pushing", "granted"):
            self._ask(streams, phase, "remote", "prefilling")
        self._ask(streams, "queued", "remote", "queued")
        self._ask(streams, "decoding", "local", "decoding")
        self._wait("tokens are decoded", lambda: streams["decoding"].num_tokens >= _DECODING_FROM)
        self._stop("d0")
        self._resume("p0")
        self._wait("the first token is there", lambda: streams["first_token"].num_tokens > 0)
        self._wait("the next prompt has begun", lambda: self._node("p0").get("waiting") == 1)
        self._stop("p0")
        self._expect("decoding", streams["decoding"], num_tokens=range(_DECODING_FROM, _NUM_DECODED))
        self._expect("prefilling", streams["first_token"], num_tokens=range(1, 2))
        self._expect("prefilling", streams["pushing"], num_tokens=range(1))
        self._expect("prefilling", streams["granted"], num_tokens=range(1))
        self._expect("queued", streams["queued"], num_tokens=range(1))
        if unread_bytes(self._cluster, "d0") < _SIZES["first_token"] // 2 * self._oracle.kv_spec.bytes_per_block // BLOCK:
            raise Missed("nothing is in flight that nobody reads")

    def _ask(self, streams: dict[Phase, Stream], phase: Phase, policy: str, until: str) -> None:
        """The request, at d0 and in what the router calls the phase `until`."""
        stream = streams[phase] = Stream(self._http, f"{phase}-{self._salt}", ask_in(phase, self._oracle), self._salt, policy)
        self._wait(f"{phase} is {until}", lambda: self._phase(stream) == until)

    def _complete(self, prompt: list[int], policy: str) -> dict[str, Any]:
        """The receipt of a completion of one token."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 2, "ignore_eos": True, "cache_salt": self._salt}
        reply = self._http.post("/v1/completions", json=body, headers={"x-disaggd-policy": policy})
        assert reply.status_code == 200, reply.text
        return self._cluster.receipt(reply.json()["id"])

    def _expect(self, phase: str, stream: Stream, num_tokens: range) -> None:
        if self._phase(stream) != phase or stream.num_tokens not in num_tokens or stream.end is not None:
            raise Missed(f"{stream.id} is {self._phase(stream)} with {stream.num_tokens} tokens, not {phase}")
        receipt = self._cluster.receipt(stream.id)
        if (len(receipt["attempts"]), receipt["decode_node"]) != (1, "d0"):
            raise Missed(f"{stream.id} was tried again before anything happened")

    def _phase(self, stream: Stream) -> str | None:
        receipt = self.receipt(stream)
        return None if receipt is None else str(receipt["phase"])

    def receipt(self, stream: Stream) -> dict[str, Any] | None:
        """None if the router does not know it, or is not there."""
        with contextlib.suppress(httpx.TransportError):
            reply = self._http.get(f"/v1/requests/{stream.id}")
            return dict(reply.json()) if reply.status_code == 200 else None
        return None

    def _node(self, name: str) -> dict[str, float]:
        return next(node for node in self._http.get("/v1/cluster").json()["nodes"] if node["name"] == name)

    def _wait(self, what: str, condition: Callable[[], bool]) -> None:
        try:
            wait_until(what, condition, 10, every_s=0.005)
        except TimeoutError as error:
            raise Missed(str(error)) from error

    # ── blows ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def strike(self, scene: Scene, blow: Blow) -> None:
        """The blow falls while p0 and d0 stand still; then everybody goes on who can. Returns when every stream is over."""
        scene.struck_at = time.monotonic()
        if blow.victim == "wire":
            self._strike_wire(scene, blow)
        elif blow.victim in ("link_to_prefill", "link_to_decode"):
            self._strike_link(scene, "p0" if blow.victim == "link_to_prefill" else "d0", blow)
        else:
            self._strike_node(scene, {"prefill": "p0", "decode": "d0", "router": "router"}[blow.victim], blow)

    def _strike_node(self, scene: Scene, name: str, blow: Blow) -> None:
        others = [other for other in ("p0", "d0") if other != name]
        match blow.fault:
            case "killed":
                self._cluster.kill(name)
                self._resume(*others)
                self._await_ends(scene)
                self._cluster.start_node(name)
            case "restarted":
                self._cluster.kill(name)
                self._cluster.start_node(name)
                self._resume(*others)
            case "blinks":
                self._stop(name)
                self._resume(*others)
                time.sleep(self._tempo.blink_s)
                self._resume(name)
            case "hangs":
                self._stop(name)
                self._resume(*others)
                self._await_loss(scene, name)
                self._resume(name)
            case "slow":
                with slowed(self._cluster, name):
                    self._resume(*others)
                    self._await_ends(scene)
        self._await_ends(scene)

    def _strike_link(self, scene: Scene, name: str, blow: Blow) -> None:
        cut, stalled, slow = Condition(is_cut=True), Condition(is_stalled=True), Condition(delay_s=0.02, bytes_per_s=100_000)
        condition = {"killed": cut, "restarted": cut, "blinks": stalled, "hangs": stalled, "slow": slow}[blow.fault]
        self._cluster.set_link(name, condition)
        if blow.fault == "restarted":
            self._cluster.mend_links()
        self._resume("p0", "d0")
        if blow.fault == "blinks":
            time.sleep(self._tempo.blink_s)
        elif blow.fault == "hangs":
            self._await_loss(scene, name)
        elif blow.fault != "restarted":
            self._await_ends(scene)
        self._cluster.mend_links()
        self._await_ends(scene)

    def _strike_wire(self, scene: Scene, blow: Blow) -> None:
        wire = self._cluster.wire
        assert wire is not None
        {"killed": wire.down, "restarted": wire.down, "blinks": wire.silent, "hangs": wire.silent, "slow": wire.slow}[blow.fault]()
        if blow.fault == "restarted":
            wire.mend()
        self._resume("p0", "d0")
        if blow.fault == "blinks":
            time.sleep(self._tempo.blink_s)
        else:
            self._await_ends(scene)
        wire.mend()
        self._await_ends(scene)

    def _await_loss(self, scene: Scene, name: str) -> None:
        """Until those who wait for it have given it up, and every stream is over that can be without it."""
        if name == "router":
            wait_until("the router is given up", lambda: self._has_been_lost(scene), self._tempo.lost_s + 20)
        else:
            wait_until(f"the link to {name} is lost", lambda: self._node(name)["link"] == "down", self._tempo.lost_s + 20)
            self._await_ends(scene)
        time.sleep(max(0.0, scene.struck_at + self._tempo.hang_s - time.monotonic()))

    def _has_been_lost(self, scene: Scene) -> bool:
        """By all nodes, since the scene was set up."""
        return all(number > scene.router_losses[name] for name, number in router_losses(self._cluster).items())

    def _await_ends(self, scene: Scene) -> None:
        for stream in scene.streams.values():
            stream.join(self._tempo.recovery_s)

    # ── repair ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def repair(self) -> None:
        """Until the cluster is whole, no block is in anybody's hands, and a prompt is prefilled elsewhere once more."""
        bound_s = self._tempo.recovery_s
        self._cluster.mend_links()
        wait_until("the cluster is whole", self._is_whole, bound_s, every_s=0.05)
        self._cluster.wait_idle(bound_s)
        wait_until("p0 and d0 are used again", self._is_served, bound_s)
        self._cluster.wait_idle(bound_s)

    def _is_whole(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self._cluster.is_whole()
        return False

    def _is_served(self) -> bool:
        self._salt = f"repair-{next(self._numbers)}"
        receipt = self._complete(prompt_of(300, self._oracle, salt=98), "remote")
        return (receipt["prefill_node"], receipt["decode_node"]) == ("p0", "d0")

    def _stop(self, *names: str) -> None:
        for name in names:
            self._cluster.kill(name, signal.SIGSTOP)

    def _resume(self, *names: str) -> None:
        for name in names:
            if self._cluster.is_running(name):
                self._cluster.kill(name, signal.SIGCONT)


def router_losses(cluster: Cluster) -> dict[str, int]:
    """How often each engine node has lost its router."""
    return {name: cluster.log(name).read_text().count("link to router is down") for name in ("p0", "d0", "d1")}


class Missed(Exception):
    """A phase was not reached, or not kept."""


@contextlib.contextmanager
def slowed(cluster: Cluster, name: str) -> Iterator[None]:
    """The process has a quarter of its time, in pieces of 20 ms."""
    over = threading.Event()

    def slow() -> None:
        while not over.wait(0.02):
            cluster.kill(name, signal.SIGSTOP)
            over.wait(0.06)
            cluster.kill(name, signal.SIGCONT)

    thread = threading.Thread(target=slow)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def unread_bytes(cluster: Cluster, node: str) -> int:
    """In the node's sockets, because it does not read them."""
    process = Path(f"/proc/{cluster.nodes[node].pid}")
    links = (descriptor.readlink() for descriptor in (process / "fd").iterdir())
    inodes = {str(link).removeprefix("socket:[").removesuffix("]") for link in links}
    rows: Iterable[list[str]] = (line.split() for line in (process / "net/tcp").read_text().splitlines()[1:])
    return sum(int(row[4].partition(":")[2], 16) for row in rows if row[9] in inodes)
