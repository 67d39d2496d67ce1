"""Clients that are cut, or refused before they are heard: each is counted, a few are told of. Runs on the asyncio thread."""

import logging
from collections import OrderedDict
from dataclasses import dataclass
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
_MAX_REMEMBERED = 1000
"""Reasons and clients; then the one that was told longest ago is told anew."""


@dataclass(slots=True)
class _Told:
    """A reason and a client."""

    at_s: float
    num_since: int = 0


class Cuts:
    """Connections that were cut or refused: each counted, and told in one line per reason, client and ten seconds.

    `client` is what it is told by: an address, or the name of its request.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._told: OrderedDict[tuple[str, str], _Told] = OrderedDict()

    def slow(self, why: SlowClient, client: str, now_s: float, request_id: str | None = None) -> None:
        self._metrics.count_slow_client(why)
        self._tell(why, client, now_s, "" if request_id is None else f" (request {request_id})")

    def refused(self, why: RefusedClient, client: str, now_s: float) -> None:
        self._metrics.count_refused_connection(why)
        self._tell(why, client, now_s)

    def _tell(self, why: SlowClient | RefusedClient, client: str, now_s: float, asked: str = "") -> None:
        told = self._told.get((why, client))
        if told is not None and now_s - told.at_s < _LOG_EVERY_S:
            told.num_since += 1
            return
        unsaid = f"; {told.num_since} more since this was last said" if told is not None and told.num_since else ""
        log.warning("cut a client that %s: %s%s%s", _IN_WORDS[why], client, asked, unsaid)
        self._told[why, client] = _Told(now_s)
        self._told.move_to_end((why, client))
        if len(self._told) > _MAX_REMEMBERED:
            self._told.popitem(last=False)
