"""How links behave: of one cluster's links, all alike. Knows no socket."""

import ssl
from dataclasses import dataclass, field

from disaggd.config import ClusterConfig
from disaggd.tls import mutual_contexts


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """How a link behaves. Both ends of a cluster share one file, so they agree."""

    heartbeat_s: float = 1.0
    missed_heartbeats: int = 3
    reconnect_min_s: float = 0.05
    """The first pause before another attempt; doubled up to `reconnect_max_s`."""
    reconnect_max_s: float = 1.0
    refused_s: float = 5.0
    """The pause after a hello or a secret was refused: only an operator can mend that."""
    patience_s: float = 20.0
    """A node that was never there, or took its leave, is only waited for, not missed, for so long: nodes start in any order, and are
    restarted."""
    hello_timeout_s: float = 5.0
    max_buffered_bytes: int = 256 * 2**20
    """Frames that wait for a slow peer; more closes the link."""
    max_frame_bytes: int = 64 * 2**20
    max_strangers: int = 64
    """Connections to a node that have not said hello, those in their TLS handshake among them."""
    secret: str | None = field(default=None, repr=False)
    accept_tls: ssl.SSLContext | None = None
    """A listener's; with `dial_tls`, or neither."""
    dial_tls: ssl.SSLContext | None = None


def link_settings(cluster: ClusterConfig) -> LinkSettings:
    """Raises ConfigError for files of `cluster` that cannot be used."""
    accept_tls, dial_tls = None, None
    if cluster.tls_cert is not None and cluster.tls_key is not None and cluster.tls_ca is not None:
        accept_tls, dial_tls = mutual_contexts("cluster", cluster.tls_cert, cluster.tls_key, cluster.tls_ca)
    return LinkSettings(
        heartbeat_s=cluster.heartbeat_s,
        missed_heartbeats=cluster.missed_heartbeats,
        reconnect_max_s=cluster.reconnect_max_s,
        refused_s=max(5.0, cluster.reconnect_max_s),
        secret=cluster.secret,
        accept_tls=accept_tls,
        dial_tls=dial_tls,
    )
