"""Jobs that wait for a prefill node, first come first served. Runs on the router's loop; knows no node and no link."""

from collections.abc import Iterator

from disaggd.ids import SeqId


class PrefillQueue:
    """Sequence ids in order of arrival; a job that lost its prefill node returns to the front.

    The bound is the decision's: a decode node that sees `max_prefill_queue` jobs waiting prefills by itself, so the
    queue never holds more than that many plus one round trip's worth of decisions.
    """

    def __init__(self) -> None:
        self._jobs: dict[SeqId, None] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[SeqId]:
        """In order; safe against changes while iterating."""
        return iter(tuple(self._jobs))

    def __contains__(self, seq: SeqId) -> bool:
        return seq in self._jobs

    def push(self, seq: SeqId) -> None:
        """Join at the end."""
        assert seq not in self._jobs
        self._jobs[seq] = None

    def push_front(self, seq: SeqId) -> None:
        """Return to the head: no room was found, or the prefill node was lost."""
        assert seq not in self._jobs
        self._jobs = {seq: None, **self._jobs}

    def discard(self, seq: SeqId) -> None:
        """Leave: dispatched, aborted, or prefilled locally after all."""
        self._jobs.pop(seq, None)
