"""Whether what a node says it has sampled can be output at all. Pure; a node of ours never says anything else.

An id beyond the vocabulary would be found out by the client's reply, in the middle of it; and by every node that continues the sequence.
"""

from collections.abc import Sequence

from disaggd.sampling import TokenLogprob


def nonsense_in(tokens: Sequence[int], logprobs: Sequence[TokenLogprob] | None, *, most: int, vocab_size: int) -> str | None:
    """What is wrong with new tokens of a sequence that may have `most` more; None if nothing is."""
    if len(tokens) > most:
        return f"{len(tokens)} tokens where at most {most} were wanted"
    if tokens and max(tokens) >= vocab_size:
        return f"token {max(tokens)} of a vocabulary of {vocab_size}"
    if logprobs is None:
        return None
    if len(logprobs) != len(tokens):
        return f"{len(logprobs)} logprobs of {len(tokens)} tokens"
    if any(not 0 <= token < vocab_size for one in logprobs for token, _ in one.top):
        return "logprobs of tokens beyond the vocabulary"
    return None
