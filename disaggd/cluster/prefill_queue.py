"""Jobs that wait for a prefill node: who is next, and who finds no room. Runs on the router's loop; knows no node and no link.

The next is whoever has the least slack: its due time, `arrival + TTFT target − predicted prefill`, is when its prefill
must start for its first token to be on time. That order alone would let later arrivals overtake a job for as long as
they come, if only it has a low priority. So a job ages: once it has waited for the aging bound since its arrival, it goes
before all that have not, and among those that have, the first to arrive is the first to go.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from disaggd.ids import SeqId

PRIORITY_STEP_S = 1.0
"""A step of priority is a second of slack: a request of priority −5 goes before one of priority 0 that is due up to five
seconds earlier. Seconds, and not classes that always go first: what is urgent enough still overtakes a slightly better priority."""

Drop = Literal["full", "gone", "failed"]
"""Why a prompt that should have been prefilled elsewhere is not prefilled at all: there was no room for it, its client went
away, or its request failed while it waited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One prompt to be prefilled. Times are seconds on any one clock."""

    seq: SeqId
    arrived: float
    num_tokens: int
    ttft_target_s: float
    prefill_s: float
    """Predicted, on the node that would be quickest."""
    priority: int = 0
    """As in vLLM: the smaller goes first."""

    @property
    def due(self) -> float:
        """When it must start at the latest."""
        return self.arrived + self.ttft_target_s - self.prefill_s + self.priority * PRIORITY_STEP_S


class PrefillQueue:
    """At most `max_jobs` jobs of `max_tokens` tokens together; one job of any size finds room in an empty queue.

    A job that was here before, and found no room at its decode node or lost a node, returns whatever the queue holds:
    its client was promised a place. So the bound is exceeded by at most the jobs that the prefill nodes have at a time.
    """

    def __init__(self, *, max_jobs: int, max_tokens: int, aging_s: float) -> None:
        self._max_jobs = max_jobs
        self._max_tokens = max_tokens
        self._aging_s = aging_s
        self._jobs: dict[SeqId, Job] = {}
        """In the order in which they came: the last word between equals."""
        self.num_tokens = 0
        self.num_left = 0
        """Jobs that were here and are no more, since the start."""
        self.drops: Counter[Drop] = Counter()

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, seq: SeqId) -> bool:
        return seq in self._jobs

    def has_room(self, num_tokens: int) -> bool:
        """Whether a new job of so many tokens may join."""
        if not self._jobs:
            return True
        return len(self._jobs) < self._max_jobs and self.num_tokens + num_tokens <= self._max_tokens

    def push(self, job: Job) -> None:
        """The job takes the place that it has by its arrival and its slack. Ask `has_room` first, unless it was here before."""
        assert job.seq not in self._jobs
        self._jobs[job.seq] = job
        self.num_tokens += job.num_tokens

    def take(self, seq: SeqId) -> Job | None:
        """The job leaves, if it is here: to a prefill node, to another decode node, or because it is prefilled locally after all."""
        if (job := self._jobs.pop(seq, None)) is not None:
            self.num_tokens -= job.num_tokens
            self.num_left += 1
        return job

    def give_up(self, seq: SeqId, why: Drop) -> None:
        """The job leaves, if it is here, and nobody will compute it."""
        if self.take(seq) is not None:
            self.drops[why] += 1

    def refuse(self) -> None:
        """A job found no room here, and will not be computed anywhere else."""
        self.drops["full"] += 1

    def in_order(self, now: float) -> Iterator[Job]:
        """Who goes first at `now`; safe against changes while iterating."""
        return iter(sorted(self._jobs.values(), key=lambda job: self._turn(job, now)))

    def work_ahead_s(self, job: Job, now: float) -> float:
        """Predicted prefill of all that would go before `job`, were it here."""
        turn = self._turn(job, now)
        return sum(other.prefill_s for other in self._jobs.values() if self._turn(other, now) <= turn)

    def jobs_ahead(self, job: Job, now: float) -> int:
        """How many would go before `job`, were it here."""
        turn = self._turn(job, now)
        return sum(self._turn(other, now) <= turn for other in self._jobs.values())

    def oldest_age_s(self, now: float) -> float:
        """How long ago the oldest waiting request arrived; 0 when nobody waits."""
        return max((now - job.arrived for job in self._jobs.values()), default=0.0)

    def _turn(self, job: Job, now: float) -> tuple[bool, float]:
        is_aged = now - job.arrived >= self._aging_s
        return not is_aged, job.arrived if is_aged else job.due
