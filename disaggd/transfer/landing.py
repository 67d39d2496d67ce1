"""`LandingSet`: which pieces of one grant have come in. Runs on the transfer thread; pure, knows no NIXL."""

from disaggd.transfer.notification import FirstToken, Piece


class Inconsistent(Exception):
    """The pieces contradict each other or the grant: nothing can be said about the blocks."""


class LandingSet:
    """A grant has landed when {0 … total−1} is in from every rank and the bytes sum to the grant's: exactly, or it fails.

    So it does without a first token, if it `brings_token`.
    """

    def __init__(self, kv_bytes: int, num_ranks: int = 1, brings_token: bool = True) -> None:
        self.kv_bytes = kv_bytes
        self.first: FirstToken | None = None
        self._brings_token = brings_token
        self._seqs: list[set[int]] = [set() for _ in range(num_ranks)]
        self._totals: list[int | None] = [None] * num_ranks
        self._landed_bytes = 0

    @property
    def has_begun(self) -> bool:
        """Whether any piece is in: the transfer is under way."""
        return any(self._seqs)

    def add(self, piece: Piece) -> bool:
        """Count `piece`; True when it was the last one missing. Raises `Inconsistent`."""
        if not 0 <= piece.rank < len(self._seqs):
            raise Inconsistent(f"a piece of rank {piece.rank}, but {len(self._seqs)} rank(s) push")
        self._count(piece)
        self._set_total(piece)
        self._set_first(piece)
        return self._is_complete()

    def _count(self, piece: Piece) -> None:
        seqs = self._seqs[piece.rank]
        if piece.seq < 0 or piece.seq in seqs:
            raise Inconsistent(f"piece {piece.seq} of rank {piece.rank} came twice or is none")
        seqs.add(piece.seq)
        self._landed_bytes += piece.kv_bytes
        if piece.kv_bytes < 0 or self._landed_bytes > self.kv_bytes:
            raise Inconsistent(f"{self._landed_bytes} bytes have landed, the grant holds {self.kv_bytes}")

    def _set_total(self, piece: Piece) -> None:
        total = self._totals[piece.rank]
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
        if any(total is None or len(seqs) < total for seqs, total in zip(self._seqs, self._totals, strict=True)):
            return False
        if self._landed_bytes != self.kv_bytes:
            raise Inconsistent(f"all pieces are in with {self._landed_bytes} bytes, the grant holds {self.kv_bytes}")
        if self.first is None and self._brings_token:
            raise Inconsistent("all pieces are in, but none brought the first token")
        return True
