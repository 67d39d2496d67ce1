"""Which jobs hold a prefill node's credit, and whose reports are still to come. Runs on the router's loop.

A job holds credit from the moment a prefill node is chosen for it until that node reports `JobEnded`, its link is lost,
or the job turns out not to go there. A sequence may be over, or on its next attempt, long before that report.
"""

from disaggd.cluster.peers import JobInHand, JobStage, PrefillPeer
from disaggd.cluster.request import Phase, RoutedSequence
from disaggd.ids import NodeName, SeqId

Job = tuple[SeqId, int]
"""A sequence and the attempt at it."""


class Credits:
    """The jobs of every prefill node. Shares the dispatcher's peer table."""

    def __init__(self, prefills: dict[NodeName, PrefillPeer]) -> None:
        self._prefills = prefills
        self._owed: dict[Job, RoutedSequence] = {}
        """Attempts that are over for the router, and not yet for their prefill node."""

    def take(self, record: RoutedSequence, prefill: PrefillPeer, prefill_s: float, stage: JobStage, now: float) -> None:
        """The job is, will be or may be with `prefill`, which is predicted to compute for `prefill_s`."""
        assert record.decode is not None
        if stage is JobStage.SENT and all(job.stage is not JobStage.SENT for job in prefill.jobs.values()):
            prefill.busy_since = now
        prefill.jobs[record.job] = JobInHand(record.num_tokens, prefill_s, record.decode, stage)
        record.prefill = prefill.name

    def prefilled(self, prefill: PrefillPeer, job: Job, now: float) -> None:
        """It has computed the job's prompt, and turns to the next."""
        in_hand = prefill.jobs.get(job)
        if in_hand is not None and in_hand.stage is not JobStage.PREFILLED:
            in_hand.stage = JobStage.PREFILLED
            prefill.busy_since = now

    def give_back(self, record: RoutedSequence) -> None:
        """The prefill node has not seen the job, and will not."""
        if (prefill := self.holder(record)) is not None:
            del prefill.jobs[record.job]
        record.prefill = None

    def holder(self, record: RoutedSequence) -> PrefillPeer | None:
        """The prefill node that has, or is to have, this attempt."""
        prefill = self._prefills.get(record.prefill) if record.prefill is not None else None
        return prefill if prefill is not None and record.job in prefill.jobs else None

    def leave(self, record: RoutedSequence) -> None:
        """The attempt is over for the router: keep it in mind if its prefill node still has to report."""
        if self.holder(record) is not None:
            self._owed[record.job] = record

    def is_owed_report(self, record: RoutedSequence) -> bool:
        """Whether any attempt at it that is over has yet to be reported."""
        return any(owed is record for owed in self._owed.values())

    def owed(self, job: Job) -> RoutedSequence | None:
        """The record of an attempt that is over, while its prefill node has not reported."""
        return self._owed.get(job)

    def reported(self, prefill: PrefillPeer, job: Job, now: float) -> RoutedSequence | None:
        """The job has ended there. Returns its record if the attempt was over already."""
        self.prefilled(prefill, job, now)  # or it will not be
        prefill.jobs.pop(job, None)
        return self._owed.pop(job, None)

    def prefill_down(self, prefill: PrefillPeer) -> list[RoutedSequence]:
        """Nobody will report its jobs any more. Returns the sequences that are done and waited for it."""
        owed = {record.seq: record for job in prefill.jobs if (record := self._owed.pop(job, None)) is not None}
        return [record for record in owed.values() if record.phase is Phase.DONE]
