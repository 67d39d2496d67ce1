"""Exactly once: a grant lands when every piece is in and the bytes add up, in whatever order; or it fails."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggd.ids import GrantToken
from disaggd.transfer.landing import Inconsistent, LandingSet
from disaggd.transfer.notification import FirstToken, Piece

TOKEN = GrantToken(bytes(16))
FIRST = FirstToken(7)


def piece(seq: int, kv_bytes: int = 0, total: int | None = None, first: FirstToken | None = None, rank: int = 0) -> Piece:
    return Piece(TOKEN, rank, seq, kv_bytes, total, first)


def whole(num_ranks: int, kv_bytes: int = 100) -> list[Piece]:
    """Three pieces of each rank, two with bytes."""
    return [
        part
        for rank in range(num_ranks)
        for part in (
            piece(0, kv_bytes, rank=rank),
            piece(1, kv_bytes, rank=rank),
            piece(2, total=3, first=FIRST if rank == 0 else None, rank=rank),
        )
    ]


@given(st.permutations(whole(2)))
def test_lands_with_the_last_missing_piece_in_any_order(pieces: list[Piece]) -> None:
    landing = LandingSet({0: 200, 1: 200})
    assert [landing.add(part) for part in pieces] == [False] * 5 + [True]
    assert landing.first == FIRST


@given(st.permutations(whole(1)), st.integers(0, 2), st.integers(1, 3))
def test_duplicate_piece_fails(pieces: list[Piece], which: int, where: int) -> None:
    landing = LandingSet({0: 1000})
    twice = [*pieces[:which], pieces[which], *pieces[which:]]
    with pytest.raises(Inconsistent):
        for part in twice:
            landing.add(part)


@pytest.mark.parametrize(
    ("pieces", "what"),
    [
        ([piece(0, 99), piece(1, total=2, first=FIRST)], "all pieces of rank 0 are in with 99"),
        ([piece(0, 101)], "101 bytes have landed"),
        ([piece(0, 100), piece(0, total=2, first=FIRST)], "twice"),
        ([piece(-1, 100)], "or is none"),
        ([piece(0, -1)], "-1 bytes"),
        ([piece(1, total=2), piece(0, 100, total=3)], "two totals"),
        ([piece(2, 50), piece(1, total=2)], "piece 2 of rank 0, which has 2"),
        ([piece(1, total=2), piece(2, 50)], "piece 2 of rank 0, which has 2"),
        ([piece(0, 100, rank=1)], "rank 1, but 0 push"),
        ([piece(0, 100), piece(1, total=2)], "none brought the first token"),
        ([piece(0, first=FIRST), piece(1, first=FirstToken(8))], "two first tokens"),
    ],
)
def test_contradiction_fails_and_says_why(pieces: list[Piece], what: str) -> None:
    landing = LandingSet({0: 100})
    with pytest.raises(Inconsistent, match=what):
        for part in pieces:
            assert not landing.add(part)


def test_has_begun_with_the_first_piece() -> None:
    landing = LandingSet({0: 100})
    assert not landing.has_begun
    landing.add(piece(1, 40))
    assert landing.has_begun


def test_grant_without_bytes_lands_on_the_first_token_alone() -> None:
    assert LandingSet({0: 0}).add(piece(0, total=1, first=FIRST))
