"""Jobs that wait for a prefill node, first come first served. Runs on the router's loop; knows no node and no link."""

from bisect import insort
from collections.abc import Iterator
from operator import itemgetter

from disaggd.ids import SeqId


class PrefillQueue:
    """Sequence ids in the order in which their requests arrived.

    So a job that found no room, or lost its prefill node, returns to the place it had. The bound is the decision's: a
    decode node that sees `max_prefill_queue` jobs waiting prefills by itself, so the queue never holds more than that
    many plus one round trip's worth of decisions.
    """

    def __init__(self) -> None:
        self._jobs: list[tuple[float, SeqId]] = []

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[SeqId]:
        """In order; safe against changes while iterating."""
        return iter([seq for _, seq in self._jobs])

    def __contains__(self, seq: SeqId) -> bool:
        return any(waiting == seq for _, waiting in self._jobs)

    def push(self, seq: SeqId, arrived: float) -> None:
        """Wait behind every request that arrived before, in seconds of any one clock."""
        assert seq not in self
        insort(self._jobs, (arrived, seq), key=itemgetter(0))

    def discard(self, seq: SeqId) -> None:
        """Leave: dispatched, aborted, or prefilled locally after all."""
        self._jobs = [job for job in self._jobs if job[1] != seq]
