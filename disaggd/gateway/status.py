"""The endpoints that look and do not touch: models, receipts, the cluster, health, metrics."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from disaggd.errors import ModelNotFound, NotFound, Unavailable
from disaggd.gateway.backend import Backend
from disaggd.observe.metrics import Metrics


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
        receipt = self._backend.receipt(request_id)
        if receipt is None:
            raise NotFound(f"no receipt of a request {request_id!r}: unknown, or long ago", param="id")
        return _json(receipt)

    async def cluster(self, request: Request) -> Response:
        """Nodes, roles, load and links."""
        return _json(self._backend.cluster())

    async def health(self, request: Request) -> Response:
        """The process is alive."""
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """A request sent now could be served; else 503."""
        if not self._backend.ready():
            raise Unavailable("no decode node is ready yet")
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


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
