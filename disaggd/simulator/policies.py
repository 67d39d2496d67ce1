"""The policies that a replay compares, from words such as `adaptive` and `threshold:512`. Pure."""

from typing import get_args

import msgspec

from disaggd.cluster.decision import Policy
from disaggd.config import Config, DecodeOrder
from disaggd.errors import ConfigError

COMPARED = ("always", "never", "threshold:128", "threshold:256", "threshold:512", "threshold:1024", "threshold:2048")
"""What is compared with the cluster's own policy where nothing is asked for."""


def with_policy(config: Config, word: str) -> Config:
    """The same cluster under the policy that `word` names. Raises ConfigError."""
    policy, colon, threshold = word.partition(":")
    if policy not in get_args(Policy):
        raise ConfigError(f"{word!r} is no policy: expected {', '.join(get_args(Policy))}, or threshold:TOKENS")
    rules = msgspec.structs.replace(config.disaggregation, policy=policy)
    if colon:
        if policy != "threshold" or not threshold.isdecimal():
            raise ConfigError(f"{word!r} is no policy: only threshold takes a number of tokens, such as threshold:512")
        rules = msgspec.structs.replace(rules, max_local_prefill_tokens=int(threshold))
    return msgspec.structs.replace(config, disaggregation=rules)


def with_routing(config: Config, order: DecodeOrder) -> Config:
    """The same cluster, whose router chooses decode nodes in that way."""
    return msgspec.structs.replace(config, routing=msgspec.structs.replace(config.routing, decode=order))


def name_of(config: Config) -> str:
    """The word for the policy of `config`, and for how it routes if that is not by cost."""
    rules = config.disaggregation
    policy = f"threshold:{rules.max_local_prefill_tokens}" if rules.policy == "threshold" else rules.policy
    return policy if config.routing.decode == "cost" else f"{policy}, {config.routing.decode}"
