"""The HTTP application: which path leads where, and how each answer is counted. uvicorn serves it on the asyncio thread."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route, request_response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from disaggd.errors import RequestError
from disaggd.gateway.access import Access, Guarded, Need
from disaggd.gateway.backend import Backend
from disaggd.gateway.connection import ClientGone
from disaggd.gateway.errors import apologize, refuse, refuse_path
from disaggd.gateway.limits import GatewayLimits
from disaggd.gateway.serving import TextEndpoints
from disaggd.gateway.status import StatusEndpoints
from disaggd.gateway.tokenizer import Tokenizer
from disaggd.observe.metrics import Metrics

_CLIENT_GONE = 499
"""nginx's status for a reply that nobody waited for; only the metrics see it."""


def create_app(
    backend: Backend,
    tokenizer: Tokenizer,
    metrics: Metrics,
    limits: GatewayLimits,
    access: Access | None = None,
    *,
    open_metrics: bool = False,
) -> Starlette:
    """The gateway of one router. Without `access` everybody may do everything."""
    access = access or Access(metrics, None)
    text = TextEndpoints(backend, tokenizer, metrics, limits, access)
    status = StatusEndpoints(backend, metrics)
    routes: list[tuple[str, str, Need, ASGIApp]] = [
        ("POST", "/v1/completions", "key", text.completions),
        ("POST", "/v1/chat/completions", "key", text.chat_completions),
        ("GET", "/v1/models", "key", request_response(status.models)),
        ("GET", "/v1/models/{name:path}", "key", request_response(status.model)),
        ("GET", "/v1/requests", "key", request_response(status.receipts)),
        ("GET", "/v1/requests/{id:path}", "key", request_response(status.receipt)),
        ("GET", "/v1/cluster", "admin", request_response(status.cluster)),
        ("POST", "/v1/cluster/check", "admin", request_response(status.check)),
        ("GET", "/v1/cluster/trace", "admin", request_response(status.trace)),
        ("GET", "/v1/debug/blocks", "admin", request_response(status.blocks)),
        ("GET", "/health", "nothing", request_response(status.health)),
        ("GET", "/ready", "nothing", request_response(status.ready)),
        ("GET", "/metrics", "nothing" if open_metrics else "admin", request_response(status.metrics)),
    ]
    return Starlette(
        routes=[Route(path, Counted(Guarded(app, access, need), path, metrics), methods=[method]) for method, path, need, app in routes],
        exception_handlers={RequestError: refuse, HTTPException: refuse_path, Exception: apologize},
    )


class Counted:
    """An endpoint whose answers are counted by route and status, refusals and vanished clients included."""

    def __init__(self, app: ASGIApp, route: str, metrics: Metrics) -> None:
        self._app = app
        self._route = route
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except RequestError as error:
            status = error.status
            raise
        except (ClientGone, ClientDisconnect):
            status = _CLIENT_GONE
        finally:
            self._metrics.count_http(self._route, status)
