"""What may be asked, and what the answer must be: prompts, options, and the oracle's continuation of each.

Made once, before the cluster runs, so that checking an answer costs nothing. Cases whose answer hangs on a tie are left out: for the
rest there is one right answer, token for token.
"""

import random
from collections.abc import Iterator
from typing import Any

import msgspec

from disaggd.engine.engine import generate
from disaggd.sampling import SamplingParams
from tests.support.completions import TIE
from tests.support.oracle import Oracle, prompt_of

PROMPT_TOKENS = (3, 40, 64, 100, 129, 200, 300, 450, 640, 900, 1400)
NEW_TOKENS = (1, 8, 24, 60, 150)
FAMILIES = 6
"""Prompts of one family begin alike, as far as the shorter goes."""

_STYLES: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "ignore_eos": True},
    {"temperature": 0.8, "top_p": 0.95, "top_k": 50},
    {"temperature": 1.1, "min_p": 0.02, "presence_penalty": 0.6, "frequency_penalty": 0.3},
    {"temperature": 0.7, "repetition_penalty": 1.2, "ignore_eos": True},
)


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One question and its only answer."""

    prompt: list[int]
    options: dict[str, Any]
    """Of the request's body, sampling only."""
    labels: list[str]
    """The tokens, as `logprobs.tokens` spells them."""
    logprobs: list[float]
    text: str
    finish_reason: str


def build(count: int, oracle: Oracle, seed: int = 0) -> list[Case]:
    """`count` cases; another seed gives others."""
    found: list[Case] = []
    drafts = _drafts(random.Random(f"catalogue {seed}"), oracle)
    while len(found) < count:
        if (case := _answered(*next(drafts), oracle)) is not None:
            found.append(case)
    return found


def _drafts(dice: random.Random, oracle: Oracle) -> Iterator[tuple[list[int], dict[str, Any]]]:
    number = 0
    while True:
        prompt = prompt_of(PROMPT_TOKENS[number % len(PROMPT_TOKENS)], oracle, salt=dice.randrange(FAMILIES))
        options = {**dice.choice(_STYLES), "max_tokens": dice.choice(NEW_TOKENS)}
        yield prompt, options if options["temperature"] == 0 else {**options, "seed": dice.randrange(2**63)}
        number += 1


def _answered(prompt: list[int], options: dict[str, Any], oracle: Oracle) -> Case | None:
    """None where two tokens were as good as tied."""
    sampling = SamplingParams(**options, top_logprobs=2)
    outputs = list(generate(oracle.engine, prompt, sampling))
    tokens = [token for output in outputs for token in output.tokens]
    logprobs = [one for output in outputs for one in output.logprobs or ()]
    if sampling.temperature == 0 and any(one.top[0][1] - one.top[1][1] <= TIE for one in logprobs):
        return None
    finish = outputs[-1].finish_reason
    assert finish is not None
    detokenizer = oracle.tokenizer.detokenizer(prompt)
    spoken = tokens[:-1] if finish == "stop" else tokens
    return Case(
        prompt=prompt,
        options=options,
        labels=oracle.labels(tokens),
        logprobs=[one.logprob for one in logprobs],
        text=detokenizer.feed(spoken) + detokenizer.flush(),
        finish_reason=finish,
    )
