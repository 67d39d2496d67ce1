"""What the headers say of one request: its id, its session, and where it wants to be prefilled. Knows nothing of bodies or nodes."""

import re
import time
from uuid import uuid4

import msgspec
from starlette.requests import Request

from disaggd.errors import Forbidden, InvalidRequest
from disaggd.gateway.access import Client
from disaggd.gateway.backend import Policy

_NAME = re.compile(r"[!-~]{1,128}")
"""Of a request or a session."""


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One HTTP request, as far as its headers tell."""

    id: str
    client: Client
    policy: Policy
    session: str | None
    arrived_s: float
    """On `time.perf_counter`."""


def read_headers(request: Request, id_prefix: str) -> Call:
    """Of a request that came through a `Guarded`. Raises InvalidRequest naming the header, and Forbidden for an override that
    its sender may not make.

    The id is known first, so that every refusal can bear it.
    """
    request.state.request_id = f"{id_prefix}{uuid4().hex}"
    request.state.request_id = request_id = _name(request, "x-request-id") or request.state.request_id
    return Call(
        id=request_id,
        client=request.state.client,
        policy=_policy(request, request.state.client),
        session=_name(request, "x-session-id"),
        arrived_s=time.perf_counter(),
    )


def refusal_id(request: Request) -> str:
    """Of a request that was refused before its headers were read: its own, if that is a name."""
    given = request.headers.get("x-request-id", "")
    return given if _NAME.fullmatch(given) else f"req-{uuid4().hex}"


def _name(request: Request, header: str) -> str | None:
    name = request.headers.get(header)
    if name is not None and not _NAME.fullmatch(name):
        raise InvalidRequest(f"{header}: must be 1 to 128 visible ASCII characters", param=header)
    return name


def _policy(request: Request, client: Client) -> Policy:
    match request.headers.get("x-disaggd-policy"):
        case None:
            return "auto"
        case "local" | "remote" as policy:
            if not client.may_override:
                raise Forbidden("x-disaggd-policy: only for keys that have may_override = true", param="x-disaggd-policy")
            return policy
        case other:
            raise InvalidRequest(f"x-disaggd-policy: must be local or remote, not {other!r:.40}", param="x-disaggd-policy")
