"""The endpoints that look and change nothing: models, receipts, the cluster, health, metrics."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from disaggd.errors import InvalidRequest, ModelNotFound, NotFound, Unavailable
from disaggd.gateway.backend import Backend
from disaggd.observe.metrics import Metrics
from disaggd.observe.receipts import ReceiptList

DEFAULT_RECEIPTS = 20
MAX_RECEIPTS = 1000
MAX_TRACE_S = 86_400


class StatusEndpoints:
    """Answers at once, from what the router knows."""

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._backend = backend
        self._metrics = metrics

    async def models(self, request: Request) -> Response:
        """OpenAI's list, of the one model served."""
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """One model; 404 for any but ours."""
        name = request.path_params["name"]
        if name != self._backend.model_name:
            raise ModelNotFound(name, self._backend.model_name)
        return _json(self._model())

    async def receipt(self, request: Request) -> Response:
        """What happened to a request; 404 when it is unknown or forgotten."""
        request_id = request.path_params["id"]
        receipt = self._backend.receipt(request_id, request.state.client.sees)
        if receipt is None:
            raise NotFound(f"no receipt of a request {request_id!r}: unknown, or long ago", param="id")
        return _json(receipt)

    async def receipts(self, request: Request) -> Response:
        """Of the last requests, newest first: `?limit=`, 20 if it is not said."""
        limit = _number(request, "limit", MAX_RECEIPTS) or DEFAULT_RECEIPTS
        return _json(ReceiptList(data=tuple(self._backend.receipts(limit, request.state.client.sees))))

    async def trace(self, request: Request) -> Response:
        """The flight recorder's last `?seconds=`, or all it has, in Chrome's trace event format."""
        seconds = _number(request, "seconds", MAX_TRACE_S)
        headers = {"content-disposition": 'attachment; filename="disaggd-trace.json"'}
        return StreamingResponse(_leisurely(self._backend.trace(seconds)), media_type="application/json", headers=headers)

    async def cluster(self, request: Request) -> Response:
        """Nodes, roles, load and links."""
        return _json(self._backend.cluster())

    async def check(self, request: Request) -> Response:
        """Every way of KV, checked now."""
        return _json(await self._backend.check())

    async def blocks(self, request: Request) -> Response:
        """Each granted, held and quarantined block, and why; asked of the nodes now."""
        return _json(await self._backend.blocks())

    async def health(self, request: Request) -> Response:
        """The process is alive."""
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """A request sent now could be served; else 503."""
        if (why := self._backend.why_not_ready()) is not None:
            raise Unavailable(why)
        return _json({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        """Prometheus' exposition."""
        return Response(self._metrics.render(), headers={"content-type": self._metrics.content_type})

    def _model(self) -> dict[str, object]:
        return {
            "id": self._backend.model_name,
            "object": "model",
            "created": 0,
            "owned_by": "disaggd",
            "max_model_len": self._backend.max_model_len,
        }


async def _leisurely(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Between two pieces everybody else has a turn, though the socket may take all of them at once."""
    for piece in pieces:
        yield piece
        await asyncio.sleep(0)


def _number(request: Request, name: str, most: int) -> int | None:
    """A query parameter, if it is given. Raises InvalidRequest for anything but a whole number from 1 to `most`."""
    given = request.query_params.get(name)
    if given is None:
        return None
    if not re.fullmatch(r"[0-9]{1,6}", given, re.ASCII) or not 1 <= int(given) <= most:
        raise InvalidRequest(f"{name}: must be a whole number from 1 to {most}, not {given!r:.40}", param=name)
    return int(given)


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
