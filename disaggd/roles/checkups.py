"""`Checkups`: checks every way of KV in the cluster when somebody asks, and says what is not as it should be, and why.

Runs on the router's loop. Two ways that have a node in common are checked one after the other, so that what they take is their own;
others at the same time.
"""

import asyncio
import contextlib
import time
from collections import defaultdict

from disaggd.cluster.dispatcher import Dispatcher
from disaggd.cluster.link_trouble import in_plain_words
from disaggd.cluster.pair_checks import CheckOutcome, CheckResult, Effort, RankCheck
from disaggd.cluster.peers import Pair, PairState
from disaggd.config import Config, NodeConfig
from disaggd.ids import NodeName
from disaggd.observe.checkup import Checkup, NodeCheck, RankWay, Verdict, WayCheck

EFFORT = Effort(num_rounds=20, budget_s=1.0)
"""For one way."""
PROBE_PATIENCE_S = 3.0
"""For ways that are being opened just now: a cluster that has just started."""
WAY_PATIENCE_S = 12.0
"""For all rounds of one way, once it is its turn."""

_ON_ITS_WAY = (PairState.OPENING, PairState.PROBING, PairState.CHECKING)
_VERDICTS: dict[CheckOutcome, Verdict] = {"ok": "ok", "wrong": "wrong", "failed": "failed", "skipped": "unchecked"}


class Checkups:
    """One router's."""

    def __init__(self, config: Config, router: NodeName, dispatcher: Dispatcher) -> None:
        self._config = config
        self._router = router
        self._dispatcher = dispatcher
        self._no_link: dict[NodeName, str] = {}
        """Why there is none."""
        self._settled = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()
        self._latest: tuple[float, Checkup] | None = None
        """And when it began."""

    # ── what happens ─────────────────────────────────────────────────────────────────────────────────────────────────

    def node_up(self, name: NodeName) -> None:
        self._no_link.pop(name, None)

    def node_down(self, name: NodeName, reason: str) -> None:
        self._no_link[name] = f"its link was lost: {reason}"

    def no_link(self, node: NodeConfig, error: Exception, why: str) -> None:
        """An attempt has failed; `why` is what the log says of it."""
        self._no_link[node.name] = in_plain_words(error, why, node)

    def tick(self) -> None:
        """Call a few times a second."""
        if any(pair.state in _ON_ITS_WAY for pair in self._dispatcher.pairs):
            self._settled.clear()
        else:
            self._settled.set()

    # ── what is asked ────────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> Checkup:
        """Check every way between nodes that are linked, and say of the others why they are not.

        Who asks while a checkup is under way gets the next one, and so do all who ask meanwhile.
        """
        asked = time.monotonic()
        async with self._one_at_a_time:
            if self._latest is None or self._latest[0] < asked:
                self._latest = (time.monotonic(), await self._run())
            return self._latest[1]

    async def _run(self) -> Checkup:
        begun = time.monotonic()
        self.tick()  # a pair may have begun to open since the last one
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._settled.wait(), PROBE_PATIENCE_S)
        busy = defaultdict[NodeName, asyncio.Lock](asyncio.Lock)
        pairs = sorted(self._dispatcher.pairs, key=lambda pair: (pair.writer, pair.target))
        ways = await asyncio.gather(*(self._way(pair, busy) for pair in pairs))
        nodes = tuple(self._node(node) for node in self._config.nodes_of("prefill", "decode"))
        return Checkup(
            model=self._config.model.served_name,
            router=self._router,
            ok=all(node.link == "up" for node in nodes) and all(way.verdict == "ok" for way in ways),
            took_s=round(time.monotonic() - begun, 3),
            nodes=nodes,
            ways=tuple(ways),
        )

    def _node(self, node: NodeConfig) -> NodeCheck:
        is_up = node.name in self._dispatcher.prefills or node.name in self._dispatcher.decodes
        reason = "" if is_up else self._no_link.get(node.name, "it has not answered yet")
        return NodeCheck(name=node.name, role=node.role, listen=str(node.listen), link="up" if is_up else "down", reason=reason)

    async def _way(self, pair: Pair, busy: defaultdict[NodeName, asyncio.Lock]) -> WayCheck:
        first, second = sorted((pair.writer, pair.target))  # whoever waits for the second has the first: no circle
        async with busy[first], busy[second]:
            result = await self._check(pair)
        if result is None and pair.state is PairState.REFUSED:
            return WayCheck(writer=pair.writer, target=pair.target, verdict="refused", reason=pair.reason)
        if result is None:
            return WayCheck(writer=pair.writer, target=pair.target, verdict="unreachable", reason=self._why_unreachable(pair))
        ranks = tuple(_shown(rank) for rank in result.ranks)
        return WayCheck(writer=pair.writer, target=pair.target, verdict=_VERDICTS[result.outcome], reason=result.reason, ranks=ranks)

    async def _check(self, pair: Pair) -> CheckResult | None:
        """None if it cannot be checked."""
        done = asyncio.get_running_loop().create_future()

        def set_result(result: CheckResult) -> None:
            if not done.done():
                done.set_result(result)

        if not self._dispatcher.pairs.check(pair, EFFORT, set_result):
            return None
        try:
            return await asyncio.wait_for(done, WAY_PATIENCE_S)
        except TimeoutError:
            return CheckResult("failed", f"not done within {WAY_PATIENCE_S:g} s")

    def _why_unreachable(self, pair: Pair) -> str:
        (first, last), devices = self._config.transfer.port_range, self._config.transfer.devices or "lo"
        if pair.agent is None:
            return f"{pair.target} has no agent for it: are there free ports {first}-{last} on {devices}? Its log says more"
        numbers = [str(endpoint.port) for endpoint in pair.agent.endpoints]
        ports = f"port{'s' * (len(numbers) > 1)} {', '.join(numbers)} on {devices}"
        firewall = f"does a firewall close {first}-{last}?"
        if pair.state is PairState.PROBING:
            return f"{pair.writer} has sent its probe, and nothing arrives at {pair.target}, {ports}: {firewall}"
        return f"{pair.writer} cannot reach {pair.target}, {ports}: {pair.reason}. If it never could, {firewall}"


def _shown(rank: RankCheck) -> RankWay:
    return RankWay(
        writer_rank=rank.writer_rank,
        target_rank=rank.target_rank,
        transport=rank.transport,
        path=rank.path,
        kv_bytes=rank.kv_bytes,
        rounds=len(rank.rounds_s),
        gb_per_s=round(rank.bytes_per_s / 1e9, 6),
        p99_ms=round(rank.p99_s * 1e3, 3),
        wrong=rank.wrong,
    )
