"""`Decider`: what a decode node knows of itself, laid before the decision. And what any engine node tells of its speed.

Runs on the compute thread. The decision itself is pure (`cluster/decision.py`).
"""

from collections import defaultdict, deque

from disaggd.cluster.costs import DelayFit
from disaggd.cluster.decision import Decision, DecisionRule, LocalSide, Situation, decide
from disaggd.cluster.offer import PrefillCost, RemoteOffer
from disaggd.cluster.protocol import Generate, Measured
from disaggd.engine.engine import Engine
from disaggd.engine.scheduler import GRAIN
from disaggd.engine.sequence import Sequence
from disaggd.engine.step_cost import StepCost
from disaggd.ids import NodeName
from disaggd.roles.compute import LinkId

TYPICAL_CONTEXT = 512
"""Tokens of a sequence in the decode steps that are told of."""


class Unheard:
    """What one router is told to have prefilled elsewhere, as long as its offers are made without knowing it."""

    def __init__(self) -> None:
        self._num_told = 0
        self._prefills: deque[tuple[int, NodeName, float]] = deque()
        """Number of the decision, prefill node, seconds."""

    def add(self, taken: RemoteOffer | None, num_tokens: int) -> None:
        """Another decision was told: `taken` was accepted for a prompt of so many tokens; None: it is prefilled here."""
        self._num_told += 1
        if taken is not None and taken.prefill_cost is not None:
            seconds = taken.prefill_cost.seconds(num_tokens - taken.num_cached, taken.num_cached)
            self._prefills.append((self._num_told, taken.prefill, seconds))

    def seconds(self, offer: RemoteOffer) -> float:
        """Of prefills on the node of `offer`, which was made in ignorance of them."""
        while self._prefills and self._prefills[0][0] <= offer.num_decisions:
            self._prefills.popleft()
        return sum(seconds for _, node, seconds in self._prefills if node == offer.prefill)


class Decider:
    """Decides for one decode node, and remembers how far its own first tokens were off."""

    def __init__(self, rule: DecisionRule, engine: Engine, *, max_remote_tokens: int | None, bytes_per_token: float) -> None:
        self._rule = rule
        self._engine = engine
        self._max_remote_tokens = max_remote_tokens
        self._bytes_per_token = bytes_per_token
        self._delays = DelayFit()
        self._unheard: defaultdict[LinkId, Unheard] = defaultdict(Unheard)
        self._since_local = 0
        self._since_remote = 0

    def decide(self, sequence: Sequence, num_cached: int, frame: Generate, link: LinkId, now: float) -> tuple[Decision, float | None]:
        """The decision; and what arithmetic alone says of a first token here, for `first_token_came`."""
        num_tokens = len(sequence.tokens)
        local = self._local(num_cached, now)
        decision = decide(
            self._rule,
            Situation(
                num_tokens=num_tokens,
                num_cached=num_cached,
                override=frame.policy,
                offer=frame.offer,
                unheard_s=0.0 if frame.offer is None else self._unheard[link].seconds(frame.offer),
                max_remote_tokens=self._max_remote_tokens,
                max_tokens=self._engine.context_limit,
                ttft_target_s=frame.ttft_target_s,
                itl_target_s=self._engine.pace.itl_target_s,
                bytes_per_token=self._bytes_per_token,
                block_size=self._engine.pool.block_size,
                local=local,
                since_local=self._since_local,
                since_remote=self._since_remote,
            ),
        )
        self._since_local = self._since_local + 1 if decision.remote else 0
        self._since_remote = 0 if decision.remote else self._since_remote + 1
        return decision, None if local is None else local.plain_ttft_s(num_tokens - num_cached, num_cached)

    def told(self, link: LinkId, taken: RemoteOffer | None, num_tokens: int) -> None:
        """The router is being told to have a prompt of so many tokens prefilled as it offered (None: it is prefilled here)."""
        self._unheard[link].add(taken, num_tokens)

    def link_down(self, link: LinkId) -> None:
        self._unheard.pop(link, None)

    def first_token_came(self, plain_ttft_s: float, actual_s: float, now: float) -> None:
        """Of a prompt that was prefilled here, and not preempted meanwhile."""
        self._delays.learn(plain_ttft_s, actual_s, now)

    def _local(self, num_cached: int, now: float) -> LocalSide | None:
        """What a prompt would meet here that begins behind `num_cached` tokens; None until prefills have been measured."""
        cost, pace = self._engine.pace.cost, self._engine.pace
        if cost is None or not cost.prefill_s(GRAIN, num_cached):  # steps may have been measured all of which only decoded
            return None
        load, target_s, delay = self._engine.load(), pace.itl_target_s, self._delays.delay(now)
        now_s = cost.decode_step_s(load.decodes, load.decode_context)
        now_share_s = self._share_s(cost, load.decodes, load.decode_context, num_cached)
        decodes, context, wait_s = load.decodes, load.decode_context, 0.0
        for num_tokens, start in load.prefills:  # one after another, and each is a stream beside those behind it
            work_s = cost.prefill_s(num_tokens, start)
            steps = work_s / self._share_s(cost, decodes, context, start)
            wait_s += work_s + steps * cost.decode_step_s(decodes, context)
            decodes, context = decodes + 1, context + start + num_tokens
        return LocalSide(
            prefill_cost=PrefillCost(0.0, cost.per_token_s, cost.per_token_context_s),
            backlog_s=sum(cost.prefill_s(num_tokens, start) for num_tokens, start in load.prefills),
            wait_s=wait_s,
            num_decodes=load.decodes,
            step_s=cost.decode_step_s(decodes, context),
            share_s=self._share_s(cost, decodes, context, num_cached),
            breaks_itl=target_s is not None and now_s <= target_s < now_s + now_share_s,
            overhead_s=delay.overhead_s,
            slowness=delay.slowness,
        )

    def _share_s(self, cost: StepCost, decodes: int, context: int, start: int) -> float:
        """What a step beside so many streams carries of a prompt behind `start` tokens."""
        limit = self._engine.limits.max_step_tokens
        allowed = self._engine.pace.prefill_tokens(decodes, context, start)
        return cost.prefill_s(max(GRAIN, min(limit - decodes, limit if allowed is None else allowed) // GRAIN * GRAIN), start)


def prefill_cost(cost: StepCost, max_step_tokens: int) -> PrefillCost:
    """Of a prompt that is alone: a step for every `max_step_tokens` tokens, and at least one."""
    return PrefillCost(cost.base_s, cost.per_token_s + cost.base_s / max_step_tokens, cost.per_token_context_s)


def measured(engine: Engine) -> Measured | None:
    """What the node knows of its own speed, by its self-measurement or its steps since; None when it knows nothing."""
    cost = engine.pace.cost
    if cost is None:
        return None
    per_decode_s = cost.per_decode_s + cost.per_decode_context_s * TYPICAL_CONTEXT
    return Measured(prefill_cost(cost, engine.limits.max_step_tokens), cost.base_s + per_decode_s, per_decode_s)
