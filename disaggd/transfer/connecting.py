"""`Connections`: the agents that are being connected to their peers, each on a thread of its own (`Connecting`).

NIXL waits inside the call until TCP has an answer: 10 to 35 ms, and where a firewall drops what is sent for `transfer.user_timeout_s`, in
which the transfer thread could move nobody's bytes. Agents share nothing, and this one is nobody else's until the thread has ended. All
else here runs on the transfer thread.
"""

import logging
import threading
import time
import traceback

from disaggd.ids import NodeName
from disaggd.pulse import Pulse
from disaggd.transfer.agent import PeerLost
from disaggd.transfer.outlet import Outlet

log = logging.getLogger(__name__)

PATIENCE_S = 0.05
"""More than it takes where there is an answer: then all is done when the transfer thread goes on."""
CLOSE_TIMEOUT_S = 6.0
"""A second more than TCP gives a silent host by default."""


class Connecting:
    """Begins at once. `pair` and its agent may be touched again once `is_over`."""

    def __init__(self, pair: Outlet) -> None:
        self.pair = pair
        self.is_wanted = True
        self._why_not: str | None = None
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._connect, name=f"connecting to {pair.peer}", daemon=True)
        self._thread.start()
        self._thread.join(PATIENCE_S)

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, timeout_s: float | None = None) -> None:
        """Until it is over, or the time is."""
        self._thread.join(timeout_s)

    def why_not(self) -> str | None:
        """Once it is over: why the peer is out of reach; None if it is not. Raises what else the thread has failed of."""
        assert self.is_over
        if self._failure is not None:
            raise self._failure
        return self._why_not

    def destroy(self) -> None:
        """The pair's agent, once it is over."""
        assert self.is_over
        self.pair.agent.destroy()
        self.pair.agent.port.release()

    def _connect(self) -> None:
        try:
            self.pair.connect()
        except PeerLost as error:
            self._why_not = str(error)  # the error itself holds on to the agent
        except Exception as error:  # noqa: BLE001  carried to the transfer thread
            # Tracebacks, its own and those of what it came of, hold on to the agent, which could then not be destroyed; log records
            # hold on to tracebacks.
            log.error("connecting to %s has failed:\n%s", self.pair.peer, traceback.format_exc())
            error.__cause__ = error.__context__ = None
            self._failure = error.with_traceback(None)


class Connections:
    """`pulse` rests while nothing is being connected, and beats when the one that began first is over: a call that hangs is found out by
    whoever looks at it."""

    def __init__(self) -> None:
        self.pulse = Pulse()
        self._under_way: list[Connecting] = []
        """In the order in which they began."""
        self._oldest: Connecting | None = None

    def __len__(self) -> int:
        return len(self._under_way)

    def begin(self, pair: Outlet) -> None:
        self._under_way.append(Connecting(pair))

    def to(self, peer: NodeName) -> Outlet | None:
        """Who is being connected to it; to be looked at only."""
        return next((connecting.pair for connecting in self._under_way if connecting.is_wanted and connecting.pair.peer == peer), None)

    def abandon(self, peer: NodeName) -> None:
        """Nobody wants that any more: its agent is destroyed as soon as it can be."""
        for connecting in self._under_way:
            if connecting.pair.peer == peer:
                connecting.is_wanted = False

    def take(self) -> list[Connecting]:
        """Those that are over and wanted: the caller's from now on."""
        taken = self._remove_over(wanted=True)
        self._give_sign_of_life()
        return taken

    def destroy_abandoned(self) -> None:
        """As far as they are over. Raises what their threads have failed of, but for lost peers."""
        over = self._remove_over(wanted=False)
        self._give_sign_of_life()
        for connecting in over:
            connecting.destroy()
        for connecting in over:
            connecting.why_not()

    def close(self) -> None:
        """Abandons all. Those that are not over within CLOSE_TIMEOUT_S end with the process."""
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for connecting in self._under_way:
            connecting.is_wanted = False
            connecting.wait(max(0.0, deadline - time.monotonic()))
        for connecting in self._remove_over(wanted=False):
            connecting.destroy()  # what it has failed of is in the log
        if self._under_way:
            peers = ", ".join(sorted({connecting.pair.peer for connecting in self._under_way}))
            log.warning("still connecting to %s after %g s: that ends with the process", peers, CLOSE_TIMEOUT_S)

    def _remove_over(self, *, wanted: bool) -> list[Connecting]:
        over = [connecting for connecting in self._under_way if connecting.is_wanted == wanted and connecting.is_over]
        self._under_way = [connecting for connecting in self._under_way if connecting not in over]
        return over

    def _give_sign_of_life(self) -> None:
        oldest = self._under_way[0] if self._under_way else None
        if oldest is None:
            self.pulse.rest()
        elif oldest is not self._oldest:
            self.pulse.beat()
        self._oldest = oldest
