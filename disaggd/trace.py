"""`disaggd trace`: asks a router for its receipts, and shows them. Runs once and ends; knows nothing of the cluster."""

import json
import sys
import urllib.parse

import msgspec
from rich.console import Console

from disaggd.errors import DisaggdError
from disaggd.observe.receipts import Receipt, ReceiptList
from disaggd.router_client import RouterClient
from disaggd.waterfall import ASCII, UNICODE, draw, table

LISTED = 20
SEARCHED = 1000
"""Among so many of the latest requests, the beginning of an id is looked for."""


class UnknownRequest(DisaggdError):
    """The router remembers no such request."""


def show(url: str, request_id: str | None, as_json: bool, api_key: str | None = None) -> None:
    """Prints a request's receipt as a waterfall, or the latest requests as a table; `as_json`: what the router answered.

    Raises UnknownRequest, ResourceError when no router answers, and DisaggdError for an answer that is none.
    """
    router = Router(RouterClient(url, api_key))
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
    """What a router says of requests."""

    def __init__(self, client: RouterClient) -> None:
        self._client = client

    def find(self, request_id: str) -> Receipt:
        """By its id, or by as much of it as tells it from the others. Raises UnknownRequest."""
        receipt = self._client.get("/v1/requests/" + urllib.parse.quote(request_id, safe=""), Receipt)
        if receipt is not None:
            return receipt
        found = {one.id: one for one in self.latest(SEARCHED).data if one.id.startswith(request_id)}
        if len(found) == 1:
            return found.popitem()[1]
        if not found:
            raise UnknownRequest(f"{self._client.url} knows no request {request_id!r}: never heard of, or too long ago ([router] receipts)")
        raise UnknownRequest(
            f"{len(found)} requests begin with {request_id!r}: {', '.join(list(found)[:5])}{', …' if len(found) > 5 else ''}"
        )

    def latest(self, limit: int) -> ReceiptList:
        """The latest, newest first."""
        return self._client.get(f"/v1/requests?limit={limit}", ReceiptList) or ReceiptList(data=())
