"""Clients that are cut, or refused before they are heard: each is counted, a few are told of. Runs on the asyncio thread."""

import logging
from collections import Counter
from typing import Literal

from disaggd.observe.metrics import Metrics

log = logging.getLogger(__name__)

SlowClient = Literal["head", "body", "stalled", "unread"]
"""It did not send its request's head, or its body, in time; or it read nothing of what waited for it; or too little: a sequence
of it was ended."""
RefusedClient = Literal["too_many", "too_large", "malformed"]

_IN_WORDS: dict[SlowClient | RefusedClient, str] = {
    "head": "sent no request in time",
    "body": "did not send a body in time",
    "stalled": "does not read",
    "unread": "leaves too much unread",
    "too_many": "is one too many",
    "too_large": "asks in too many bytes",
    "malformed": "does not speak HTTP",
}
_LOG_EVERY_S = 10.0


class Cuts:
    """Connections that were cut or refused: each counted, and told in one line per reason and ten seconds.

    `client` is what it is told by: an address, or the name of its request.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._untold: Counter[str] = Counter()
        self._told_s: dict[str, float] = {}

    def slow(self, why: SlowClient, client: str, now_s: float) -> None:
        self._metrics.count_slow_client(why)
        self._tell(why, client, now_s)

    def refused(self, why: RefusedClient, client: str, now_s: float) -> None:
        self._metrics.count_refused_connection(why)
        self._tell(why, client, now_s)

    def _tell(self, why: SlowClient | RefusedClient, client: str, now_s: float) -> None:
        self._untold[why] += 1
        if now_s - self._told_s.get(why, -_LOG_EVERY_S) >= _LOG_EVERY_S:
            log.warning("cut a client that %s: %s (%d since this was last said)", _IN_WORDS[why], client, self._untold.pop(why))
            self._told_s[why] = now_s
