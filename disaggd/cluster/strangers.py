"""Connections to an engine node's port that have not said hello: never many. Runs on the asyncio thread.

Whoever reaches the port can connect to it. How many may, before they have proved to be routers, is bounded here; for how long, by
`hello_timeout_s` and its kin; with how many bytes, by `link.py`.

Under TLS the library hears of a connection only after the handshake, so that is counted by its own: from its first step to its end.
"""

import asyncio
import logging
import ssl
from functools import partial
from typing import Any, cast

from websockets.asyncio.server import ServerConnection

log = logging.getLogger(__name__)


class Strangers:
    """Those that are connected now, at most `limit`: one more is cut at once."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._here: set[ServerConnection | ssl.SSLObject] = set()
        self._is_full = False
        """As was said last."""

    def __len__(self) -> int:
        return len(self._here)

    @property
    def connection_type(self) -> type[ServerConnection]:
        """What the library is to make of each connection: its setting `create_connection`."""
        return cast(type[ServerConnection], partial(_Stranger, self))

    def count_handshakes(self, context: ssl.SSLContext, timeout_s: float) -> None:
        """Those with `context`, which end within `timeout_s`, are strangers too. Nobody else accepts with it."""
        context.sslobject_class = type("Handshake", (_Handshake,), {"strangers": self, "timeout_s": timeout_s})

    def came(self, stranger: ServerConnection | ssl.SSLObject) -> bool:
        """Whether it may stay."""
        if len(self._here) >= self._limit:
            if not self._is_full:
                log.warning("%d connections have not said hello: cutting every further one", len(self._here))
            self._is_full = True
            return False
        self._here.add(stranger)
        return True

    def gone(self, stranger: ServerConnection | ssl.SSLObject) -> None:
        """It has left; or has said hello, and is none any more."""
        self._here.discard(stranger)
        self._is_full = self._is_full and bool(self._here)


class _Stranger(ServerConnection):
    def __init__(self, strangers: Strangers, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._strangers = strangers

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if not self._strangers.came(self):
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._strangers.gone(self)
        super().connection_lost(exc)


class _Handshake(ssl.SSLObject):
    """The TLS of one connection. Of one that is cut in its handshake nobody tells this object: it counts to the end of its time."""

    strangers: Strangers
    timeout_s: float
    _end_of_time: asyncio.TimerHandle | None = None

    def do_handshake(self) -> None:
        """Its first step, and each further one that bytes allow. Raises SSLError, which cuts the connection if it is one too many."""
        if self._end_of_time is None:
            if not self.strangers.came(self):
                raise ssl.SSLError("too many connections have not said hello")
            self._end_of_time = asyncio.get_running_loop().call_later(self.timeout_s, self.strangers.gone, self)
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError:
            self._is_over(self._end_of_time)
            raise
        self._is_over(self._end_of_time)

    def _is_over(self, end_of_time: asyncio.TimerHandle) -> None:
        end_of_time.cancel()
        self.strangers.gone(self)
