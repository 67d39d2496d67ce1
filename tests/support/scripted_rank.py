"""`ScriptedRank`: stands where a transfer thread stands, and notes what it is told."""

from dataclasses import dataclass, field

from disaggd.pulse import Pulse
from disaggd.transfer import messages as m
from disaggd.transfer.thread import TransferStats


@dataclass
class ScriptedRank:
    commands: list[m.TransferCommand] = field(default_factory=list)
    pulses: dict[str, Pulse] = field(default_factory=dict)

    def start(self) -> None: ...
    def stop(self) -> None: ...

    def submit(self, command: m.TransferCommand) -> None:
        self.commands.append(command)

    def stats(self) -> TransferStats:
        return TransferStats(1, 1, 1, 10, 20)
