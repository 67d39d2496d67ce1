"""Links over TLS: real sockets, certificates as docs/security.md has them made."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from disaggd.cluster.link_settings import LinkSettings
from disaggd.cluster.protocol import Abort
from disaggd.ids import SeqId
from disaggd.tls import mutual_contexts
from tests.cluster.test_link import SETTINGS, End, dialling, logged, run, serving
from tests.support.certificates import Certificates, make_certificates


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("ca"))


def over_tls(made: Certificates, node: str) -> LinkSettings:
    accept, dial = mutual_contexts("cluster", made.path(f"{node}.pem"), made.path(f"{node}.key"), made.path("ca.pem"))
    return replace(SETTINGS, accept_tls=accept, dial_tls=dial)


def test_frames_go_over_tls(free_port: Callable[[], int], made: Certificates, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        port, router, node = free_port(), End(), End()
        async with serving(port, node, settings=over_tls(made, "p0")), dialling(port, router, settings=over_tls(made, "router")):
            (await router.up.get()).send(Abort(SeqId("x" * 2**17), 0))
            assert await node.frames.get() == Abort(SeqId("x" * 2**17), 0)

    run(scenario())
    assert "expires" not in caplog.text


def test_neither_end_talks_to_one_of_another_authority_or_without_tls(
    free_port: Callable[[], int], made: Certificates, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = make_certificates(tmp_path)

    async def scenario() -> None:
        port, node, plain, other = free_port(), End(), End(), End()
        refused: asyncio.Queue[str] = asyncio.Queue()
        async with serving(port, node, settings=over_tls(made, "p0")):
            async with dialling(port, other, settings=over_tls(foreign, "router"), on_refused=refused.put_nowait):
                assert await refused.get() == "tls"
                assert "TLS: certificate verify failed" in await logged(caplog, "no link to p0")
            async with dialling(port, plain):
                assert "(does it expect TLS? [cluster] tls_cert)" in await logged(caplog, "trying again: ")
            async with dialling(port, good := End(), settings=over_tls(made, "router")):
                await good.up.get()
        assert (other.ups, plain.ups, node.ups) == (0, 0, 1)

    run(scenario())


def test_a_router_with_tls_does_not_talk_to_a_node_without(
    free_port: Callable[[], int], made: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        port, node, router = free_port(), End(), End()
        impatient = replace(over_tls(made, "router"), patience_s=0.0, hello_timeout_s=0.5)
        async with serving(port, node), dialling(port, router, settings=impatient):  # whose first bytes may look like half a line
            await logged(caplog, "trying again: connection reset (does it not speak TLS? [cluster] tls_cert)")
        assert (router.ups, node.ups) == (0, 0)

    run(scenario())


def test_both_ends_warn_of_a_certificate_that_ends_soon(
    free_port: Callable[[], int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    brief = make_certificates(tmp_path, days=3)

    async def scenario() -> None:
        port, router, node = free_port(), End(), End()
        async with serving(port, node, settings=over_tls(brief, "p0")), dialling(port, router, settings=over_tls(brief, "router")):
            await router.up.get()
            await node.up.get()

    run(scenario())
    for peer in ("p0", "r0"):
        assert f"the certificate of {peer} expires in 3.0 days" in caplog.text
