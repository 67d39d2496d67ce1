"""`Stream`: one streamed completion, read on a thread of its own: what came, when, and how it ended. `Answers`: what should come."""

import json
import threading
import time
from collections.abc import Mapping
from typing import Any

import httpx
import msgspec

from disaggd.engine.engine import generate
from disaggd.sampling import SamplingParams
from tests.support.matrix import End
from tests.support.oracle import Oracle

LOGPROB_TOLERANCE = 2e-3
"""Of float32 sums in another order, on logprobs down to about -20."""


class Ask(msgspec.Struct, frozen=True):
    """A prompt, and the sampling of its completion."""

    prompt: list[int]
    sampling: SamplingParams

    def body(self) -> dict[str, Any]:
        """As a client writes it."""
        options: Mapping[str, Any] = msgspec.to_builtins(self.sampling)
        return {"model": "tiny", "prompt": self.prompt, "stream": True, "temperature": 1.0, **options, "logprobs": 0}


class Answer(msgspec.Struct, frozen=True):
    """What the oracle says."""

    labels: list[str]
    logprobs: list[float]
    finish_reason: str


class Answers:
    """The oracle's, computed once for each question."""

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        self._known: dict[bytes, Answer] = {}

    def to(self, ask: Ask) -> Answer:
        key = msgspec.msgpack.encode(ask)
        if key not in self._known:
            self._known[key] = self._compute(ask)
        return self._known[key]

    def _compute(self, ask: Ask) -> Answer:
        sampling = msgspec.structs.replace(ask.sampling, top_logprobs=0)
        outputs = list(generate(self._oracle.engine, ask.prompt, sampling))
        tokens = [token for output in outputs for token in output.tokens]
        logprobs = [logprob.logprob for output in outputs for logprob in output.logprobs or ()]
        return Answer(self._oracle.labels(tokens), logprobs, str(outputs[-1].finish_reason))


class Stream:
    """Under way from its making. `end` is None until it is over; the other fields grow on the reading thread."""

    def __init__(self, http: httpx.Client, request_id: str, ask: Ask, salt: str, policy: str) -> None:
        self.id = request_id
        self.ask = ask
        self.labels: list[str] = []
        self.logprobs: list[float] = []
        self.arrivals: list[float] = []
        """Of each event with a token, in monotonic seconds."""
        self.finish_reason: str | None = None
        self.end: End | None = None
        self.note = ""
        """Of an end that was none of its own: in whose words."""
        headers = {"x-request-id": request_id, "x-disaggd-policy": policy}
        self._thread = threading.Thread(target=self._run, args=(http, {**ask.body(), "cache_salt": salt}, headers), name=request_id)
        self._thread.start()

    @property
    def num_tokens(self) -> int:
        return len(self.labels)

    def join(self, deadline_s: float) -> None:
        """TimeoutError when it is not over by then."""
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            raise TimeoutError(f"{self.id} has neither tokens nor an error for its client within {deadline_s} s; it has {self.num_tokens}")

    def _run(self, http: httpx.Client, body: dict[str, Any], headers: dict[str, str]) -> None:
        try:
            with http.stream("POST", "/v1/completions", json=body, headers=headers, timeout=None) as reply:
                if reply.status_code != 200:
                    self.end, self.note = "error", f"{reply.status_code}: {reply.read().decode()}"
                    return
                for line in reply.iter_lines():
                    if line:
                        self._hear(line.removeprefix("data: "))
        except httpx.TransportError as error:
            self.note = f"{type(error).__name__}: {error}"
        self.end = self.end or "cut"

    def _hear(self, data: str) -> None:
        if data == "[DONE]":
            self.end = "complete"
            return
        event = json.loads(data)
        if "error" in event:
            self.end, self.note = "error", event["error"]["message"]
            return
        (choice,) = event["choices"]
        self.finish_reason = choice["finish_reason"]
        if choice["logprobs"] is not None and choice["logprobs"]["tokens"]:
            self.labels += choice["logprobs"]["tokens"]
            self.logprobs += choice["logprobs"]["token_logprobs"]
            self.arrivals.append(time.monotonic())


def contradiction(stream: Stream, answer: Answer) -> str | None:
    """Where what came is not the oracle's; None where it is, as far as it came."""
    if stream.end == "complete" and (stream.num_tokens, stream.finish_reason) != (len(answer.labels), answer.finish_reason):
        return f"{stream.num_tokens} tokens ({stream.finish_reason}), not {len(answer.labels)} ({answer.finish_reason})"
    if stream.labels != answer.labels[: stream.num_tokens]:
        at = next(i for i, (ours, theirs) in enumerate(zip(stream.labels, answer.labels, strict=False)) if ours != theirs)
        return f"token {at} is {stream.labels[at]!r}, not {answer.labels[at]!r}"
    for at, (ours, theirs) in enumerate(zip(stream.logprobs, answer.logprobs, strict=False)):
        if abs(ours - theirs) > LOGPROB_TOLERANCE:
            return f"the logprob of token {at} is {ours}, not {theirs}"
    return None
