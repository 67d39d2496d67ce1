"""`disaggd trace` against a router that answers what a test says: what it prints, and how it ends."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from disaggd import cli
from disaggd.tls import server_context
from tests.support.certificates import make_certificates
from tests.support.fake_router import FakeRouter, fake_router
from tests.support.receipts import local_receipt, remote_receipt


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    with fake_router() as fake:
        yield fake


def run(*arguments: str) -> int:
    return cli._run(["trace", *arguments])


def test_a_request_is_drawn(router: FakeRouter, capsys: pytest.CaptureFixture[str]) -> None:
    router.remember(remote_receipt("a/b?c"))
    assert run("a/b?c", "--url", router.url) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("a/b?c  remote p0")
    assert "prefill wait p0" in shown
    assert "\x1b" not in shown


def test_the_beginning_of_an_id_will_do_if_it_is_one_requests(router: FakeRouter, capsys: pytest.CaptureFixture[str]) -> None:
    router.remember(remote_receipt("cmpl-17aa"), local_receipt("cmpl-17ab"), local_receipt("other"))
    assert run("cmpl-17aa"[:-1] + "b", "--url", router.url) == 0
    assert run("oth", "--url", router.url) == 0
    assert run("cmpl", "--url", router.url) == 1
    assert capsys.readouterr().err == "disaggd: 2 requests begin with 'cmpl': cmpl-17aa, cmpl-17ab\n"


def test_without_an_id_the_latest_are_a_table(router: FakeRouter, capsys: pytest.CaptureFixture[str]) -> None:
    router.remember(remote_receipt("one"), local_receipt("two"))
    assert run("--url", router.url) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["one", "two"]


def test_a_router_that_served_nobody_yet_says_so(router: FakeRouter, capsys: pytest.CaptureFixture[str]) -> None:
    router.remember()
    assert run("--url", router.url) == 0
    assert capsys.readouterr().out == "no request yet\n"


def test_a_key_from_a_file_is_sent_along(router: FakeRouter, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    router.remember(remote_receipt())
    (tmp_path / "key").write_text("sk-disaggd-abc\n")
    assert run("--url", router.url, "--key-file", str(tmp_path / "key")) == 0
    assert run("--url", router.url) == 0
    assert router.keys == ["Bearer sk-disaggd-abc", None]
    assert run("--url", router.url, "--key-file", str(tmp_path / "absent")) == 2
    assert "absent: no such file" in capsys.readouterr().err


def test_json_is_the_receipt_itself(router: FakeRouter, capsys: pytest.CaptureFixture[str]) -> None:
    router.remember(remote_receipt("one"))
    assert run("one", "--json", "--url", router.url) == 0
    assert msgspec.json.decode(capsys.readouterr().out) == msgspec.json.decode(msgspec.json.encode(remote_receipt("one")))


def test_an_unknown_request_exits_1_and_says_where_it_was_sought(router: FakeRouter, capsys: pytest.CaptureFixture[str]) -> None:
    router.remember(local_receipt("other"))
    assert run("nope", "--url", router.url) == 1
    assert (
        capsys.readouterr().err == f"disaggd: {router.url} knows no request 'nope': never heard of, or too long ago ([router] receipts)\n"
    )


def test_no_router_exits_3(router: FakeRouter, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", router.url)  # which is not asked
    router.answers["http://127.0.0.1:9/v1/requests/x"] = (200, msgspec.json.encode(local_receipt("x")))
    assert run("x", "--url", "http://127.0.0.1:9") == 3
    assert capsys.readouterr().err.startswith("disaggd: no router at http://127.0.0.1:9: ")


def test_a_router_that_serves_https_is_guessed(free_port: Callable[[], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_certificates(tmp_path)
    with socket.create_server(("127.0.0.1", free_port())) as listener:
        context = server_context("router", made.path("router.pem"), made.path("router.key"))

        def refuse() -> None:
            with contextlib.suppress(OSError), context.wrap_socket(listener.accept()[0], server_side=True):
                pass

        thread = threading.Thread(target=refuse)
        thread.start()
        port = listener.getsockname()[1]
        assert run("x", "--url", f"http://127.0.0.1:{port}") == 3
        thread.join()
    assert capsys.readouterr().err.endswith(f" (does it serve HTTPS? --url https://127.0.0.1:{port})\n")


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, b"<html>", "does not answer as a router of this version does"),
        (200, b'{"id": 5}', "does not answer as a router of this version does"),
        (400, b'{"error": {"message": "limit: no"}}', "answered 400: limit: no"),
        (401, b'{"error": {"message": "no API key"}}', "answered 401: no API key (--key-file names a file with one)"),
        (500, b"oops", "answered 500: Internal Server Error"),
    ],
)
def test_an_answer_that_is_none_exits_1(
    router: FakeRouter, capsys: pytest.CaptureFixture[str], status: int, body: bytes, message: str
) -> None:
    router.answers["/v1/requests/x"] = (status, body)
    assert run("x", "--url", router.url) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("url", ["nonsense", "127.0.0.1:8000", "ftp://host", "http://"])
def test_an_address_that_is_none_exits_2(capsys: pytest.CaptureFixture[str], url: str) -> None:
    assert run("--url", url) == 2
    assert "is no address of a router, such as http://127.0.0.1:8000" in " ".join(capsys.readouterr().err.split())


def test_help_reads_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    assert capsys.readouterr().out.startswith("Usage: disaggd trace [OPTIONS] [ID]")
