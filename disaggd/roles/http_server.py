"""The router's HTTP server: uvicorn, with the limits of the file. What it serves is the gateway's matter."""

import logging
import socket
import ssl
from collections.abc import Generator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from disaggd.config import RouterConfig
from disaggd.errors import ResourceError
from disaggd.gateway.client_connection import ConnectionLimits, bounded
from disaggd.gateway.cuts import Cuts
from disaggd.observe.metrics import Metrics
from disaggd.open_files import allow_files
from disaggd.tls import server_context
from disaggd.units import Address

log = logging.getLogger(__name__)

SPARE_FILES = 256
"""Beside the clients' sockets: links, logs, what the libraries open."""
SEND_BUFFER_BYTES = 128 * 2**10
"""Of a client's socket (the kernel takes twice that, for its own books): by default it lets up to 4 MiB wait for who does not read."""
STOP_TIMEOUT_S = 5
"""Once drained: connections that take the last of their replies for longer are cut."""


def http_server(app: ASGIApp, config: RouterConfig, metrics: Metrics) -> "HttpServer":
    """For `app`, ready to serve a bound socket. Raises ConfigError for certificates that cannot be used."""
    _allow_connections(config.max_connections)
    return HttpServer(http_settings(app, _http_tls(config), config, metrics))


def bind(address: Address) -> socket.socket:
    """Raises ResourceError when the port is taken; uvicorn would exit in its own way."""
    try:
        listener = socket.create_server(
            (address.host, address.port), backlog=2048, family=socket.AF_INET6 if ":" in address.host else socket.AF_INET
        )
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # of every connection that it accepts
        return listener
    except OSError as error:
        raise ResourceError(f"cannot listen on {address}: {error.strerror or error}") from error


class HttpServer(uvicorn.Server):
    """Leaves signals alone: uvicorn would stop listening at the first of them, and a new request would find nobody to refuse it."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def http_settings(app: ASGIApp, tls: ssl.SSLContext | None, config: RouterConfig, metrics: Metrics) -> uvicorn.Config:
    limits = ConnectionLimits(
        max_connections=config.max_connections,
        max_body_bytes=config.max_body_bytes,
        head_timeout_s=config.head_timeout_s,
        body_timeout_s=config.body_timeout_s,
        stall_s=config.client_stall_s,
    )
    settings = uvicorn.Config(
        app,
        http=bounded(limits, Cuts(metrics)),
        timeout_keep_alive=config.keep_alive_s,
        ws="none",
        loop="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=STOP_TIMEOUT_S,
    )
    settings.load()
    settings.ssl = tls
    return settings


def _http_tls(router: RouterConfig) -> ssl.SSLContext | None:
    """None: plain HTTP. Raises ConfigError."""
    return server_context("router", router.tls_cert, router.tls_key) if router.tls_cert is not None and router.tls_key is not None else None


def _allow_connections(max_connections: int) -> None:
    wanted = max_connections + SPARE_FILES
    if (allowed := allow_files(wanted)) < wanted:
        log.warning("this process may open %d files (ulimit -Hn), but router.max_connections wants %d", allowed, wanted)
