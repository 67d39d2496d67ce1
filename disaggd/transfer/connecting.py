"""`Connecting`: an agent that is being connected to a peer, on a thread of its own.

NIXL waits inside the call until TCP has an answer: 10 to 35 ms, and where a firewall drops what is sent for `transfer.user_timeout_s`, in
which the transfer thread could move nobody's bytes. Agents share nothing, and this one is nobody else's until the thread has ended.
"""

import threading

from disaggd.transfer.agent import PeerLost
from disaggd.transfer.outlet import Outlet

PATIENCE_S = 0.05
"""More than it takes where there is an answer: then all is done when the transfer thread goes on."""


class Connecting:
    """Begins at once. `pair` and its agent may be touched again once `is_over`."""

    def __init__(self, pair: Outlet) -> None:
        self.pair = pair
        self._why_not: str | None = None
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._connect, name=f"connecting to {pair.peer}", daemon=True)
        self._thread.start()
        self._thread.join(PATIENCE_S)

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Until it is over."""
        self._thread.join()

    def why_not(self) -> str | None:
        """Once it is over: why the peer is out of reach; None if it is not. Raises what else the thread has failed of."""
        assert self.is_over
        if self._failure is not None:
            raise self._failure
        return self._why_not

    def _connect(self) -> None:
        try:
            self.pair.connect()
        except PeerLost as error:
            self._why_not = str(error)  # the error itself holds on to the agent
        except Exception as error:  # noqa: BLE001  carried to the transfer thread
            self._failure = error
