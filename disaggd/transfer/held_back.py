"""`HeldBack`: what the other ranks are told of pushes no sooner than the first rank's device has computed what they write. Pure.

Only the first rank's device can be asked how far it has come. That it has computed a layer says the same of every other's: there the
layer's KV is written before the sum over all ranks is entered that ends the layer, and what the first one's is asked for comes after that
sum. A device does in order what it is asked for, so what is asked of the others' from then on finds the KV.
"""

from collections import deque
from collections.abc import Callable

import msgspec

from disaggd.ids import GrantToken
from disaggd.transfer.messages import FinishPush, PushBlocks, TransferCommand, at_once, never


class HeldBack:
    """`tell` takes a command to the other ranks; none of them takes code with it, so it can go to another process."""

    def __init__(self, tell: Callable[[TransferCommand], None]) -> None:
        self._tell = tell
        self._pushes: dict[GrantToken, deque[PushBlocks | FinishPush]] = {}

    @property
    def is_empty(self) -> bool:
        return not self._pushes

    def add(self, command: PushBlocks | FinishPush) -> None:
        """To be told as soon as may be, after what the same push was told before."""
        self._pushes.setdefault(command.token, deque()).append(command)
        self._let_go(command.token)

    def look(self) -> None:
        """Tell what is computed by now."""
        for token in list(self._pushes):
            self._let_go(token)

    def give_up(self, token: GrantToken) -> None:
        """The push is to be cancelled next: blocks that are never ready are written by nobody, and answered then, before its end is."""
        for command in self._pushes.pop(token, ()):
            if isinstance(command, PushBlocks):
                self._tell(msgspec.structs.replace(command, is_ready=never))

    def _let_go(self, token: GrantToken) -> None:
        waiting = self._pushes[token]
        while waiting:
            command = waiting[0]
            if isinstance(command, PushBlocks):
                if not command.is_ready():
                    return
                command = msgspec.structs.replace(command, is_ready=at_once)
            waiting.popleft()
            self._tell(command)
        del self._pushes[token]
