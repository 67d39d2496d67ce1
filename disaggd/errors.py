"""Every error a user or an operator can meet, in one tree.

`DisaggdError`
├── `ConfigError`, `ModelError`                what was asked for cannot be: exit code 2
├── `ResourceError` ─ `RankLost`               a port, a peer, memory that could not be had: exit code 3
├── `HelloRefused`                             two nodes that cannot work together
└── `RequestError`                             one request that is refused: an HTTP status and OpenAI's error object
    ├── `InvalidRequest` ─ `ContextTooLong`    400
    ├── `Unauthorized`, `Forbidden`            401, 403
    ├── `ModelNotFound`                        404
    └── `Unavailable`                          503 or 429, with `Retry-After`

Knows nothing but the standard library.
"""

from typing import ClassVar

EXIT_USAGE = 2
EXIT_RESOURCE = 3
EXIT_INTERRUPTED = 130


class DisaggdError(Exception):
    """The root: catch this to catch everything disaggd raises on purpose."""

    exit_code: ClassVar[int] = 1


class ConfigError(DisaggdError):
    """The TOML file, or a flag, asks for something that cannot be. Says where, what, and what would be valid."""

    exit_code = EXIT_USAGE


class ModelError(DisaggdError):
    """The model directory cannot be served: a missing shard, an unknown weight, a feature we lack. Names it."""

    exit_code = EXIT_USAGE


class ResourceError(DisaggdError):
    """A port, a peer or memory that could not be had."""

    exit_code = EXIT_RESOURCE


class RankLost(ResourceError):
    """Another rank of this node is gone, or does not do its part."""


class HelloRefused(DisaggdError):
    """Two nodes that cannot work together; `field` differs."""

    def __init__(self, field: str, ours: object, theirs: object) -> None:
        super().__init__(f"hello refused: {field} differs (ours {ours!r}, theirs {theirs!r})")
        self.field = field
        self.ours = ours
        self.theirs = theirs


class RequestError(DisaggdError):
    """One request that is refused. `status` is HTTP's; `kind`, `param`, `code` fill OpenAI's error object."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class InvalidRequest(RequestError):
    """A field has a bad value, or is one we do not support."""

    status = 400
    kind = "invalid_request_error"


class ContextTooLong(InvalidRequest):
    """Prompt and requested output do not fit; the message holds both numbers."""

    def __init__(self, num_tokens: int, limit: int, what: str = "the model's context") -> None:
        super().__init__(
            f"the prompt has {num_tokens} tokens, but {what} holds {limit}",
            param="prompt",
            code="context_length_exceeded",
        )
        self.num_tokens = num_tokens
        self.limit = limit


class BodyTooLarge(InvalidRequest):
    """The request's body is over the configured limit."""

    status = 413


class HeadTooLarge(InvalidRequest):
    """The request line and headers are over what is read of them."""

    status = 431


class TooSlow(RequestError):
    """The client takes longer than it may to send its request, or to read its reply."""

    status = 408
    kind = "invalid_request_error"


class Unauthorized(RequestError):
    """No API key, or a wrong one."""

    status = 401
    kind = "authentication_error"

    def __init__(self, message: str) -> None:
        super().__init__(message, code="invalid_api_key")


class Forbidden(RequestError):
    """The sender may not ask for that."""

    status = 403
    kind = "permission_error"


class NotFound(RequestError):
    """An unknown model, request id or path."""

    status = 404
    kind = "invalid_request_error"


class ModelNotFound(NotFound):
    """The request names a model that this cluster does not serve."""

    def __init__(self, name: str, served: str) -> None:
        super().__init__(f"model {name!r} does not exist; this cluster serves {served!r}", param="model", code="model_not_found")


class Unavailable(RequestError):
    """The cluster cannot take the request now; try again after `retry_after_s`."""

    status = 503
    kind = "service_unavailable"
    reason: ClassVar[str] = "unavailable"
    """OpenAI's `code`."""

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message, code=self.reason)
        self.retry_after_s = retry_after_s


class Overloaded(Unavailable):
    """Every queue that could hold the request is full."""

    status = 429
    kind = "rate_limit_error"
    reason = "rate_limit_exceeded"


class RequestFailed(RequestError):
    """The cluster accepted the request and could not finish it."""

    status = 502
    kind = "server_error"
