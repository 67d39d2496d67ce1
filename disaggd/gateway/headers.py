"""What the headers say of one request: its id, its session, and where it wants to be prefilled. Knows nothing of bodies or nodes."""

import re
import time
from collections.abc import Collection
from hmac import compare_digest
from uuid import uuid4

import msgspec
from starlette.requests import Request

from disaggd.errors import Forbidden, InvalidRequest
from disaggd.gateway.backend import Policy

_NAME = re.compile(r"[!-~]{1,128}")
"""Of a request or a session."""


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One HTTP request, as far as its headers tell."""

    id: str
    policy: Policy
    session: str | None
    arrived_s: float
    """On `time.perf_counter`."""


def read_headers(request: Request, id_prefix: str, trusted_keys: Collection[str]) -> Call:
    """Raises InvalidRequest naming the header, and Forbidden for an override that its sender may not make.

    The id is known first, so that every refusal can bear it.
    """
    request.state.request_id = f"{id_prefix}{uuid4().hex}"
    request.state.request_id = request_id = _name(request, "x-request-id") or request.state.request_id
    return Call(id=request_id, policy=_policy(request, trusted_keys), session=_name(request, "x-session-id"), arrived_s=time.perf_counter())


def _name(request: Request, header: str) -> str | None:
    name = request.headers.get(header)
    if name is not None and not _NAME.fullmatch(name):
        raise InvalidRequest(f"{header}: must be 1 to 128 visible ASCII characters", param=header)
    return name


def _policy(request: Request, trusted_keys: Collection[str]) -> Policy:
    match request.headers.get("x-disaggd-policy"):
        case None:
            return "auto"
        case "local" | "remote" as policy:
            if trusted_keys and not _is_trusted(request.headers.get("authorization", ""), trusted_keys):
                raise Forbidden("x-disaggd-policy: only for keys of [router] trusted_keys", param="x-disaggd-policy")
            return policy
        case other:
            raise InvalidRequest(f"x-disaggd-policy: must be local or remote, not {other!r:.40}", param="x-disaggd-policy")


def _is_trusted(authorization: str, trusted_keys: Collection[str]) -> bool:
    """How long this takes tells nothing of the keys: each is compared, in constant time."""
    scheme, _, given = authorization.partition(" ")
    matches = [compare_digest(given.strip().encode(), key.encode()) for key in trusted_keys]
    return scheme.lower() == "bearer" and any(matches)
