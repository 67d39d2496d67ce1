"""Every refusal in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`, whatever went wrong.

Knows nothing of why.
"""

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from disaggd.errors import InvalidRequest, NotFound, RequestError, RequestFailed, Unauthorized, Unavailable
from disaggd.gateway.headers import refusal_id


def error_object(error: RequestError) -> dict[str, object]:
    """What OpenAI's clients raise as an exception of their own."""
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}


def refuse(request: Request, error: Exception) -> Response:
    """The response to a refused request."""
    assert isinstance(error, RequestError)
    headers = {"www-authenticate": "Bearer"} if isinstance(error, Unauthorized) else {}
    if isinstance(error, Unavailable):
        headers["retry-after"] = str(error.retry_after_s)
    return _response(request, error, error.status, headers)


def refuse_path(request: Request, error: Exception) -> Response:
    """The response to an unknown path or method."""
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path}"
    shaped = NotFound(f"{asked}: no such path") if error.status_code == 404 else InvalidRequest(f"{asked}: {error.detail}")
    return _response(request, shaped, error.status_code, dict(error.headers or {}))


def apologize(request: Request, error: Exception) -> Response:
    """The response when the server is wrong; the server logs the traceback."""
    return _response(request, RequestFailed("internal error"), 500, {})


def _response(request: Request, error: RequestError, status: int, headers: dict[str, str]) -> Response:
    headers["x-request-id"] = getattr(request.state, "request_id", None) or refusal_id(request)
    return Response(msgspec.json.encode(error_object(error)), status, headers, media_type="application/json")
