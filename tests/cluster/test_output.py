"""What a node says that it has sampled is output only if a reply can be made of it."""

import pytest

from disaggd.cluster.output import nonsense_in
from disaggd.sampling import TokenLogprob
from tests.support.routing import P0, Routing

GOOD = TokenLogprob(-0.5, ((7, -0.5),))


@pytest.mark.parametrize(
    ("tokens", "logprobs", "why"),
    [
        ((1, 2, 3, 4), None, "4 tokens where at most 3"),
        ((1, 100), None, "token 100 of a vocabulary of 100"),
        ((1, 2), (GOOD,), "1 logprobs of 2 tokens"),
        ((1,), (TokenLogprob(-0.5, ((100, -0.5),)),), "beyond the vocabulary"),
        ((1,), (TokenLogprob(-0.5, ((-1, -0.5),)),), "beyond the vocabulary"),
    ],
)
def test_what_cannot_be_output_is_told(tokens: tuple[int, ...], logprobs: tuple[TokenLogprob, ...] | None, why: str) -> None:
    assert why in (nonsense_in(tokens, logprobs, most=3, vocab_size=100) or "")


def test_anything_else_can_be_output() -> None:
    assert nonsense_in((0, 7, 99), (GOOD, GOOD, GOOD), most=3, vocab_size=100) is None
    assert nonsense_in((), None, most=0, vocab_size=100) is None


def test_a_token_beyond_the_vocabulary_ends_its_request_with_an_error_and_reaches_no_client() -> None:
    """It once reached the gateway, whose table ends there: a 500 in the middle of a stream."""
    routing = Routing(vocab_size=100)
    client = routing.decoding()
    routing.tokens(client, 0, 7)
    routing.tokens(client, 1, 100)
    assert client.tokens == [7] and client.error is not None and client.error.status == 502
    assert not routing.dispatcher.sequences


def test_a_prefill_node_is_believed_no_more_than_a_decode_node() -> None:
    routing = Routing(vocab_size=100)
    client = routing.prefilling()
    routing.first_token(client, 100)
    assert client.tokens == [] and client.error is not None
    routing.job_ended(client)
    assert routing.credit_used(P0) == 0
