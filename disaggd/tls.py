"""TLS contexts from the files that the TOML names: TLS 1.2 or newer, the standard library's ciphers.

A file that cannot be used is a ConfigError that names its key and its path. Knows no socket.
"""

import ssl
import time
from pathlib import Path
from typing import Literal

from disaggd.errors import ConfigError

Section = Literal["router", "cluster"]

EXPIRY_WARNING_S = 14 * 86_400.0


def server_context(section: Section, cert: str, key: str) -> ssl.SSLContext:
    """For whoever connects: clients show no certificate. Raises ConfigError."""
    return _context(ssl.PROTOCOL_TLS_SERVER, section, cert, key)


def mutual_contexts(section: Section, cert: str, key: str, ca: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """To accept with, and to dial with: either end must show a certificate that `ca` has signed. Raises ConfigError.

    Host names are not looked at: nodes are listed by address, the authority signs for nobody else, and the handshake that
    follows proves the node's name.
    """
    accept, dial = (_context(protocol, section, cert, key) for protocol in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT))
    dial.check_hostname = False
    for context in (accept, dial):
        context.verify_mode = ssl.CERT_REQUIRED
        _readable(section, "tls_ca", ca)
        try:
            context.load_verify_locations(ca)
        except ssl.SSLError as error:
            raise ConfigError(f"{section}.tls_ca: {ca}: {reason(error)}") from error
    return accept, dial


def blind_context() -> ssl.SSLContext:
    """Believes any certificate: only to ask a process of our own on this host whether it is ready."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def days_left(certificate: object) -> float | None:
    """Of a peer's certificate, as `getpeercert` tells it; None if that is more than two weeks off, or there is none."""
    if not isinstance(certificate, dict) or "notAfter" not in certificate:
        return None
    left_s = ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time()
    return left_s / 86_400 if left_s < EXPIRY_WARNING_S else None


def reason(error: ssl.SSLError) -> str:
    """In OpenSSL's words, without its file and line."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {error.verify_message}"
    return (error.reason or str(error)).lower().replace("_", " ")


def _context(protocol: int, section: Section, cert: str, key: str) -> ssl.SSLContext:
    _readable(section, "tls_cert", cert)
    _readable(section, "tls_key", key)
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key, password="")  # an encrypted key is an error, not a question on the terminal
    except ssl.SSLError as error:
        raise ConfigError(f"{section}.tls_cert, tls_key: {cert}, {key}: {reason(error)}") from error
    return context


def _readable(section: Section, name: str, path: str) -> None:
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise ConfigError(f"{section}.{name}: {path}: {error.strerror or error}") from error
