"""Who asks, what they may see, and how much they may have at once. Runs on the asyncio thread.

A key is looked up by its SHA-256. Nobody can choose what a digest begins with, so how long the look-up takes tells nothing of the
keys that there are; the digest that was found is compared in constant time all the same. Knows nothing of bodies or nodes.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hmac import compare_digest
from math import ceil
from typing import Literal

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from disaggd.api_keys import MIN_KEY_CHARS, ApiKey, digest_of
from disaggd.errors import Forbidden, InvalidRequest, Overloaded, RequestError, Unauthorized
from disaggd.observe.metrics import Metrics
from disaggd.troubles import Refusals

log = logging.getLogger(__name__)

Need = Literal["nothing", "key", "admin"]
"""What a path asks of its callers, where there are keys at all."""

Used = Callable[[], tuple[int, int]]
"""Prompt and output tokens of a request so far."""


@dataclass(slots=True)
class Client:
    """The holder of one key; or anybody, where the router asks for none."""

    key: ApiKey | None
    level: float = 0.0
    """Tokens that it may use now; less than none after a request that used more than it had reserved."""
    filled_at: float = 0.0
    num_running: int = 0
    """Sequences."""

    @property
    def name(self) -> str | None:
        return None if self.key is None else self.key.name

    @property
    def is_admin(self) -> bool:
        return self.key is None or self.key.admin

    @property
    def may_override(self) -> bool:
        return self.key is None or self.key.may_override or self.key.admin

    @property
    def sees(self) -> str | None:
        """Whose receipts: the holder's own, or everybody's."""
        return None if self.is_admin else self.name

    def salt(self, given: str) -> str:
        """What separates its cached prefixes from others', for a request whose `cache_salt` is `given`. No other key can ask for it."""
        if self.key is None:
            return given
        if self.key.own_cache:
            return f"key:{self.key.name}:{given}"
        return given and f"salt:{given}"


class Access:
    """The keys of a router, and what their holders have in hand. `keys` are None where everybody may do everything."""

    def __init__(self, metrics: Metrics, keys: Sequence[ApiKey] | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._clock = clock
        self._anybody = Client(None)
        self._refusals = Refusals(log, metrics.count_unauthorized)
        self._clients: dict[bytes, Client] | None = None
        if keys is not None:
            self.set_keys(keys)

    def set_keys(self, keys: Sequence[ApiKey]) -> None:
        """From now on these. A name that stays keeps what it has in hand."""
        former = {client.name: client for client in (self._clients or {}).values()}
        self._clients = {}
        for key in keys:
            client = former.get(key.name, self._anybody)
            if client.key is None:
                client = Client(None)
            if client.key is None or client.key.tokens_per_minute != key.tokens_per_minute:
                client.level, client.filled_at = float(key.tokens_per_minute or 0), self._clock()
            client.key = key
            self._clients[key.digest] = client

    def client(self, request: Request, need: Need) -> Client:
        """Who sends `request`. Raises Unauthorized, and Forbidden for a key that may not do this."""
        if self._clients is None or need == "nothing":
            return self._anybody
        client = self._find(self._clients, _bearer(request))
        if client is None:
            raise self._refuse(request)
        if need == "admin" and not client.is_admin:
            raise Forbidden(f"{request.url.path}: only for keys that have admin = true")
        return client

    def _refuse(self, request: Request) -> Unauthorized:
        cause = "wrong" if "authorization" in request.headers else "missing"
        address = request.client.host if request.client else "unknown"
        self._refusals.note(cause, address, f"refused {address} ({request.method} {request.url.path:.80}): {cause} API key")
        if cause == "missing":
            return Unauthorized("an API key is needed: Authorization: Bearer …")
        return Unauthorized("there is no such API key" if _bearer(request) else "the scheme must be Bearer: Authorization: Bearer …")

    @staticmethod
    def _find(clients: dict[bytes, Client], key: str) -> Client | None:
        digest = digest_of(key)
        client = clients.get(digest)
        if client is None or client.key is None or len(key) < MIN_KEY_CHARS:
            return None
        return client if compare_digest(digest, client.key.digest) else None

    @contextmanager
    def reserved(self, client: Client, num_sequences: int, num_tokens: int, used: Used) -> Iterator[None]:
        """The client has `num_sequences` more in hand, and `num_tokens` less to use, while the body runs; in the end what it did use.

        A request that was refused before its first token costs nothing. One that asks for more than a minute's tokens may begin
        when none are used, and is paid off by the minutes that follow. Raises Overloaded, and InvalidRequest for what never fits.
        """
        if client.key is None:
            yield
            return
        key = client.key  # another one of the name may follow while the request runs
        cost = self._reserve(client, key, num_sequences, num_tokens)
        is_free = False
        try:
            yield
        except RequestError:
            is_free = used()[1] == 0
            raise
        finally:
            prompt_tokens, output_tokens = (0, 0) if is_free else used()
            client.num_running -= num_sequences
            client.level += cost - prompt_tokens - output_tokens
            self._metrics.count_key_tokens(key.name, prompt_tokens, output_tokens)

    def _reserve(self, client: Client, key: ApiKey, num_sequences: int, num_tokens: int) -> int:
        if key.max_requests is not None and num_sequences > key.max_requests:
            raise InvalidRequest(f"{num_sequences} prompts at once; this key may have {key.max_requests}", param="prompt")
        if key.max_requests is not None and client.num_running + num_sequences > key.max_requests:
            self._metrics.count_key_request(key.name, "max_requests")
            raise Overloaded(f"this key has {client.num_running} requests in flight already; it may have {key.max_requests}")
        cost = 0
        if key.tokens_per_minute is not None:
            cost = min(num_tokens, key.tokens_per_minute)
            self._refill(client, key.tokens_per_minute)
            if client.level < cost:
                self._metrics.count_key_request(key.name, "tokens_per_minute")
                wait_s = ceil((cost - client.level) * 60 / key.tokens_per_minute)
                raise Overloaded(f"this key may use {key.tokens_per_minute} tokens a minute; try again in {wait_s} s", retry_after_s=wait_s)
        self._metrics.count_key_request(key.name, "admitted")
        client.level -= cost
        client.num_running += num_sequences
        return cost

    def _refill(self, client: Client, tokens_per_minute: int) -> None:
        now = self._clock()
        client.level = min(float(tokens_per_minute), client.level + (now - client.filled_at) * tokens_per_minute / 60)
        client.filled_at = now


def _bearer(request: Request) -> str:
    """The token that the request bears; empty if it bears none."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


class Guarded:
    """An endpoint that only its callers may use; it finds who calls as `client` of the request's state."""

    def __init__(self, app: ASGIApp, access: Access, need: Need) -> None:
        self._app = app
        self._access = access
        self._need = need

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["client"] = self._access.client(Request(scope), self._need)
        await self._app(scope, receive, send)
