"""A router that answers what a test says, for commands that ask one."""

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import unquote

import msgspec

from disaggd.observe.receipts import Receipt, ReceiptList


class FakeRouter:
    """Answers by path; anything else is a 404."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.asked: list[str] = []
        """Method and path, of each request."""
        self.keys: list[str | None] = []
        router = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                router.asked.append(f"{self.command} {unquote(self.path)}")
                router.keys.append(self.headers["authorization"])
                status, body = router.answers.get(unquote(self.path), (404, b"{}"))
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET  # noqa: N815  the library's own

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def remember(self, *receipts: Receipt) -> None:
        for receipt in receipts:
            self.answers[f"/v1/requests/{receipt.id}"] = (200, msgspec.json.encode(receipt))
        for limit in (20, 1000):
            self.answers[f"/v1/requests?limit={limit}"] = (200, msgspec.json.encode(ReceiptList(data=receipts)))


@contextlib.contextmanager
def fake_router() -> Iterator[FakeRouter]:
    fake = FakeRouter()
    thread = threading.Thread(target=fake.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield fake
    finally:
        fake.server.shutdown()
        fake.server.server_close()
        thread.join()
