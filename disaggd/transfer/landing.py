"""`LandingSet`: which pieces of one grant have come in. Runs on the transfer thread; pure, knows no NIXL."""

from collections.abc import Mapping

from disaggd.transfer.notification import FirstToken, Piece


class Inconsistent(Exception):
    """The pieces contradict each other or the grant: nothing can be said about the blocks."""


class LandingSet:
    """A grant has landed when {0 … total−1} is in from every rank and its bytes are what it was to bring: exactly, or it fails.

    So it does without a first token, if it `brings_token`. `shares` are the bytes of each rank that brings any.
    """

    def __init__(self, shares: Mapping[int, int], brings_token: bool = True) -> None:
        self.first: FirstToken | None = None
        self._shares = shares
        self._brings_token = brings_token
        self._seqs: dict[int, set[int]] = {rank: set() for rank in shares}
        self._totals: dict[int, int] = {}
        self._landed_bytes = dict.fromkeys(shares, 0)

    @property
    def kv_bytes(self) -> int:
        """Of the whole grant."""
        return sum(self._shares.values())

    @property
    def has_begun(self) -> bool:
        """Whether any piece is in: the transfer is under way."""
        return any(self._seqs.values())

    def add(self, piece: Piece) -> bool:
        """Count `piece`; True when it was the last one missing. Raises `Inconsistent`."""
        if piece.rank not in self._shares:
            raise Inconsistent(f"a piece of rank {piece.rank}, but {', '.join(map(str, self._shares))} push")
        self._count(piece)
        self._set_total(piece)
        self._set_first(piece)
        return self._is_complete()

    def _count(self, piece: Piece) -> None:
        seqs = self._seqs[piece.rank]
        if piece.seq < 0 or piece.seq in seqs:
            raise Inconsistent(f"piece {piece.seq} of rank {piece.rank} came twice or is none")
        seqs.add(piece.seq)
        self._landed_bytes[piece.rank] += piece.kv_bytes
        if piece.kv_bytes < 0 or self._landed_bytes[piece.rank] > self._shares[piece.rank]:
            landed, part = self._landed_bytes[piece.rank], self._shares[piece.rank]
            raise Inconsistent(f"{landed} bytes have landed from rank {piece.rank}, its part of the grant is {part}")

    def _set_total(self, piece: Piece) -> None:
        total = self._totals.get(piece.rank)
        if piece.total is not None:
            if total is not None and total != piece.total:
                raise Inconsistent(f"rank {piece.rank} names two totals, {total} and {piece.total}")
            total = self._totals[piece.rank] = piece.total
        if total is not None and max(self._seqs[piece.rank]) >= total:
            raise Inconsistent(f"piece {max(self._seqs[piece.rank])} of rank {piece.rank}, which has {total} pieces")

    def _set_first(self, piece: Piece) -> None:
        if piece.first is None:
            return
        if self.first is not None and self.first != piece.first:
            raise Inconsistent(f"two first tokens, {self.first.token} and {piece.first.token}")
        self.first = piece.first

    def _is_complete(self) -> bool:
        if any(rank not in self._totals or len(seqs) < self._totals[rank] for rank, seqs in self._seqs.items()):
            return False
        for rank, landed in self._landed_bytes.items():
            if landed != self._shares[rank]:
                raise Inconsistent(f"all pieces of rank {rank} are in with {landed} bytes, its part of the grant is {self._shares[rank]}")
        if self.first is None and self._brings_token:
            raise Inconsistent("all pieces are in, but none brought the first token")
        return True
