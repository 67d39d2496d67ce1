"""A sequence as it comes in on a link, checked. A router of ours sends none that fails; whoever else has found the port may.

Runs on the compute thread, which an unchecked token id or count would end, and the node with it.
"""

from disaggd.cluster.protocol import Generate, Prefill, unpack_tokens
from disaggd.engine.sequence import Sequence
from disaggd.errors import InvalidRequest
from disaggd.sampling import MAX_TOP_LOGPROBS, SamplingParams

_MOST = 1e4
"""Of what the gateway bounds more narrowly; here only float32 must hold it, times the largest logit."""


def read_sequence(frame: Generate | Prefill, vocab_size: int, *, reserve: bool = False, output_limit: int | None = None) -> Sequence:
    """The sequence that `frame` asks for. Raises InvalidRequest saying what cannot be."""
    try:
        tokens = unpack_tokens(frame.tokens)
    except ValueError as error:
        raise InvalidRequest("tokens are not whole 32-bit words") from error
    if not 0 < frame.num_prompt_tokens <= len(tokens):
        raise InvalidRequest(f"{frame.num_prompt_tokens} of {len(tokens)} tokens cannot be the prompt")
    if max(tokens) >= vocab_size:
        raise InvalidRequest(f"token {max(tokens)} is beyond the vocabulary of {vocab_size}")
    _check_sampling(frame.sampling, len(tokens) - frame.num_prompt_tokens, vocab_size)
    return Sequence(
        frame.seq,
        tokens,
        frame.sampling,
        frame.num_prompt_tokens,
        attempt=frame.attempt,
        reserve=reserve,
        output_limit=output_limit,
        salt=frame.cache_salt,
    )


def _check_sampling(sampling: SamplingParams, num_outputs: int, vocab_size: int) -> None:
    if sampling.max_tokens <= num_outputs:
        raise InvalidRequest(f"{num_outputs} tokens are out already, of {sampling.max_tokens}")
    if any(not 0 <= token < vocab_size for token in sampling.logit_bias):
        raise InvalidRequest(f"logit_bias names a token beyond the vocabulary of {vocab_size}")
    if any(not abs(bias) <= _MOST for bias in sampling.logit_bias.values()):
        raise InvalidRequest("logit_bias is out of range")
    if not 0 <= (sampling.top_logprobs or 0) <= MAX_TOP_LOGPROBS:
        raise InvalidRequest(f"top_logprobs is {sampling.top_logprobs}, not 0 to {MAX_TOP_LOGPROBS}")
    for name, is_sound in (
        ("temperature", 0 <= sampling.temperature <= _MOST),
        ("top_k", 0 <= sampling.top_k < 2**31),
        ("top_p", 0 < sampling.top_p <= 1),
        ("min_p", 0 <= sampling.min_p <= 1),
        ("seed", 0 <= sampling.seed < 2**64),
        ("presence_penalty", abs(sampling.presence_penalty) <= _MOST),
        ("frequency_penalty", abs(sampling.frequency_penalty) <= _MOST),
        ("repetition_penalty", 0 < sampling.repetition_penalty <= _MOST),
    ):
        if not is_sound:  # so is what is not a number
            raise InvalidRequest(f"{name} is out of range")
