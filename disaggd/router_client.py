"""`RouterClient`: asks a router, for commands that run once and end. Knows nothing of the cluster."""

import json
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any, TypeVar

import msgspec

from disaggd.errors import DisaggdError, ResourceError

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 10.0

Answer = TypeVar("Answer")


class RouterClient:
    """Of the router at `url`. Proxies of the environment are for the world outside, and not asked."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = url.rstrip("/")
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        if api_key is not None:
            self._opener.addheaders = [("Authorization", f"Bearer {api_key}")]

    def get(self, path: str, kind: type[Answer]) -> Answer | None:
        """None for a 404. Raises ResourceError where no router answers, DisaggdError for any other answer than a `kind`."""
        return self._ask(urllib.request.Request(self.url + path), kind, TIMEOUT_S)

    def post(self, path: str, kind: type[Answer], timeout_s: float = TIMEOUT_S) -> Answer | None:
        """As `get`; without a body."""
        return self._ask(urllib.request.Request(self.url + path, method="POST", data=b""), kind, timeout_s)

    def _ask(self, request: urllib.request.Request, kind: type[Answer], timeout_s: float) -> Answer | None:
        try:
            with self._opener.open(request, timeout=timeout_s) as reply:
                return msgspec.json.decode(reply.read(), type=kind)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            hint = " (--key-file names a file with one)" if error.code == 401 else ""
            raise DisaggdError(f"{self.url} answered {error.code}: {_message(error)}{hint}") from error
        except (OSError, HTTPException) as error:
            cut = isinstance(error, ConnectionResetError) and self.url.startswith("http:")
            hint = f" (does it serve HTTPS? --url {self.url.replace('http', 'https', 1)})" if cut else ""
            raise ResourceError(f"no router at {self.url}: {_cause(error)}{hint}") from error
        except msgspec.MsgspecError as error:
            raise DisaggdError(f"{self.url} does not answer as a router of this version does: {error}") from error


def _cause(error: OSError | HTTPException) -> str:
    """In words, without the number."""
    reason = getattr(error, "reason", error)
    return str(getattr(reason, "strerror", None) or reason)


def _message(error: urllib.error.HTTPError) -> str:
    """Of OpenAI's error object, if it is one."""
    body: Any = None
    try:
        body = json.loads(error.read())
        return str(body["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        return error.reason
