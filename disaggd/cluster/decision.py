"""Local or remote: where a prompt is prefilled. Pure functions; the decode node decides, because it knows its own cache and batch.

What counts is whom the choice makes late. `adaptive` compares two costs in seconds:

    here        time to first token + what the streams that run here lose, summed over them + price of the targets put at risk,
                those of prompts to come included: they will find the node busy, and it cannot send away what it has begun
    elsewhere   time to first token + the part of the transfer that outlasts it + price of the targets that either puts at risk

A target that is surely met costs nothing and one that is surely missed costs `RISK_PRICE` times the target, so that seconds decide only
between ways that are as good for those who wait. Seconds after a target that is surely missed count little: whoever is late anyway is to
make nobody else late. Knows no node, no link and no clock.
"""

from math import ceil
from typing import Literal

import msgspec

from disaggd.cluster.offer import Predicted, PrefillCost, RemoteOffer, TransferCost

Policy = Literal["adaptive", "threshold", "always", "never"]
Override = Literal["auto", "local", "remote"]

RISK_PRICE = 4.0
"""A target surely missed costs so many times the target's seconds: more than the choice could ever save in seconds."""

SURELY_MET, SURELY_MISSED = 0.7, 1.2
"""Shares of the TTFT target between which it is more and more at risk: predictions err by a tenth or two, and the queue is overtaken."""

LATE_SHARE = 0.25
"""Of a second to the first token after its target is surely missed, what counts. At 1, both ways of an overloaded cluster would be filled
alike with prompts that are late; at 0, nobody would care how late they are."""

CROWDED = 0.5
"""With work for such a part of the TTFT target, a node makes whoever comes next as late as the new prompt takes, at full price. With
less the next one has time to spare, or goes elsewhere."""

UNTRIED, FORGOTTEN = 32, 128
"""A way that was not taken in so many decisions is taken once, to learn of it: after the first number if it costs little and puts no
target at risk, after the second whatever it costs (a link that was slow is never tried again otherwise)."""

CHEAP_TRY = 2.0
"""A way costs little if it costs up to so many times the other."""


MAX_TOKENS = 1 << 17
"""Of a sequence, where nobody says how long one may be."""


class DecisionRule(msgspec.Struct, frozen=True, kw_only=True):
    """What the configuration says."""

    policy: Policy = "adaptive"
    max_local_prefill_tokens: int = 512
    max_prefill_queue: int = 16


class LocalSide(msgspec.Struct, frozen=True, kw_only=True):
    """What a prefill at the decode node would meet. Seconds of computing."""

    prefill_cost: PrefillCost
    """What a prompt adds to steps that are taken anyway."""
    backlog_s: float
    """Of the prompts that are before it."""
    wait_s: float
    """Until they are done, the rest of their steps included."""
    num_decodes: int
    """Streams that run, and are delayed."""
    step_s: float
    """A step with no prompt in it, when the turn comes to this one."""
    share_s: float
    """What such a step carries of a prompt besides."""
    breaks_itl: bool
    """Even the smallest chunk would make their steps longer than they should be."""
    overhead_s: float = 0.0
    slowness: float = 1.0
    """What first tokens here were late by, against this arithmetic, of late: a constant and a factor."""

    def ttft_s(self, num_uncached: int, num_cached: int) -> float:
        """From the decision to the first token."""
        return self.overhead_s + self.slowness * self.plain_ttft_s(num_uncached, num_cached)

    def plain_ttft_s(self, num_uncached: int, num_cached: int) -> float:
        """By arithmetic alone: a prompt gets a share of each step, and the rest of the step is not its own."""
        work = self.prefill_cost.seconds(num_uncached, num_cached)
        return self.wait_s + work + ceil(work / self.share_s) * self.step_s

    def damage_s(self, num_uncached: int, num_cached: int) -> float:
        """What the running streams lose, summed over them: each stands still while the prompt is computed."""
        return self.num_decodes * self.prefill_cost.seconds(num_uncached, num_cached)


class RemoteSide(msgspec.Struct, frozen=True, kw_only=True):
    """What a prefill elsewhere would meet."""

    prefill_cost: PrefillCost
    transfer_cost: TransferCost
    wait_s: float
    bytes_per_token: float
    overhead_s: float = 0.0
    slowness: float = 1.0
    """What first tokens from elsewhere were late by, against this arithmetic, of late: a constant and a factor."""

    def ttft_s(self, num_uncached: int, num_cached: int) -> float:
        """From the decision to the first token, which comes before the KV."""
        return self.overhead_s + self.slowness * self.plain_ttft_s(num_uncached, num_cached)

    def plain_ttft_s(self, num_uncached: int, num_cached: int) -> float:
        """By arithmetic alone."""
        return self.wait_s + self.prefill_cost.seconds(num_uncached, num_cached)

    def exposed_s(self, num_pushed: int, num_uncached: int, num_cached: int) -> float:
        """What the second token waits for: the wire is busy while the prompt is computed, and has the rest to do after that."""
        wire_s = self.transfer_cost.per_byte_s * self.bytes_per_token * num_pushed
        return self.transfer_cost.base_s + max(0.0, wire_s - self.prefill_cost.seconds(num_uncached, num_cached))


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt at one decode node, now."""

    num_tokens: int
    num_cached: int = 0
    """At the decode node."""
    override: Override = "auto"
    offer: RemoteOffer | None
    """None: no prefill node can be reached."""
    unheard_s: float = 0.0
    """Prefills elsewhere that were decided on, and of which the router had not heard when it made the offer."""
    max_remote_tokens: int | None = None
    """What the node has memory to receive; None: as much as its pool holds."""
    max_tokens: int = MAX_TOKENS
    """Of any sequence."""
    ttft_target_s: float
    """What is left of it."""
    itl_target_s: float | None = None
    bytes_per_token: float = 0.0
    block_size: int = 1
    """KV travels in whole blocks."""
    local: LocalSide | None = None
    """None until the node knows its own speed."""
    since_local: int = 0
    since_remote: int = 0
    """Decisions since a prompt was prefilled here, and elsewhere."""

    @property
    def num_uncached(self) -> int:
        return self.num_tokens - self.num_cached

    @property
    def remote(self) -> RemoteSide | None:
        """None until something has been measured of it."""
        if self.offer is None or self.offer.prefill_cost is None or self.offer.transfer_cost is None:
            return None
        return RemoteSide(
            prefill_cost=self.offer.prefill_cost,
            transfer_cost=self.offer.transfer_cost,
            wait_s=self.offer.wait_s + self.unheard_s,
            bytes_per_token=self.bytes_per_token,
            overhead_s=self.offer.overhead_s,
            slowness=self.offer.slowness,
        )


class Decision(msgspec.Struct, frozen=True):
    """The verdict, and what explains it in the receipt: `code: sentence`. Metrics count the code."""

    remote: bool
    reason: str
    predicted: Predicted | None = None


class Way(msgspec.Struct, frozen=True):
    """One of the two, in seconds."""

    ttft_s: float
    late_s: float
    """Of `ttft_s`, what is after a target that is surely missed."""
    harm_s: float
    """Done to others, or to what follows the first token."""
    price_s: float
    """Of the targets that it puts at risk."""
    crowding_s: float = 0.0
    """The same, of prompts to come."""

    @property
    def seconds(self) -> float:
        return self.ttft_s + self.harm_s

    @property
    def cost_s(self) -> float:
        return self.seconds - (1 - LATE_SHARE) * self.late_s + self.price_s + self.crowding_s


def decide(rule: DecisionRule, situation: Situation) -> Decision:
    """Where this prompt is prefilled. With no prefill node every policy is local, and so is a prompt larger than what can be received."""
    here, there = _here(situation), _there(situation)
    verdict = _bound(rule, situation)
    if verdict is None and rule.policy == "adaptive":
        verdict = _weigh(situation, here, there)
    remote, reason = verdict or _by_threshold(rule, situation)
    return Decision(remote, reason, _predicted(situation, here, there))


def _bound(rule: DecisionRule, situation: Situation) -> tuple[bool, str] | None:
    """What leaves no choice."""
    override, limit = situation.override, situation.max_remote_tokens
    if override == "local":
        return False, "requested: local prefill"
    if rule.policy == "never" and override != "remote":
        return False, "policy: never remote"
    if situation.offer is None:
        return False, "no_prefill_node: none is reachable"
    if limit is not None and situation.num_uncached > limit:
        return False, f"staging: {situation.num_uncached} uncached tokens > {limit} that can be received"
    if override == "remote":
        return True, "requested: remote prefill"
    if rule.policy == "always":
        return True, "policy: always remote"
    if rule.policy == "adaptive" and situation.offer.queue_is_full:
        return False, f"queue_full: {situation.offer.queue_depth} jobs wait, and there is no room for more"
    return None


def _by_threshold(rule: DecisionRule, situation: Situation) -> tuple[bool, str]:
    """Remote iff more than `max_local_prefill_tokens` tokens are uncached and the prefill queue is shorter than its limit."""
    offer, num_uncached = situation.offer, situation.num_uncached
    assert offer is not None, "there is no choice"
    if num_uncached <= rule.max_local_prefill_tokens:
        return False, f"short: {num_uncached} uncached tokens ≤ {rule.max_local_prefill_tokens}"
    if offer.queue_depth >= rule.max_prefill_queue:
        return False, f"queue_full: {offer.queue_depth} jobs wait ≥ {rule.max_prefill_queue}"
    return True, f"long: {num_uncached} uncached tokens > {rule.max_local_prefill_tokens}"


# ── the two ways ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _here(situation: Situation) -> Way | None:
    local = situation.local
    if local is None:
        return None
    ttft_s = local.ttft_s(situation.num_uncached, situation.num_cached)
    misses = _risk(ttft_s, situation.ttft_target_s) + (local.num_decodes if local.breaks_itl else 0)
    work_s = local.prefill_cost.seconds(situation.num_uncached, situation.num_cached)
    return Way(
        ttft_s=ttft_s,
        harm_s=local.damage_s(situation.num_uncached, situation.num_cached),
        price_s=misses * _price_s(situation),
        late_s=_late_s(ttft_s, situation.ttft_target_s),
        crowding_s=_crowding_s(local.backlog_s, work_s, situation.ttft_target_s),
    )


def _there(situation: Situation) -> Way | None:
    remote, offer = situation.remote, situation.offer
    if remote is None or offer is None:
        return None
    prompt = situation.num_tokens - offer.num_cached, offer.num_cached
    ttft_s = remote.ttft_s(*prompt)
    num_pushed = -(-situation.num_uncached // situation.block_size) * situation.block_size
    exposed_s = remote.exposed_s(num_pushed, *prompt)
    misses = _either(_risk(ttft_s, situation.ttft_target_s), _second_token_risk(situation, exposed_s))
    return Way(ttft_s=ttft_s, harm_s=exposed_s, price_s=misses * _price_s(situation), late_s=_late_s(ttft_s, situation.ttft_target_s))


def _crowding_s(backlog_s: float, work_s: float, target_s: float) -> float:
    """What prompts to come are put at risk by `work_s` more: as if one came that is late by it, the surer the more there is to do."""
    if target_s <= 0:
        return 0.0
    return min(1.0, (backlog_s + work_s) / (CROWDED * target_s)) * RISK_PRICE / (SURELY_MISSED - SURELY_MET) * work_s


def _second_token_risk(situation: Situation, exposed_s: float) -> float:
    """It waits for the KV, for about half of a step that is under way when that lands, and for one of its own."""
    target_s, local = situation.itl_target_s, situation.local
    if target_s is None or local is None:
        return 0.0
    step_s = max(local.step_s, target_s / 2) if local.backlog_s else local.step_s  # such steps are shortened for those who come
    return _risk(exposed_s + 1.5 * step_s, target_s)


def _either(one: float, other: float) -> float:
    """Of two risks to one request, which is lost once."""
    return 1.0 - (1.0 - one) * (1.0 - other)


def _risk(seconds: float, target_s: float) -> float:
    """0 when the target is surely met, 1 when it is surely missed; 1 for both ways when it has passed."""
    if target_s <= 0:
        return 1.0
    return min(1.0, max(0.0, (seconds / target_s - SURELY_MET) / (SURELY_MISSED - SURELY_MET)))


def _late_s(ttft_s: float, target_s: float) -> float:
    return max(0.0, ttft_s - SURELY_MISSED * max(0.0, target_s))


def _price_s(situation: Situation) -> float:
    return RISK_PRICE * max(0.0, situation.ttft_target_s)


def _weigh(situation: Situation, here: Way | None, there: Way | None) -> tuple[bool, str] | None:
    """The cheaper way, or the one that was not tried for long. None until both are known."""
    if here is None or there is None:
        return None
    remote = there.cost_s < here.cost_s
    taken, other, untried = (there, here, situation.since_local) if remote else (here, there, situation.since_remote)
    if untried >= FORGOTTEN or (untried >= UNTRIED and not other.price_s and other.seconds <= CHEAP_TRY * taken.seconds):
        return not remote, f"explore: {_in_words(here, there)}; not tried for {untried} decisions"
    is_quicker = (there.seconds < here.seconds) == remote
    return remote, f"{'cheaper' if is_quicker else 'target'}: {_in_words(here, there)}"


def _in_words(here: Way, there: Way) -> str:
    return (
        f"here {_ms(here.ttft_s)}, {_ms(here.harm_s)} of delay to others{_at_risk(here)}; "
        f"elsewhere {_ms(there.ttft_s)}, {_ms(there.harm_s)} of KV{_at_risk(there)}"
    )


def _at_risk(way: Way) -> str:
    return f", {_ms(way.price_s)} for targets at risk" if way.price_s >= 0.5e-3 else ""


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"


# ── what is told ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _predicted(situation: Situation, here: Way | None, there: Way | None) -> Predicted | None:
    if here is None and there is None:
        return None
    return Predicted(
        None if here is None else here.ttft_s,
        None if there is None else there.ttft_s,
        None if here is None else here.harm_s,
        _remote_plain_s(situation),
        breakeven_tokens(situation),
    )


def _remote_plain_s(situation: Situation) -> float | None:
    remote, offer = situation.remote, situation.offer
    if remote is None or offer is None:
        return None
    return remote.plain_ttft_s(situation.num_tokens - offer.num_cached, offer.num_cached)


def breakeven_tokens(situation: Situation) -> int | None:
    """From how many tokens on an uncached prompt would cost less elsewhere now; None until both ways are known.

    Up to the longest prompt there may be; that one, where it does not pay even then. Short prompts may pay besides, if long ones miss a
    target on either way.
    """
    if situation.local is None or situation.remote is None or situation.offer is None:
        return None
    offer = msgspec.structs.replace(situation.offer, num_cached=0)

    def pays(num_tokens: int) -> bool:
        uncached = msgspec.structs.replace(situation, num_tokens=num_tokens, num_cached=0, offer=offer)
        here, there = _here(uncached), _there(uncached)
        return here is not None and there is not None and there.cost_s < here.cost_s

    high = situation.max_tokens
    if not pays(high):
        return high
    low = high // 2
    while low and pays(low):
        low, high = low // 2, low
    low += 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle) else (middle + 1, high)
    return low
