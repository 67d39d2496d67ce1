"""What a decision about one prompt is made on: what the router offers, and what both ways are predicted to take.

Plain data that travels inside frames (`protocol.py`). Seconds throughout; None is what nobody has measured yet.
"""

import msgspec

from disaggd.ids import NodeName
from disaggd.wire import Cost, Count, Real


class PrefillWork(msgspec.Struct, frozen=True, array_like=True):
    """Prompt tokens to compute, of one prompt or of several."""

    num_tokens: Count
    context: Cost
    """Σ n · (c + n/2) over n tokens of each behind c others: what they attend to, all together."""


class PrefillCost(msgspec.Struct, frozen=True, array_like=True):
    """Seconds to prefill n uncached tokens behind c cached ones: `base + per_token · n + per_token_context · n · (c + n/2)`."""

    base_s: Cost
    per_token_s: Cost
    per_token_context_s: Cost

    def seconds(self, num_uncached: int, num_cached: int) -> float:
        """For a prompt of which `num_cached` tokens need not be computed."""
        context = num_cached + num_uncached / 2
        return self.base_s + num_uncached * (self.per_token_s + self.per_token_context_s * context)


class TransferCost(msgspec.Struct, frozen=True, array_like=True):
    """Seconds from a push's last computed layer to its landing, or of a whole push: `base + per_byte · bytes`."""

    base_s: Cost
    per_byte_s: Cost


class RemoteOffer(msgspec.Struct, frozen=True, array_like=True):
    """What the router predicts of a prefill elsewhere. Costs are None until something has been measured."""

    prefill: NodeName
    """The prefill node that would take the job, were it decided now."""
    prefill_nodes: Count
    """Those that could."""
    queue_depth: Count
    """Jobs waiting in the prefill queue."""
    queue_is_full: bool
    wait_s: Real
    """Until that node would begin with the job, by arithmetic alone; without what the decode node has decided since `num_decisions`."""
    num_cached: Count
    """Tokens of this prompt that its prefix cache holds, as far as the router knows."""
    prefill_cost: PrefillCost | None
    transfer_cost: TransferCost | None
    """From that node to the decode node asked."""
    may_grant: bool
    """It has a free credit and nobody waits: a grant for it may ride on `NeedPrefill`."""
    num_decisions: Count = 0
    """Of the decode node that is asked, those that the router has heard of."""
    overhead_s: Cost = 0.0
    slowness: Cost = 1.0
    """What first tokens from elsewhere were late by, against the arithmetic, of late: a constant and a factor."""


class Predicted(msgspec.Struct, frozen=True, array_like=True):
    """What a decision was made on: seconds; None for what nobody could tell."""

    local_ttft_s: Real | None = None
    """From the decision to the first token, prefilled here."""
    remote_ttft_s: Real | None = None
    """The same, prefilled elsewhere."""
    local_damage_s: Real | None = None
    """By how much a prefill here would delay the tokens of all that run here, summed over them."""
    remote_plain_s: Real | None = None
    """Its `remote_ttft_s` by arithmetic alone, before that is corrected by experience."""
    breakeven_tokens: Count | None = None
    """From so many uncached tokens on a prompt would cost less elsewhere at that moment."""
