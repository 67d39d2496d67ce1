"""`disaggd trace`: asks a router for its receipts, and shows them. Runs once and ends; knows nothing of the cluster."""

import json
import sys
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException
from typing import Any, TypeVar

import msgspec
from rich.console import Console

from disaggd.errors import DisaggdError, ResourceError
from disaggd.observe.receipts import Receipt, ReceiptList
from disaggd.waterfall import ASCII, UNICODE, draw, table

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 10.0
LISTED = 20
SEARCHED = 1000
"""Among so many of the latest requests, the beginning of an id is looked for."""

Answer = TypeVar("Answer", Receipt, ReceiptList)


class UnknownRequest(DisaggdError):
    """The router remembers no such request."""


def show(url: str, request_id: str | None, as_json: bool, api_key: str | None = None) -> None:
    """Prints a request's receipt as a waterfall, or the latest requests as a table; `as_json`: what the router answered.

    Raises UnknownRequest, ResourceError when no router answers, and DisaggdError for an answer that is none.
    """
    router = Router(url, api_key)
    answer = router.find(request_id) if request_id is not None else router.latest(LISTED)
    console = Console(highlight=False)
    if as_json:
        sys.stdout.write(json.dumps(msgspec.to_builtins(answer), indent=2) + "\n")
        return
    glyphs = UNICODE if console.encoding.startswith("utf") else ASCII
    if isinstance(answer, Receipt):
        for line in draw(answer, console.width, glyphs):
            console.print(line, soft_wrap=True)
    elif answer.data:
        console.print(table(answer.data, glyphs))
    else:
        console.print("no request yet")


class Router:
    """What a router at `url` says of requests. Proxies of the environment are for the world outside, and not asked."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = url.rstrip("/")
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        if api_key is not None:
            self._opener.addheaders = [("Authorization", f"Bearer {api_key}")]

    def find(self, request_id: str) -> Receipt:
        """By its id, or by as much of it as tells it from the others. Raises UnknownRequest."""
        receipt = self._ask("/v1/requests/" + urllib.parse.quote(request_id, safe=""), Receipt)
        if receipt is not None:
            return receipt
        found = {one.id: one for one in self.latest(SEARCHED).data if one.id.startswith(request_id)}
        if len(found) == 1:
            return found.popitem()[1]
        if not found:
            raise UnknownRequest(f"{self._url} knows no request {request_id!r}: never heard of, or too long ago ([router] receipts)")
        raise UnknownRequest(
            f"{len(found)} requests begin with {request_id!r}: {', '.join(list(found)[:5])}{', …' if len(found) > 5 else ''}"
        )

    def latest(self, limit: int) -> ReceiptList:
        """The latest, newest first."""
        return self._ask(f"/v1/requests?limit={limit}", ReceiptList) or ReceiptList(data=())

    def _ask(self, path: str, kind: type[Answer]) -> Answer | None:
        """None for a 404."""
        try:
            with self._opener.open(self._url + path, timeout=TIMEOUT_S) as reply:
                return msgspec.json.decode(reply.read(), type=kind)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            hint = " (--key-file names a file with one)" if error.code == 401 else ""
            raise DisaggdError(f"{self._url} answered {error.code}: {_message(error)}{hint}") from error
        except (OSError, HTTPException) as error:
            cut = isinstance(error, ConnectionResetError) and self._url.startswith("http:")
            hint = f" (does it serve HTTPS? --url {self._url.replace('http', 'https', 1)})" if cut else ""
            raise ResourceError(f"no router at {self._url}: {getattr(error, 'reason', error)}{hint}") from error
        except msgspec.MsgspecError as error:
            raise DisaggdError(f"{self._url} does not answer as a router of this version does: {error}") from error


def _message(error: urllib.error.HTTPError) -> str:
    """Of OpenAI's error object, if it is one."""
    body: Any = None
    try:
        body = json.loads(error.read())
        return str(body["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        return error.reason
