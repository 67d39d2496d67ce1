"""A block's name is all of the tokens up to its end, and the terms under which their KV was made."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggd.prefix import DIGEST_BYTES, PrefixHasher

BLOCK = 4
HASHER = PrefixHasher("model", "float32", BLOCK)

some_tokens = st.lists(st.integers(0, 2**32 - 1), max_size=25)


def test_every_full_block_has_a_digest_and_the_tail_has_none() -> None:
    assert [len(HASHER.digests(list(range(count)))) for count in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
    assert {len(digest) for digest in HASHER.digests(list(range(8)))} == {DIGEST_BYTES}


def test_a_digest_stands_for_everything_before_it() -> None:
    one, other = HASHER.digests([1, 2, 3, 4, 5, 6, 7, 8]), HASHER.digests([9, 2, 3, 4, 5, 6, 7, 8])
    assert one[0] != other[0]
    assert one[1] != other[1]  # the same four tokens, after others
    assert one[:1] == HASHER.digests([1, 2, 3, 4, 5, 6, 7, 9])[:1]


@given(some_tokens, some_tokens, st.text(max_size=3))
def test_a_chain_goes_on_from_what_is_known(tokens: list[int], more: list[int], salt: str) -> None:
    whole = HASHER.digests(tokens + more, salt)
    assert HASHER.digests(tokens + more, salt, known=HASHER.digests(tokens, salt)) == whole


@pytest.mark.parametrize(
    ("terms", "salt"),
    [(("model2", "float32", BLOCK), ""), (("model", "bfloat16", BLOCK), ""), (("model", "float32", BLOCK), "s")],
)
def test_other_terms_or_another_salt_share_nothing(terms: tuple[str, str, int], salt: str) -> None:
    tokens = list(range(12))
    assert not set(PrefixHasher(*terms).digests(tokens, salt)) & set(HASHER.digests(tokens))


def test_terms_do_not_run_into_each_other() -> None:
    tokens = list(range(4))
    assert PrefixHasher("ab", "c", BLOCK).digests(tokens) != PrefixHasher("a", "bc", BLOCK).digests(tokens)
    assert PrefixHasher("a", "b", 4).digests(tokens, "c") != PrefixHasher("a", "b", 2).digests(tokens, "c")[:1]


def test_digests_do_not_change_between_releases() -> None:
    """Nodes of two releases may serve together; a known answer pins the order of bytes too."""
    assert HASHER.digests([1, 2, 3, 4])[0].hex() == "f3067b1e922e4e9ac1025802f62f806a4fa6161c944e451df43a2aaadf30bee6"


def test_a_hash_is_the_beginning_of_its_digest() -> None:
    (digest,) = HASHER.digests([1, 2, 3, 4])
    assert HASHER.hash(digest) == digest[:16]
    assert PrefixHasher("model", "float32", BLOCK, hash_bytes=1).hash(digest) == digest[:1]
