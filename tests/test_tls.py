"""TLS contexts: what may be loaded, how a file that may not is named, and that the page's recipe makes good ones."""

import ssl
import time
from pathlib import Path

import pytest

from disaggd.errors import ConfigError
from disaggd.tls import blind_context, days_left, mutual_contexts, server_context
from tests.support.certificates import Certificates, make_certificates


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("ca"))


def handshake(accept: ssl.SSLContext, dial: ssl.SSLContext, host: str | None = None) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Both ends, in memory. Raises what either end does."""
    to_accept, to_dial = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = accept.wrap_bio(to_accept, to_dial, server_side=True), dial.wrap_bio(to_dial, to_accept, server_hostname=host)
    open_ends = list(ends)
    for _ in range(10):
        for end in list(open_ends):
            try:
                end.do_handshake()
                open_ends.remove(end)
            except ssl.SSLWantReadError:
                continue
    assert not open_ends
    return ends


def test_two_nodes_of_one_authority_verify_each_other(made: Certificates) -> None:
    accept, _ = mutual_contexts("cluster", **links(made, "p0"))
    _, dial = mutual_contexts("cluster", **links(made, "router"))
    at_node, at_router = handshake(accept, dial)
    assert (common_name(at_node), common_name(at_router)) == ("router", "p0")
    assert at_node.version() == "TLSv1.3"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_old_versions_are_refused(made: Certificates, version: ssl.TLSVersion) -> None:
    dial = blind_context()
    with pytest.warns(DeprecationWarning):
        dial.minimum_version = version
        dial.maximum_version = version
    dial.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError):
        handshake(server_context("router", made.path("router.pem"), made.path("router.key")), dial)


def test_somebody_without_a_certificate_or_of_another_authority_is_refused(made: Certificates, tmp_path: Path) -> None:
    accept, _ = mutual_contexts("cluster", **links(made, "p0"))
    _, stranger = mutual_contexts("cluster", **links(make_certificates(tmp_path), "router"))
    for dial in (blind_context(), stranger):
        with pytest.raises(ssl.SSLError):
            handshake(accept, dial)


def test_a_client_that_knows_the_authority_believes_the_router_as_strictly_as_it_likes(made: Certificates) -> None:
    dial = ssl.create_default_context(cafile=made.path("ca.pem"))
    dial.verify_flags |= ssl.VERIFY_X509_STRICT
    server = server_context("router", made.path("router.pem"), made.path("router.key"))
    handshake(server, dial, "127.0.0.1")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, dial, "10.9.9.9")


def test_a_file_that_cannot_be_used_is_named(made: Certificates, tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.touch()
    cert, key, ca = made.path("p0.pem"), made.path("p0.key"), made.path("ca.pem")
    for files, message in (
        (("/absent.pem", key, ca), "cluster.tls_cert: /absent.pem: No such file or directory"),
        ((cert, "/absent.key", ca), "cluster.tls_key: /absent.key: No such file or directory"),
        ((cert, key, "/absent.pem"), "cluster.tls_ca: /absent.pem: No such file or directory"),
        ((cert, made.path("d0.key"), ca), f"cluster.tls_cert, tls_key: {cert}, {made.path('d0.key')}: key values mismatch"),
        ((str(empty), key, ca), f"cluster.tls_cert, tls_key: {empty}, {key}: "),
        ((cert, key, str(empty)), f"cluster.tls_ca: {empty}: no certificate or crl found"),
    ):
        with pytest.raises(ConfigError) as caught:
            mutual_contexts("cluster", *files)
        assert str(caught.value).startswith(message)


def test_a_certificate_that_ends_soon_is_noticed() -> None:
    def left(days: float) -> float | None:
        ends = time.strftime("%b %d %H:%M:%S %Y GMT", time.gmtime(time.time() + days * 86_400))
        return days_left({"notAfter": ends})

    assert left(13) == pytest.approx(13, abs=0.01)
    assert left(15) is None
    assert days_left(None) is None and days_left({}) is None


def links(made: Certificates, node: str) -> dict[str, str]:
    return {name.removeprefix("tls_"): path for name, path in made.links(node).items()}


def common_name(end: ssl.SSLObject) -> str:
    """Of the peer that this end sees."""
    certificate = end.getpeercert()
    assert certificate is not None
    return str(dict(pair[0] for pair in certificate["subject"])["commonName"])
