"""One streamed completion, read in the background while a test does something to the nodes that serve it."""

import json
import threading
from typing import Any

import httpx

from tests.support.clusters import Cluster, wait_until


class Stream:
    """Begins at once. `tokens` as `Oracle.labels` spells them; `error` is that of the last event, if it was one."""

    def __init__(self, cluster: Cluster, request_id: str, prompt: list[int], **options: Any) -> None:
        self.id = request_id
        self.tokens: list[str] = []
        self.error: dict[str, Any] | None = None
        self.is_done = False
        """`[DONE]` has come."""
        body = {"model": "tiny", "prompt": prompt, "stream": True, "logprobs": 0, **options}
        self._thread = threading.Thread(target=self._read, args=(cluster.url, body))
        self._thread.start()

    def _read(self, url: str, body: dict[str, Any]) -> None:
        headers = {"x-request-id": self.id}
        with httpx.stream("POST", url + "/v1/completions", json=body, headers=headers, timeout=60) as stream:
            for line in stream.iter_lines():
                self._take(line.removeprefix("data: "))

    def _take(self, event: str) -> None:
        if event == "[DONE]":
            self.is_done = True
        elif event:
            parsed = json.loads(event)
            self.error = parsed.get("error")
            for choice in parsed.get("choices", ()):
                self.tokens += choice["logprobs"]["tokens"] if choice["logprobs"] else ()

    def wait_begun(self) -> "Stream":
        wait_until(f"{self.id} has its first token", lambda: bool(self.tokens), 30, every_s=0.002)
        return self

    @property
    def reply(self) -> dict[str, Any]:
        """As much of a whole reply as `completions.check` looks at."""
        return {"choices": [{"logprobs": {"tokens": self.tokens}}]}

    def join(self) -> "Stream":
        """Until it has ended, one way or another."""
        self._thread.join(60)
        assert not self._thread.is_alive(), f"{self.id} does not end"
        return self
