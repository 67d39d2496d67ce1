"""What a request asks of the sampler: plain data, validated by the gateway, carried by the protocol, obeyed by the engine."""

from typing import Literal

import msgspec

MAX_TOP_LOGPROBS = 20

FinishReason = Literal["stop", "length", "abort", "error"]
"""Why a sequence ended: a stop token or string; its token limit; nobody waits for it; it could not be finished."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to draw the tokens of one sequence, and when to stop.

    `temperature` 0 is greedy: exact argmax, ties to the lowest id. `seed` is always set when the sequence reaches an
    engine: the router draws one for an unseeded request, so that any node continues it identically. Penalties follow
    OpenAI (presence, frequency: over output tokens) and Hugging Face (repetition: over prompt and output).
    """

    temperature: float = 1.0
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    """Drop tokens less likely than `min_p` times the likeliest."""
    seed: int = 0
    """64 unsigned bits."""
    max_tokens: int = 16
    stop_token_ids: tuple[int, ...] = ()
    """Besides the model's own end-of-sequence tokens; not part of the output text."""
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    top_logprobs: int | None = None
    """None: no logprobs. k: the chosen token's, and the k likeliest."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probability of the chosen token under the model's raw distribution, and of the likeliest tokens."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """`(token id, logprob)`, likeliest first."""
