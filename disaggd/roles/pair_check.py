"""`PairCheck`: a node's part in the checks of its pairs: as target of some, as writer of others. Runs on the compute thread.

A role hands it every frame and event first. What is a check's is dealt with here, and the role goes on with the rest.
"""

from collections.abc import Iterable

from disaggd.cluster.check_frames import CheckPair, PushPattern
from disaggd.cluster.holdings import Holding
from disaggd.cluster.protocol import Cancel, Progress, Quiesced, ToNode
from disaggd.roles.compute import LinkId
from disaggd.roles.pattern_intake import PatternIntake
from disaggd.roles.pattern_pushes import PatternPushes
from disaggd.roles.pushing import Pushing
from disaggd.transfer import messages as transfer


class PairCheck:
    """Of one node."""

    def __init__(self, intake: PatternIntake, pushes: PatternPushes, pushing: Pushing) -> None:
        self._intake = intake
        self._pushes = pushes
        self._pushing = pushing

    def on_frame(self, link: LinkId, frame: ToNode) -> bool:
        """Whether the frame was a check's alone."""
        match frame:
            case CheckPair():
                self._intake.ask(link, frame)
            case PushPattern():
                self._pushes.push(link, frame)
            case Quiesced(token, _, clean) if self._intake.knows(token):
                self._intake.quiesced(token, clean)
            case Cancel(token) if self._pushes.knows(token):
                if self._pushing.cancel(frame, link):
                    self._pushing.stop(token)
            case Progress(tokens):
                self._intake.renew(tokens)
                return False
            case _:
                return False
        return True

    def on_event(self, event: transfer.TransferEvent) -> bool:
        """Whether the event was a check's alone."""
        match event:
            case transfer.Landed(token) if self._intake.knows(token):
                self._intake.landed(token)
            case transfer.LandingFailed(token, reason) if self._intake.knows(token):
                self._intake.failed(token, reason)
            case transfer.QuiescedByWire(token, clean, peer) if self._intake.knows(token):
                self._intake.quiesced_by_wire(token, clean, peer)
            case transfer.PushEnded(token) if self._pushes.knows(token):
                self._pushes.ended(event)
            case transfer.Fenced():
                self._intake.fenced(event)
                return False
            case _:
                return False
        return True

    def link_down(self, link: LinkId) -> None:
        """Nobody waits for this router's checks; what they granted resolves without it."""
        self._pushes.link_down(link)

    def tick(self) -> None:
        self._intake.tick()

    @property
    def is_arriving(self) -> bool:
        """Whether only `tick` learns of what is next."""
        return self._intake.is_arriving

    def next_deadline(self) -> float | None:
        return self._intake.next_deadline()

    def holdings(self) -> Iterable[Holding]:
        """What patterns have been granted; what they push is among the node's pushes."""
        return self._intake.holdings()

    @property
    def blocks_granted(self) -> int:
        return self._intake.blocks_granted

    @property
    def blocks_quarantined(self) -> int:
        return self._intake.blocks_quarantined

    @property
    def blocks_promised(self) -> int:
        return self._intake.blocks_promised
